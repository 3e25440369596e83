"""Acceptance of the first learners: rows C1, C2, C3, C5 (replay) and C13, and attacks on our own numbers.

    python benchmarks/continual.py             # five order seeds, about ten minutes on two cores
    python benchmarks/continual.py --quick     # two seeds, no tuning table, about three minutes
    python benchmarks/continual.py --tune      # only the tuning table

Digits arrive two classes at a time; the settings stand in continual.yaml. Differences are paired by order seed, intervals
are Student's t at 95 %. The tuning table gives every learner the same four learning rates (EWC three strengths as well)
on one order that is used nowhere else, read on a validation split; test rows take no part in it. Exit code 1 when a gate
fails.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from continual_cases import Gate, check_kills, check_metrics, check_prototypes, run_cell

from remanence.environment import environment
from remanence.grid import Builder, one_thread, prepare, run_cells
from remanence.ledger import Ledger
from remanence.probes import cell_metrics, paired_difference
from remanence.probes.statistics import Interval, interval
from remanence.recipe import Recipe, read_recipe
from remanence.state import write_whole

HERE = Path(__file__).parent
RESULT = HERE / "results" / "continual.json"
QUICK_SEEDS, TUNING_SEED = "[0, 1]", 100
RATES, STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3), (1e3, 1e4, 1e5)
KILLED = ("fine-tuning", "replay", "prototypes")
SHOWN = ("average_accuracy", "forgetting_first", "learning_accuracy")
CHANCE, ONE_CLASS = 0.15, 0.1
"""Above a tenth by no more than ten clusters, each matched by luck, allow; what one class of ten is worth."""


def run_recipe(recipe: Recipe, folder: Path) -> pd.DataFrame:
    """All cells on two processes; the ledgers' rows."""
    artifacts = prepare(recipe, folder, str(recipe.tree.get("command", "")))
    run_cells(recipe, artifacts, folder, jobs=2)
    return Ledger.open(folder)


# --- tuning ------------------------------------------------------------------------------------------------------


def tuning_recipe(recipe: Recipe) -> Recipe:
    """Every learner at every rate, on the validation split of another order."""
    split = {"call": "remanence.streams.split_classes", "source": "$arriving", "per_task": 2, "valid_share": 0.2}
    streams: dict[str, Any] = {
        "in turn": {"call": "continual_cases.on_valid", "stream": split},
        "all at once": {"call": "continual_cases.on_valid", "stream": {"call": "remanence.streams.joint", "stream": split}},
    }
    learners: dict[str, Any] = {}
    cells: list[dict[str, Any]] = []
    for name, call in recipe.tree["learners"].items():
        if name.startswith(("untrained", "replay of one")):
            continue
        rates = RATES if "lr" in call else (None,)
        chosen = {_setting(name, rate, strength): _call(call, rate, strength) for rate in rates for strength in _strengths(name)}
        learners |= chosen
        cells.append({"stream": "all at once" if name == "joint" else "in turn", "learners": list(chosen)})
    tree = {key: recipe.tree[key] for key in ("sources", "probes")}
    tree["artifacts"] = {"backbone": recipe.tree["artifacts"]["backbone"]}
    return Recipe("tuning", tree | {"streams": streams, "learners": learners, "cells": cells, "seeds": [TUNING_SEED]}, recipe.path)


def _strengths(name: str) -> tuple[float | None, ...]:
    return STRENGTHS if name == "EWC" else (None,)


def _setting(name: str, rate: float | None, strength: float | None) -> str:
    return " ".join([name, *([f"lr {rate:g}"] if rate else []), *([f"strength {strength:g}"] if strength else [])])


def _call(call: dict[str, Any], rate: float | None, strength: float | None) -> dict[str, Any]:
    return call | ({"lr": rate} if rate else {}) | ({"strength": strength} if strength else {})


def tuning_table(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """Average accuracy on the validation split, best setting of each learner marked."""
    tuning = tuning_recipe(recipe)
    values = _by_seed(cell_metrics(run_recipe(tuning, folder)), "average_accuracy")
    rows: list[dict[str, Any]] = []
    for cell in tuning.tree["cells"]:
        best = max(cell["learners"], key=lambda name: values[cell["stream"], name][0])
        for name in cell["learners"]:
            call = tuning.tree["learners"][name]
            settings = {key: call[key] for key in ("lr", "strength") if key in call}
            rows.append(
                {"setting": name, "stream": cell["stream"], **settings, "valid": values[cell["stream"], name][0], "best": name == best}
            )
    return rows


def print_tuning(rows: list[dict[str, Any]]) -> None:
    """The table for a terminal."""
    print(f"tuning: average accuracy on the validation split, order seed {TUNING_SEED}")
    for row in rows:
        print(f"  {row['setting']:<36}{100 * row['valid']:>7.1f} %{'  best' if row['best'] else ''}")


# --- the comparison ----------------------------------------------------------------------------------------------


def _by_seed(table: pd.DataFrame, metric: str) -> dict[tuple[str, str], list[float]]:
    rows = table[(table["metric"] == metric) & (table["store"] != "")]
    return {(str(key[0]), str(key[1])): group["value"].to_list() for key, group in rows.groupby(["stream", "learner"], sort=False)}


def comparison(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per learner and stream: each shown metric with its interval and its values by seed."""
    table = cell_metrics(frame)
    found = {metric: _by_seed(table, metric) for metric in SHOWN}
    return [
        {"stream": stream, "learner": learner} | {metric: _summary(values[stream, learner]) for metric, values in found.items()}
        for stream, learner in found["average_accuracy"]
    ]


def _summary(values: list[float]) -> dict[str, Any]:
    """Interval and values by seed; None in place of NaN, which JSON has no word for."""
    plain = {name: None if math.isnan(value) else value for name, value in interval(values)._asdict().items()}
    return plain | {"seeds": [None if math.isnan(value) else value for value in values]}


def print_comparison(rows: list[dict[str, Any]]) -> None:
    """The table for a terminal."""
    print(f"\n{'stream':<18}{'learner':<22}" + "".join(f"{metric.replace('_', ' '):>28}" for metric in SHOWN))
    for row in rows:
        print(f"{row['stream']:<18}{row['learner']:<22}" + "".join(f"{_points(row[metric]):>28}" for metric in SHOWN))


def _points(value: dict[str, Any]) -> str:
    if value["mean"] is None:
        return "-"
    return f"{100 * value['mean']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}] %"


def gates_of(frame: pd.DataFrame, rows: list[dict[str, Any]]) -> Iterator[Gate]:
    """C2, C5's replay row, the per-task LoRA part of C9, and the attacks."""
    mean = {(row["stream"], row["learner"], metric): row[metric]["mean"] for row in rows for metric in SHOWN}
    tuned = mean["in turn", "fine-tuning", "average_accuracy"], mean["in turn", "fine-tuning", "forgetting_first"]
    seen = f"AA {100 * tuned[0]:.1f} %, forgetting_first {100 * tuned[1]:.1f} points"
    yield Gate("C2", "fine-tuning: AA 20 +- 5 %, forgetting_first > 80 points", seen, abs(tuned[0] - 0.2) <= 0.05 and tuned[1] > 0.8)
    joint = mean["all at once", "joint", "average_accuracy"]
    yield Gate("C2", "joint > 95 %", f"{100 * joint:.1f} %", joint > 0.95)
    gain = _paired(frame, "replay @ in turn", "fine-tuning @ in turn")
    yield Gate("C5", "replay (200 examples) - fine-tuning: lower bound > 0", _interval(gain), gain.low > 0)
    lora = next(row["forgetting_first"]["seeds"] for row in rows if row["stream"] == "told")
    yield Gate("C9", "LoRA per task, told the task: forgetting exactly 0 on every seed", str(lora), all(value == 0 for value in lora))
    for stream, learner in (("shuffled at once", "joint"), ("shuffled in turn", "prototypes")):
        value = mean[stream, learner, "average_accuracy"]
        yield Gate("attack", f"labels shuffled, {learner}: not above chance (< 15 %)", f"{100 * value:.1f} %", value < CHANCE)
    loss = _paired(frame, "untrained prototypes @ in turn", "prototypes @ in turn")
    yield Gate("attack", "prototypes on an untrained backbone are worse: upper bound < 0", _interval(loss), loss.high < 0)
    # a single example can save no class but its own
    off = _paired(frame, "replay of one @ in turn", "fine-tuning @ in turn")
    yield Gate(
        "attack",
        "replay of one example is fine-tuning but for one class: |difference| < 10 points",
        _interval(off),
        abs(off.mean) < ONE_CLASS,
    )
    on = _paired(frame, "replay @ in turn", "replay of one @ in turn")
    yield Gate("attack", "replay (200 examples) - replay of one example: lower bound > 0", _interval(on), on.low > 0)


def differences(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Paired differences in average accuracy that the ledger of claims quotes."""
    pairs = (("replay", "fine-tuning"), ("EWC", "fine-tuning"), ("prototypes", "fine-tuning"), ("replay of one", "fine-tuning"))
    return {f"{a} - {b}": _paired(frame, f"{a} @ in turn", f"{b} @ in turn")._asdict() for a, b in pairs}


def _paired(frame: pd.DataFrame, first: str, second: str) -> Interval:
    return paired_difference(frame, "average_accuracy", first, second)


def _interval(value: Interval) -> str:
    return f"{100 * value.mean:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}] points, n {value.n}"


# --- command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write; 0 when every gate holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, no tuning table")
    parser.add_argument("--tune", action="store_true", help="only the tuning table")
    parser.add_argument("--cell", nargs=2, metavar=("LEARNER", "FOLDER"), help="run one cell; what C13 kills")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the figures go")
    options = parser.parse_args(arguments)
    recipe = read_recipe(HERE / "continual.yaml", {"seeds": QUICK_SEEDS} if options.quick else {})
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, one_thread():
        if options.cell:
            run_cell(_builder(recipe, Path(options.cell[1]).parent / "run"), options.cell[0], Path(options.cell[1]))
            return 0
        tuning = [] if options.quick else tuning_table(recipe, Path(scratch) / "tuning")
        print_tuning(tuning)
        if options.tune:
            return 0
        frame = run_recipe(recipe, Path(scratch) / "comparison")
        rows = comparison(frame)
        print_comparison(rows)
        gates = [check_metrics(), *gates_of(frame, rows), *_exactness(recipe, Path(scratch), 1 if options.quick else 3)]
    for gate in gates:
        print(f"{'holds' if gate.passed else 'FAILS':<7}{gate.row:<8}{gate.criterion}: {gate.seen}")
    result = {
        "command": "python benchmarks/continual.py" + (" --quick" if options.quick else ""),
        "recipe": "benchmarks/continual.yaml", "run": recipe.run, "seeds": recipe.seeds, "settings": recipe.tree["learners"],
        "rows": rows, "differences": differences(frame), "tuning_seed": TUNING_SEED, "tuning": tuning,
        "gates": [asdict(gate) for gate in gates], "seconds": round(time.perf_counter() - start), "environment": environment(),
    }  # fmt: skip
    write_whole(options.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return 0 if all(gate.passed for gate in gates) else 1


def _exactness(recipe: Recipe, scratch: Path, n_kills: int) -> Iterator[Gate]:
    builder = _builder(recipe, scratch / "run")
    yield from check_prototypes(builder.folders["backbone"], [event.task for event in builder.stream("in turn", recipe.seeds[0])])
    for learner in KILLED:
        yield check_kills(builder, learner, scratch / f"kills {learner}", n_kills)


def _builder(recipe: Recipe, folder: Path) -> Builder:
    return Builder(recipe, prepare(recipe, folder))


if __name__ == "__main__":
    sys.exit(main())
