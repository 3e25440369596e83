"""C1 to C8: which cells each experiment needs, and what must hold."""

from collections.abc import Callable, Sequence
from typing import Any

import hypertransformer_speed as speed
import numpy as np
from continual_cases import Gate
from hypertransformer_cells import Bench, Cell
from hypertransformer_continual import fine_tuned, kept_apart, orders
from hypertransformer_continual import make as make_stream
from hypertransformer_sizes import Judged, Size, beats, cnn_rate, judged


def _stream(arm: str, seed: int, size: Size, rates: dict[str, float], budget: Cell | None = None, **more: Any) -> Cell:
    family = "constpn" if arm == "constpn" else "cht"
    settings = {"arm": arm, "seed": seed, "steps": size.stream_steps, "lr": rates[family]} | cnn_rate(family, rates)
    return Cell("stream", settings | more, budget)


def _streams(size: Size, rates: dict[str, float], arms: Sequence[str], seeds: Sequence[int], **more: Any) -> dict[str, list[Cell]]:
    """Cells of every arm; rivals may use the CPU seconds of the continual HyperTransformer of the same seed."""
    ours = [_stream("cht", seed, size, rates, **more) for seed in seeds]
    rivals = {arm: [_stream(arm, seed, size, rates, budget, **more) for seed, budget in zip(seeds, ours, strict=True)] for arm in arms}
    return {"cht": ours} | rivals


def stream_cells(arms: Sequence[str]) -> Callable[[Size, dict[str, float]], list[Cell]]:
    return lambda size, rates: [cell for cells in _streams(size, rates, arms, size.seeds).values() for cell in cells]


def _matrix(bench: Bench, cells: Sequence[Cell], name: str) -> np.ndarray:
    """(seeds, T, T) accuracies in percent."""
    return 100 * np.array([bench.result(cell)[name] for cell in cells], dtype=np.float64)


def _final(bench: Bench, cells: Sequence[Cell], n_tasks: int) -> np.ndarray:
    """(seeds,) class-incremental accuracy over all tasks after `n_tasks` of them."""
    return _matrix(bench, cells, "class")[:, n_tasks - 1, :n_tasks].mean(1)


def c2(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    ours = _streams(size, rates, (), size.seeds)["cht"]
    accuracy = _matrix(bench, ours, "task")
    figures: dict[str, Any] = {"growth": bench.result(ours[0])["growth"]}
    gates = []
    for n_tasks in (3, 5):
        learned = np.diagonal(accuracy, axis1=1, axis2=2)[:, : n_tasks - 1]
        kept = accuracy[:, n_tasks - 1, : n_tasks - 1]
        figures[f"T={n_tasks}"] = {"when learned": learned.mean(0).round(2).tolist(), "at the end": kept.mean(0).round(2).tolist()}
        criterion = f"at the end - when learned: T={n_tasks}, task-incremental, above -2"
        gates.append(beats("C2", criterion, (kept - learned).mean(1).tolist(), -2.0))
    return figures, judged(size, gates)


def c3_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    merged = [_merged(seed, size, rates) for seed in size.few]
    return [*stream_cells(("constpn", "nocarry"))(size, rates), *merged]


def _merged(seed: int, size: Size, rates: dict[str, float]) -> Cell:
    settings = {"arm": "merged", "seed": seed, "steps": size.stream_steps, "lr": rates["cht"]} | cnn_rate("cht", rates)
    return Cell("merged", settings, _stream("cht", seed, size, rates))


def c3(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    cells = _streams(size, rates, ("constpn", "nocarry"), size.seeds)
    figures = {
        arm: {f"T={t}": _final(bench, each, t).round(2).tolist() for t in (3, 5)}
        | {name: [round(bench.result(cell)[name], 1) for cell in each] for name in ("steps", "cpu_seconds")}
        for arm, each in cells.items()
    }
    difference = _final(bench, cells["cht"], 3) - _final(bench, cells["constpn"], 3)
    figures["CHT - NoCarry (C4a, reported)"] = {
        f"T={t}": (_final(bench, cells["cht"], t) - _final(bench, cells["nocarry"], t)).round(2).tolist() for t in (3, 5)
    }
    figures["MergedHT, T=3"] = [round(100 * bench.result(_merged(seed, size, rates))["final"], 2) for seed in size.few]
    figures["MultiHT, each of five tasks among its own classes"] = [
        round(100 * value, 2) for value in kept_apart(bench.fill(make_stream("nocarry"), cells["nocarry"][0]))
    ]
    embedding = bench.fill(make_stream("constpn"), cells["constpn"][0])
    figures["fine-tuning from the constant embedding, T=3"] = {
        word: fine_tuned(embedding, replay) for word, replay in (("alone", False), ("with replay of all supports", True))
    }
    return figures, judged(size, [beats("C3", "CHT - ConstPN: class-incremental, T=3, equal CPU", difference.tolist())])


MULTI = {"multi": True, "test_tasks": 3}


def c4_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [cell for cells in _streams(size, rates, ("nocarry",), size.few, **MULTI).values() for cell in cells]


def c4(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    cells = _streams(size, rates, ("nocarry",), size.few, **MULTI)
    figures = {arm: _final(bench, each, 3).round(2).tolist() for arm, each in cells.items()}
    difference = _final(bench, cells["cht"], 3) - _final(bench, cells["nocarry"], 3)
    return figures, judged(size, [beats("C4b", "CHT - NoCarry: three domains, class-incremental", difference.tolist())])


MINI_ARMS = ("cht", "merged")
"""The first is judged, over all seeds; the other is reported over a few."""


def _mini(arm: str, seed: int, size: Size, rates: dict[str, float]) -> Cell:
    budget = None if arm == "cht" else _mini("cht", seed, size, rates)
    return Cell("minibatch", {"arm": arm, "seed": seed, "steps": size.stream_steps, "lr": rates["cht"]} | cnn_rate("cht", rates), budget)


def c5_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [_mini(arm, seed, size, rates) for arm in MINI_ARMS for seed in (size.seeds if arm == "cht" else size.few)]


def c5(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    found = {
        arm: 100 * np.array([bench.result(cell)["accuracy"] for cell in c5_cells(size, rates) if cell.settings["arm"] == arm])
        for arm in MINI_ARMS
    }
    figures = {arm: values.round(2).tolist() for arm, values in found.items()}
    figures["gap to all shots at once"] = (found["merged"][:, -1] - found["cht"][: len(size.few), -1]).round(2).tolist()
    gain = found["cht"][:, -1] - found["cht"][:, 0]
    return figures, judged(size, [beats("C5", "after the fourth mini-batch - after the first: accuracy", gain.tolist())])


def _c6_arms(size: Size, rates: dict[str, float]) -> dict[str, list[Cell]]:
    return {
        "T=3": [_stream("cht", seed, size, rates) for seed in size.few],
        "T~1..10": [_stream("cht", seed, size, rates, n_tasks=(1, 10)) for seed in size.few],
    }


def c6_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [cell for cells in _c6_arms(size, rates).values() for cell in cells]


def c6(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    arms = _c6_arms(size, rates)
    short, long = (_final(bench, arms[name], 10) for name in ("T=3", "T~1..10"))
    growth = bench.result(arms["T=3"][0])["growth"]
    figures = {"T=3": short.round(2).tolist(), "T~1..10": long.round(2).tolist(), "growth over 10 tasks": growth}
    gate = beats("C6", "trained on 3 tasks - trained on 1 to 10: T=10, above -3", (short - long).tolist(), -3.0)
    return figures, judged(size, [gate])


def c7_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [_stream("cht", 0, size, rates)]


def c7(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    cell = _stream("cht", 0, size, rates)
    figures, gates = speed.steps_of_a_stream(bench.fill(make_stream("cht"), cell))
    return figures, judged(size, gates)


def c8(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    cells = _streams(size, rates, ("nocarry",), size.seeds)
    found = {arm: [100 * np.array(orders(bench.fill(make_stream(arm), cell))) for cell in each] for arm, each in cells.items()}
    figures = {
        arm: {"standard deviation over 5 orders": [round(float(v.std(ddof=1)), 3) for v in each], "seed 0": each[0].round(2).tolist()}
        for arm, each in found.items()
    }
    return figures, []


def _head(arm: str, seed: int, size: Size, rates: dict[str, float]) -> Cell:
    return Cell("head", {"arm": arm, "seed": seed, "steps": size.steps // 3, "lr": rates["cht"]} | cnn_rate("cht", rates))


def c1_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [_head(arm, seed, size, rates) for seed in size.seeds for arm in ("cht", "nocarry")]


def c1(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    found = {arm: [bench.result(_head(arm, seed, size, rates)) for seed in size.seeds] for arm in ("cht", "nocarry")}
    figures = {
        arm: {name: [round(100 * result[name], 2) for result in each] for name in ("first", "second", "control")}
        for arm, each in found.items()
    }
    gain = [100 * (ours["first"] - rival["first"]) for ours, rival in zip(found["cht"], found["nocarry"], strict=True)]
    control = max(figures["cht"]["control"])
    return figures, judged(size, [
        beats("C1", "CHT - NoCarry: classes of the first step, answered by the weights after the second, above +20", gain, 20.0),
        Gate("C1", "control - chance: other classes shown in the first step, at most 55 %", f"{control:.1f} % at most", control <= 55),
    ])  # fmt: skip
