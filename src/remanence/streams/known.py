"""The sets that are known by name: digits (embedded in scikit-learn), Omniglot and Fashion-MNIST (local files).

A local set lies in a folder of its own, `omniglot/omniglot.npz` or `books/books.jsonl.gz` for instance, inside the folder
that the environment variable REMANENCE_DATA names; without that variable, inside `../shared/data` as seen from the
current folder or from one of its parents. Its sha256 is checked once per process.
"""

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from remanence.errors import DataError, SettingError, nearest
from remanence.keys import generator
from remanence.streams.source import Source, draw_share, rows_by_value
from remanence.task import example_ids

FOLDER_VARIABLE = "REMANENCE_DATA"
SHA256 = {
    "omniglot": "6af89e9d3dbc881edd9587f10e68a95e726556ec5dd5503e34cbb1f0c7534d6e",
    "fashion_mnist": "6c569290c64ddf61253f440ea2c1078b2c964c65741e8f82ae25638003d5e82d",
    "books": "be7e8d731e816a56f147ca750e75fcae9274f6e1967278c34c77404de3616f79",
}
_FILES = {"books": "books.jsonl.gz"}
"""Where the file is no .npz."""
N_DRAWERS, N_CHARACTERS = 20, 1623


def digits() -> Source:
    """1,797 handwritten digits, 8 x 8 grey, on every machine; a quarter of each class is test.

    Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI), as shipped with scikit-learn.
        ours: the split, which is fixed and stratified.

    Example:
        >>> source = digits()
        >>> source.images.shape, len(source.test)
        (torch.Size([1797, 1, 8, 8]), 450)
    """
    from sklearn.datasets import load_digits  # scikit-learn takes a second to import

    table = load_digits()
    labels = torch.tensor(table.target, dtype=torch.int64)
    return Source(
        name="digits",
        images=torch.tensor(table.images, dtype=torch.float32)[:, None] / 16,
        labels=labels,
        ids=example_ids("digits", torch.arange(len(labels))),
        is_test=draw_share(labels, 0.25, "test", "digits"),
        class_names={label: str(label) for label in range(10)},
    )


def omniglot(
    split: Literal["background", "evaluation"] = "background", alphabets: list[str] | None = None, n_test_drawers: int = 5
) -> Source:
    """Handwritten characters of 50 alphabets, 28 x 28 grey, 20 drawers each; a class is a character.

    Args:
        split: the official halves: "background" (30 alphabets, 964 characters) or "evaluation" (20 alphabets, 659).
        alphabets: only these, by name; None takes all of the split.
        n_test_drawers: the last so many of the 20 drawers are test, in 1..19: other people than those in train.

    Returns:
        A source whose labels are the official numbers 1..1623 and whose class names are like "Greek 3".

    Raises:
        SettingError: unknown split or alphabet, or `n_test_drawers` out of range.
        DataError: the file is absent or is not the one that is known.

    Source: Lake, Salakhutdinov and Tenenbaum 2015 (Science 350). ours: the split by drawer; the pixels are resized.
    """
    if split not in ("background", "evaluation"):
        raise SettingError(f"split: '{split}' is no split of omniglot.{nearest(split, ('background', 'evaluation'))}")
    if not 1 <= n_test_drawers < N_DRAWERS:
        raise SettingError(f"n_test_drawers: {n_test_drawers} lies outside 1..{N_DRAWERS - 1}; both train and test need a drawer.")
    with np.load(find_set("omniglot")) as table:
        chosen = torch.tensor(table["background"]) == (split == "background")
        names = [str(name) for name in table["alphabet_names"]]
        alphabet = torch.tensor(table["alphabet"], dtype=torch.int64)
        if alphabets is not None:
            chosen &= torch.isin(alphabet, _alphabet_numbers(alphabets, names, alphabet[chosen], split))
        official = torch.tensor(table["official_id"].astype(np.int64))[chosen]
        character = torch.tensor(table["character"], dtype=torch.int64)[chosen]
        images = torch.tensor(table["images"])[chosen].flatten(0, 1)[:, None].float() / 255
    drawer = torch.arange(N_DRAWERS)
    return Source(
        name="omniglot",
        images=images,
        labels=official.repeat_interleave(N_DRAWERS),
        ids=example_ids("omniglot", (official[:, None] * N_DRAWERS + drawer).flatten()),
        is_test=(drawer >= N_DRAWERS - n_test_drawers).repeat(len(official)),
        class_names={
            label: f"{names[index]} {number}"
            for label, index, number in zip(official.tolist(), alphabet[chosen].tolist(), character.tolist(), strict=True)
        },
        n_labels=N_CHARACTERS + 1,
    )


def fashion_mnist(n_train: int | None = None, n_test: int | None = None) -> Source:
    """Photographs of 10 kinds of clothing, 28 x 28 grey: 60,000 to train and 10,000 to test.

    The train/test split is that of the local file, not the official one, so results are close to published ones and
    not comparable digit for digit.

    Args:
        n_train: only so many train images, evenly over the classes (the first classes get one more where it does not
            come out even); fixed, and a smaller subset lies within a larger one. None takes all.
        n_test: the same for test images.

    Raises:
        SettingError: a number lies outside 10..60000 or 10..10000.
        DataError: the file is absent or is not the one that is known.

    Source: Xiao, Rasul and Vollgraf 2017 (arXiv 1708.07747).
    """
    for setting, value, most in (("n_train", n_train, 60_000), ("n_test", n_test, 10_000)):
        if value is not None and not 10 <= value <= most:
            raise SettingError(f"{setting}: {value} lies outside 10..{most}; every class needs an image.")
    with np.load(find_set("fashion_mnist")) as table:
        labels = torch.tensor(table["labels"], dtype=torch.int64)
        is_test = torch.tensor(table["test"])
        rows = torch.cat([_balanced(labels, ~is_test, n_train), _balanced(labels, is_test, n_test)]).sort().values
        return Source(
            name="fashion_mnist",
            images=torch.tensor(table["images"])[rows][:, None].float() / 255,
            labels=labels[rows],
            ids=example_ids("fashion_mnist", rows),
            is_test=is_test[rows],
            class_names={label: str(name) for label, name in enumerate(table["class_names"])},
        )


def find_set(name: str) -> Path:
    """The file of a local set, its content checked.

    Raises:
        DataError: it lies nowhere that was looked at, or its sha256 is another.
    """
    given = os.environ.get(FOLDER_VARIABLE)
    here = Path.cwd()
    folders = [Path(given).expanduser()] if given else [base / "shared" / "data" for base in here.parents]
    file = _FILES.get(name, f"{name}.npz")
    paths = [folder / name / file for folder in folders]
    for path in paths:
        if path.is_file():
            _check_sha256(name, path.resolve())
            return path
    raise DataError(
        f"the set '{name}' is not on this machine; looked at {', '.join(map(str, paths))}. "
        f"Set {FOLDER_VARIABLE} to the folder that holds {name}/{file}."
    )


@cache
def _check_sha256(name: str, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256[name]:
        raise DataError(f"{path} is not the known set '{name}': its sha256 is {found}, not {SHA256[name]}. Copy the file anew.")


def _alphabet_numbers(wanted: list[str], names: list[str], in_split: Tensor, split: str) -> Tensor:
    known = [names[number] for number in torch.unique(in_split).tolist()]
    for name in wanted:
        if name not in known:
            raise SettingError(f"alphabets: '{name}' is not in the {split} split of omniglot.{nearest(name, known)}")
    if not wanted:
        raise SettingError("alphabets: the list is empty; name at least one, or leave it out to take all.")
    return torch.tensor([names.index(name) for name in wanted])


def _balanced(labels: Tensor, mask: Tensor, n: int | None) -> Tensor:
    rows = mask.nonzero().flatten()
    if n is None:
        return rows
    kept = []
    share, n_more = divmod(n, 10)
    for label, own in rows_by_value(labels[rows]).items():
        order = torch.randperm(len(own), generator=generator("subset", "fashion_mnist", label))
        kept.append(rows[own[order[: share + (label < n_more)]]])
    return torch.cat(kept)
