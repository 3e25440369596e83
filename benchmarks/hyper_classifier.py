"""HyperClassifier beside nearest class means and logistic regression on the same pixels, on and off Omniglot.

    python benchmarks/hyper_classifier.py            # about five minutes on one core
    python benchmarks/hyper_classifier.py --quick    # under a minute: three draws of the small cells
    python benchmarks/hyper_classifier.py --model FOLDER

The model that ships with the package was meta-trained on Omniglot's background characters. It is asked about Omniglot's evaluation
characters, scikit-learn's digits, photographs of hands signing digits (48 x 48, made grey) and Fashion-MNIST.

A cell is a set, a number of ways and a number of shots. Each of its draws takes classes, support rows and test rows at random, keyed
by cell and draw; all three classifiers see the same rows, as the 28 x 28 pictures that `HyperClassifier.to_images` makes of them.
A row gives mean accuracies, the mean paired difference to each rival with a 95 % interval over draws (draws of one set share images, so
that the interval speaks for that set, not for sets to come), the calibration error of probabilities (15 bins; with a few
hundred test rows it is biased upwards for all alike), of ours also at temperature 1, and median seconds of `fit`. Nearest class means
give no probabilities at one shot and are left out of calibration. Of Omniglot's twenty drawers the support takes one to five and the
test the rest, so that 20 shots are unavailable. Signs: about ten pictures of a student, one of each digit, fall on both sides of a draw.

Nothing is gated: the table says where the classifier loses.
"""

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from remanence.environment import environment
from remanence.errors import DataError
from remanence.generated.classifier import HyperClassifier, expected_calibration_error
from remanence.grid import one_thread
from remanence.keys import key_seed
from remanence.probes.statistics import interval
from remanence.state import write_whole
from remanence.streams import Source, digits, fashion_mnist, omniglot
from remanence.streams.known import find_set

Floats = npt.NDArray[np.float64]
Measured = dict[str, float]
RESULT = Path(__file__).parent / "results" / "hyper_classifier.json"
SIGN_DIGITS_SHA256 = "9a14dde502645d31e68fb1a2c29cadfeb68d13b3e8c8bc92b3eeeaff9b09ce12"
LUMA = (0.299, 0.587, 0.114)
WAYS, SHOTS, N_DRAWS, N_TEST = (5, 10), (1, 5, 20), 40, 200
OURS, RIVALS = "HyperClassifier", ("nearest class means", "logistic regression")


class Labelled(NamedTuple):
    """Grey images (N, H, W) and their labels (N,)."""

    images: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]


def from_source(source: Source) -> Labelled:
    """All images of a source, its test rows among them: nothing is trained on any."""
    return Labelled(source.images[:, 0].numpy(), source.labels.numpy())


def sign_digits() -> Labelled:
    """2,062 photographs of hands, 48 x 48, by luma.

    Source: Mavi 2020 (arXiv 2011.08927).
    """
    path = find_set("omniglot").parent.parent / "sign_digits" / "sign_digits.npz"
    if not path.is_file():
        raise DataError(f"the set 'sign_digits' is not on this machine; looked at {path}. Copy it there, beside omniglot.")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SIGN_DIGITS_SHA256:
        raise DataError(f"{path} is not the known set 'sign_digits': its sha256 differs. Copy the file anew.")
    with np.load(path) as table:
        return Labelled(table["images"] @ np.array(LUMA), table["labels"].astype(np.int64))


SETS: dict[str, Callable[[], Labelled]] = {
    "omniglot evaluation": lambda: from_source(omniglot("evaluation")),
    "digits": lambda: from_source(digits()),
    "sign digits": sign_digits,
    "fashion-mnist": lambda: from_source(fashion_mnist(10_000, 2_000)),
}


def draw(data: Labelled, ways: int, shots: int, *key: str | int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Support rows, `shots` of each of `ways` classes, and as many test rows of each, `N_TEST` in all where the set has them."""
    rng = np.random.default_rng(key_seed("hyper classifier", *key, ways, shots))
    classes = rng.choice(np.unique(data.labels), ways, replace=False)
    mixed = [rng.permutation(np.flatnonzero(data.labels == label)) for label in classes]
    return np.concatenate([rows[:shots] for rows in mixed]), np.concatenate([rows[shots : shots + N_TEST // ways] for rows in mixed])


def measure(data: Labelled, support: npt.NDArray[np.int64], test: npt.NDArray[np.int64], model: Path | None) -> dict[str, Measured]:
    """Accuracy, calibration error and seconds of `fit` of the three."""
    x, y = data.images[support], data.labels[support]
    start = time.perf_counter()
    ours = HyperClassifier(model).fit(x, y)
    seconds = time.perf_counter() - start
    slots = np.searchsorted(ours.classes_, data.labels[test])
    found = {OURS: answers(ours.predict_proba(data.images[test]), slots) | {"fit_seconds": seconds}}
    plain = HyperClassifier(model, calibrate=False).fit(x, y)
    found[OURS]["ece_uncalibrated"] = expected_calibration_error(plain.predict_proba(data.images[test]), slots)
    found[OURS]["temperature"] = ours.temperature_
    pixels, asked = (ours.to_images(data.images[rows]).flatten(1).double().numpy() for rows in (support, test))
    for name, rival in zip(RIVALS, (NearestCentroid(), LogisticRegression(max_iter=1000)), strict=True):
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nearest class means dislike constant pixels and one shot, for probabilities not asked for
            rival.fit(pixels, y)
        seconds = time.perf_counter() - start
        found[name] = {"accuracy": float((rival.predict(asked) == data.labels[test]).mean()), "fit_seconds": seconds}
        if name == "logistic regression":
            found[name] |= answers(rival.predict_proba(asked), slots)
    return found


def answers(probabilities: Floats, slots: npt.NDArray[np.int64]) -> Measured:
    """Accuracy and calibration error."""
    return {
        "accuracy": float((probabilities.argmax(1) == slots).mean()),
        "ece": expected_calibration_error(probabilities, slots),
    }


def cell(name: str, data: Labelled, ways: int, shots: int, n_draws: int, model: Path | None) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"set": name, "ways": ways, "shots": shots}
    if np.bincount(data.labels).max() <= shots:
        return row | {"unavailable": f"a class has {np.bincount(data.labels).max()} images, and some must be left to test"}
    drawn = [draw(data, ways, shots, name, number) for number in range(n_draws)]
    found = [measure(data, support, test, model) for support, test in drawn]
    columns = {each: {key: [one[each][key] for one in found] for key in found[0][each]} for each in found[0]}
    row |= {"draws": n_draws, "test_rows": len(drawn[0][1]), "temperature": median(columns[OURS].pop("temperature"))}
    row["classifiers"] = {
        each: {key: median(values) if key == "fit_seconds" else float(np.mean(values)) for key, values in table.items()}
        for each, table in columns.items()
    }
    row["differences"] = {
        rival: interval(np.subtract(columns[OURS]["accuracy"], columns[rival]["accuracy"]).tolist())._asdict() for rival in RIVALS
    }
    return row


def lines(row: dict[str, Any]) -> Iterator[str]:
    """A row as printed."""
    head = f"{row['set']:<20}{row['ways']:>5}{row['shots']:>6}"
    if "unavailable" in row:
        yield f"{head}  unavailable: {row['unavailable']}"
        return
    ours, means, logistic = (row["classifiers"][name] for name in (OURS, *RIVALS))
    gaps = (f"{100 * gap['mean']:+6.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]" for gap in row["differences"].values())
    yield head + "".join(f"{100 * each['accuracy']:>8.1f}" for each in (ours, means, logistic)) + "  " + "  ".join(
        f"{gap:<22}" for gap in gaps
    ) + f"{100 * ours['ece']:>7.1f}{100 * ours['ece_uncalibrated']:>8.1f}{100 * logistic['ece']:>8.1f}" + (
        f"{1e3 * ours['fit_seconds']:>10.0f}{1e3 * logistic['fit_seconds']:>9.0f}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three draws of the cells up to five ways and five shots")
    parser.add_argument("--model", type=Path, help="folder of another HyperTransformer than the one that ships")
    parser.add_argument("--out", type=Path, help="where the figures go; a quick run, or one of another model, writes nothing without it")
    options = parser.parse_args(arguments)
    n_draws, most_ways, most_shots = (3, 5, 5) if options.quick else (N_DRAWS, max(WAYS), max(SHOTS))
    out = options.out or (None if options.quick or options.model else RESULT)
    print(
        f"{'':<20}{'ways':>5}{'shots':>6}{'ours':>8}{'means':>8}{'logist.':>8}  {'ours - means':<22}  {'ours - logistic':<22}"
        f"{'ECE':>7}{'at T 1':>8}{'logist.':>8}{'fit ms':>10}{'logist.':>9}"
    )
    rows = []
    with one_thread():
        for name, load in SETS.items():
            data = load()
            for ways, shots in ((w, s) for w in WAYS if w <= most_ways for s in SHOTS if s <= most_shots):
                rows.append(cell(name, data, ways, shots, n_draws, options.model))
                print("\n".join(lines(rows[-1])), flush=True)
    if out is not None:
        flags = (" --quick" if options.quick else "") + (f" --model {options.model.name}" if options.model else "")
        result = {
            "command": f"python benchmarks/hyper_classifier.py{flags}", "threads": 1, "rows": rows, "gates": [],
            "environment": environment(),
        }  # fmt: skip
        write_whole(out, json.dumps(result, indent=1) + "\n")
        print(f"figures in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
