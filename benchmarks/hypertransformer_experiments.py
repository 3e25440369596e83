"""The experiments H1 to H7 and C1 to C8: which cells each needs, and what must hold.

Every statement compares arms of equal seed, and so of equal training episodes, on the same test episodes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hypertransformer_speed as speed
import numpy as np
from continual_cases import Gate
from hypertransformer_baselines import pixel_nearest_neighbour
from hypertransformer_cells import Bench, Cell, Result
from hypertransformer_continual import make as make_stream
from hypertransformer_continual import orders
from hypertransformer_few_shot import make, swapped_tasks

Judged = tuple[dict[str, Any], list[Gate]]
TUNING_SEED = 100
RATES = (1e-3, 2e-3, 4e-3, 8e-3)


class Size(NamedTuple):
    """How large the benchmark is."""

    seeds: tuple[int, ...]
    few: tuple[int, ...]
    steps: int
    tuning_steps: int
    stream_steps: int
    judged: bool = True


FULL = Size((0, 1, 2, 3, 4), (0, 1, 2), 1200, 300, 400)
QUICK = Size((0,), (0,), 60, 20, 20, judged=False)


class Experiment(NamedTuple):
    about: str
    cells: Callable[[Size, dict[str, float]], list[Cell]]
    judge: Callable[[Bench, Size, dict[str, float]], Judged]


# --- learning rates ----------------------------------------------------------------------------------------------------

FEW_SHOT_ARMS = ("ht", "proto", "maml", "maml-gentle")


def tuning_cells(size: Size) -> list[Cell]:
    """Short runs on held-out background classes: four arms, four rates."""
    return [_tuning(arm, lr, size) for arm in FEW_SHOT_ARMS for lr in RATES]


def _tuning(arm: str, lr: float, size: Size) -> Cell:
    return Cell("few-shot", {"arm": arm, "seed": TUNING_SEED, "steps": size.tuning_steps, "lr": lr, "tuning": True, "episodes": 200})


def tuned(bench: Bench, size: Size) -> dict[str, float]:
    """The best rate of every arm (transductive accuracy); of MAML also the better of two inner rates, under "maml arm" as 0 or 1."""
    found = {}
    score = {}
    for arm in FEW_SHOT_ARMS:
        scores = {lr: bench.result(_tuning(arm, lr, size))["accuracy"]["query"] for lr in RATES}
        found[arm] = max(scores, key=lambda lr: scores[lr])
        score[arm] = scores[found[arm]]
    found["maml arm"] = float(score["maml-gentle"] > score["maml"])
    return found


def maml_arm(rates: dict[str, float]) -> str:
    return FEW_SHOT_ARMS[2 + int(rates["maml arm"])]


# --- statistics ----------------------------------------------------------------------------------------------------------


def lower_bound(differences: Sequence[float], n_resamples: int = 10_000) -> float:
    """One-sided 95 % bootstrap bound of the mean over seeds."""
    values = np.asarray(differences, dtype=np.float64)
    draws = np.random.default_rng(0).integers(len(values), size=(n_resamples, len(values)))
    return float(np.quantile(values[draws].mean(1), 0.05))


def beats(row: str, criterion: str, differences: Sequence[float], least: float = 0.0, unit: str = "points") -> Gate:
    """A gate: the lower bound of the mean difference lies above `least`."""
    bound = lower_bound(differences)
    seen = f"{np.mean(differences):+.2f} {unit}, lower bound {bound:+.2f} ({len(differences)} seeds: {', '.join(f'{d:+.2f}' for d in differences)})"
    return Gate(row, criterion, seen, bool(bound > least))


def judged(size: Size, gates: list[Gate]) -> list[Gate]:
    return gates if size.judged else []


# --- H: few shots --------------------------------------------------------------------------------------------------------


def _few(arm: str, seed: int, size: Size, rates: dict[str, float], budget: Cell | None = None, **more: Any) -> Cell:
    rate = rates["proto" if arm == "proto" else arm if arm.startswith("maml") else "ht"]
    return Cell("few-shot", {"arm": arm, "seed": seed, "steps": size.steps, "lr": rate} | more, budget)


def _h1_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [_few(arm, seed, size, rates) for seed in size.seeds for arm in ("ht", "proto")]


def _accuracies(bench: Bench, cells: Sequence[Cell], mode: str) -> np.ndarray:
    return 100 * np.array([bench.result(cell)["accuracy"][mode] for cell in cells])


def _row(bench: Bench, cells: Sequence[Cell]) -> dict[str, Any]:
    results = [bench.result(cell) for cell in cells]
    return {
        "transductive": _accuracies(bench, cells, "query").round(2).tolist(),
        "inductive": _accuracies(bench, cells, "support").round(2).tolist(),
        "steps": [result["steps"] for result in results], "cpu_seconds": [round(result["cpu_seconds"], 1) for result in results],
        "parameters": results[0]["parameters"],
    }  # fmt: skip


def _h1(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    ours, rival = ([_few(arm, seed, size, rates) for seed in size.seeds] for arm in ("ht", "proto"))
    differences = {mode: _accuracies(bench, ours, mode) - _accuracies(bench, rival, mode) for mode in ("query", "support")}
    mean = float(_accuracies(bench, ours, "query").mean())
    figures = {"HyperTransformer": _row(bench, ours), "ProtoNet": _row(bench, rival), "1-NN on pixels": _pixels()}
    return figures, judged(size, [
        beats("H1", "transductive, equal steps - rival: ProtoNet", differences["query"].tolist()),
        beats("H1", "inductive, equal steps - rival: ProtoNet", differences["support"].tolist()),
        Gate("H1", "HyperTransformer at 85 % or more, transductive", f"{mean:.2f} %", mean >= 85),
    ])  # fmt: skip


def _pixels() -> float:
    """Accuracy of the nearest labelled image on the test episodes, in percent."""
    from hypertransformer_baselines import accuracy
    from hypertransformer_few_shot import TEST_EPISODES, TEST_SEED, TEST_TASKS, evaluation

    from remanence.generated.sampling import EpisodeSampler

    tests = EpisodeSampler(evaluation(), 5, 1, queries=15, tasks=TEST_TASKS, seed=TEST_SEED)
    episodes = [tests.sample(index) for index in range(TEST_EPISODES // TEST_TASKS)]
    return round(100 * float(np.mean([accuracy(pixel_nearest_neighbour(episode), episode).mean() for episode in episodes])), 2)


def _h2_rivals(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [_few("proto", seed, size, rates, budget=_few("ht", seed, size, rates)) for seed in size.seeds]


def _h2(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    ours, rival = [_few("ht", seed, size, rates) for seed in size.seeds], _h2_rivals(size, rates)
    gates = []
    for mode, word in (("query", "transductive"), ("support", "inductive")):
        differences = (_accuracies(bench, ours, mode) - _accuracies(bench, rival, mode)).tolist()
        gates.append(beats("H2", f"{word}, equal CPU: not worse than -0.5 - rival: ProtoNet", differences, least=-0.5))
    return {"HyperTransformer": _row(bench, ours), "ProtoNet": _row(bench, rival)}, judged(size, gates)


CHANNELS = (4, 8, 16)


def _h3_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [_few(arm, seed, size, rates, channels=c) for c in CHANNELS for seed in size.few for arm in ("ht-delta", "ht-logits")]


def _h3(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    figures: dict[str, Any] = {"head of both arms": "proto+delta"}
    differences = {}
    for c in CHANNELS:
        arms = {arm: [_few(arm, seed, size, rates, channels=c) for seed in size.few] for arm in ("ht-delta", "ht-logits")}
        figures[f"{c} channels"] = {"all": _row(bench, arms["ht-delta"]), "logits only": _row(bench, arms["ht-logits"])}
        differences[c] = _accuracies(bench, arms["ht-delta"], "query") - _accuracies(bench, arms["ht-logits"], "query")
    x = np.log2(CHANNELS)
    slopes = [float(np.polyfit(x, [differences[c][seed] for c in CHANNELS], 1)[0]) for seed in range(len(size.few))]
    figures["differences"] = {str(c): values.round(2).tolist() for c, values in differences.items()}
    return figures, judged(size, [
        beats("H3", "what generating all layers buys falls with the channels (minus the slope over log2)", [-slope for slope in slopes]),
        beats("H3", "4 channels, all layers - rival: logits only", differences[4].tolist()),
    ])  # fmt: skip


def _h5_rivals(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [_few(maml_arm(rates), seed, size, rates, budget=_few("ht", seed, size, rates)) for seed in size.seeds]


def _h5(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    ours, rival = [_few("ht", seed, size, rates) for seed in size.seeds], _h5_rivals(size, rates)
    gates = []
    for mode, word in (("query", "transductive"), ("support", "inductive")):
        differences = (_accuracies(bench, ours, mode) - _accuracies(bench, rival, mode)).tolist()
        gates.append(beats("H5", f"{word}, equal CPU - rival: MAML", differences))
    figures = {"HyperTransformer": _row(bench, ours), "MAML": _row(bench, rival)}
    model = bench.fill(make("ht", 8, 5), ours[0])
    maml = bench.fill(make(maml_arm(rates), 8, 5), rival[0])
    timed, timed_gates = speed.adaptation(model, maml)
    return figures | {"adaptation": timed}, judged(size, [*gates, *timed_gates])


def _h6_cell(depth: int, seed: int, size: Size, rates: dict[str, float]) -> Cell:
    return Cell("semi", {"arm": f"depth {depth}", "seed": seed, "steps": 2 * size.steps, "lr": 2e-3, "depth": depth})


def _h6(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    found = {depth: [bench.result(_h6_cell(depth, seed, size, rates)) for seed in size.few] for depth in (1, 2)}
    gains = {depth: [100 * (result["with"] - result["without"]) for result in results] for depth, results in found.items()}
    figures = {
        f"depth {depth}": {name: [round(100 * result[name], 2) for result in results] for name in ("with", "without")}
        for depth, results in found.items()
    }
    return figures | {"gains": gains}, judged(size, [
        beats("H6", "two encoder layers: gain from 4 unlabelled images a class", gains[2]),
        beats("H6", "gain with two encoder layers - rival: gain with one", (np.array(gains[2]) - np.array(gains[1])).tolist()),
    ])  # fmt: skip


def _h7_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [_few("ht-delta", seed, size, rates, channels=4) for seed in size.few]


def _h7(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    cells = _h7_cells(size, rates)
    found = [swapped_tasks(bench.fill(make("ht-delta", 4, 5), cell)) for cell in cells]  # type: ignore[arg-type]
    drops = [100 * (result["own"] - result["other"]) for result in found]
    return {"seeds": found}, judged(size, [beats("H7", "4 channels: kernels written for the task - rival: for another task", drops)])


REPORTED = {
    "20-way 1-shot": {"ways": 20, "tasks": 4},
    "5-way 5-shot": {"shots": 5},
    "32 channels": {"channels": 32},
}


def _reported_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    cells = [_reported_cell(arm, size, rates, more) for more in REPORTED.values() for arm in ("ht", "proto")]
    return [*cells, *(_reported_cell(arm, size, rates, {}) for arm in ("ht-written", "ht-paper"))]


def _reported_cell(arm: str, size: Size, rates: dict[str, float], more: dict[str, Any]) -> Cell:
    return _few(arm, 0, size, rates, steps=size.steps // 2, **more)


def _reported(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    figures = {
        name: {arm: _row(bench, [_reported_cell(arm, size, rates, more)]) for arm in ("ht", "proto")} for name, more in REPORTED.items()
    }
    figures["generated head"] = _row(bench, [_reported_cell("ht-written", size, rates, {})])
    figures["paper's preset"] = _row(bench, [_reported_cell("ht-paper", size, rates, {})])
    return figures, []


# --- C: a sequence of tasks ------------------------------------------------------------------------------------------------


def _stream(arm: str, seed: int, size: Size, rates: dict[str, float], budget: Cell | None = None, **more: Any) -> Cell:
    rate = rates["proto"] if arm == "constpn" else rates["ht"]
    return Cell("stream", {"arm": arm, "seed": seed, "steps": size.stream_steps, "lr": rate, **more}, budget)


def _streams(size: Size, rates: dict[str, float], arms: Sequence[str], seeds: Sequence[int], **more: Any) -> dict[str, list[Cell]]:
    """Cells of every arm; rivals may use the CPU seconds of the continual HyperTransformer of the same seed."""
    ours = [_stream("cht", seed, size, rates, **more) for seed in seeds]
    rivals = {arm: [_stream(arm, seed, size, rates, budget, **more) for seed, budget in zip(seeds, ours, strict=True)] for arm in arms}
    return {"cht": ours} | rivals


def _stream_cells(arms: Sequence[str]) -> Callable[[Size, dict[str, float]], list[Cell]]:
    return lambda size, rates: [cell for cells in _streams(size, rates, arms, size.seeds).values() for cell in cells]


def _matrix(bench: Bench, cells: Sequence[Cell], name: str) -> np.ndarray:
    """(seeds, T, T) accuracies in percent."""
    return 100 * np.array([bench.result(cell)[name] for cell in cells], dtype=np.float64)


def _final(bench: Bench, cells: Sequence[Cell], n_tasks: int) -> np.ndarray:
    """(seeds,) class-incremental accuracy over all tasks after `n_tasks` of them."""
    return _matrix(bench, cells, "class")[:, n_tasks - 1, :n_tasks].mean(1)


def _c2(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    ours = _streams(size, rates, (), size.seeds)["cht"]
    accuracy = _matrix(bench, ours, "task")
    figures: dict[str, Any] = {"growth": bench.result(ours[0])["growth"]}
    gates = []
    for n_tasks in (3, 5):
        learned = np.diagonal(accuracy, axis1=1, axis2=2)[:, : n_tasks - 1]
        kept = accuracy[:, n_tasks - 1, : n_tasks - 1]
        figures[f"T={n_tasks}"] = {"when learned": learned.mean(0).round(2).tolist(), "at the end": kept.mean(0).round(2).tolist()}
        gates.append(beats("C2", f"T={n_tasks}, task-incremental: at the end minus when learned, above -2", (kept - learned).mean(1).tolist(), -2.0))
    return figures, judged(size, gates)


def _c3(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    cells = _streams(size, rates, ("constpn", "nocarry"), size.seeds)
    figures = {
        arm: {f"T={t}": _final(bench, each, t).round(2).tolist() for t in (3, 5)}
        | {"steps": [bench.result(cell)["steps"] for cell in each], "cpu_seconds": [round(bench.result(cell)["cpu_seconds"], 1) for cell in each]}
        for arm, each in cells.items()
    }
    difference = _final(bench, cells["cht"], 3) - _final(bench, cells["constpn"], 3)
    figures["CHT - NoCarry (C4a, reported)"] = {
        f"T={t}": (_final(bench, cells["cht"], t) - _final(bench, cells["nocarry"], t)).round(2).tolist() for t in (3, 5)
    }
    return figures, judged(size, [beats("C3", "class-incremental, T=3, equal CPU - rival: ConstPN", difference.tolist())])


MULTI = {"multi": True, "test_tasks": 3}


def _c4_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [cell for cells in _streams(size, rates, ("nocarry",), size.few, **MULTI).values() for cell in cells]


def _c4(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    cells = _streams(size, rates, ("nocarry",), size.few, **MULTI)
    figures = {arm: _final(bench, each, 3).round(2).tolist() for arm, each in cells.items()}
    difference = _final(bench, cells["cht"], 3) - _final(bench, cells["nocarry"], 3)
    return figures, judged(size, [beats("C4b", "three domains, class-incremental - rival: NoCarry", difference.tolist())])


def _mini(arm: str, seed: int, size: Size, rates: dict[str, float]) -> Cell:
    budget = None if arm == "cht" else _mini("cht", seed, size, rates)
    return Cell("minibatch", {"arm": arm, "seed": seed, "steps": size.stream_steps, "lr": rates["ht"]}, budget)


def _c5(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    found = {arm: 100 * np.array([bench.result(_mini(arm, seed, size, rates))["accuracy"] for seed in size.seeds]) for arm in ("cht", "nocarry", "merged")}
    figures = {arm: values.round(2).tolist() for arm, values in found.items()}
    figures["gap to all shots at once"] = (found["merged"][:, -1] - found["cht"][:, -1]).round(2).tolist()
    gain = found["cht"][:, -1] - found["cht"][:, 0]
    return figures, judged(size, [beats("C5", "after the fourth mini-batch minus after the first", gain.tolist())])


def _c6_arms(size: Size, rates: dict[str, float]) -> dict[str, list[Cell]]:
    return {
        "T=3": [_stream("cht", seed, size, rates) for seed in size.few],
        "T~1..10": [_stream("cht", seed, size, rates, n_tasks=(1, 10)) for seed in size.few],
    }


def _c6(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    arms = _c6_arms(size, rates)
    short, long = (_final(bench, arms[name], 10) for name in ("T=3", "T~1..10"))
    figures = {"T=3": short.round(2).tolist(), "T~1..10": long.round(2).tolist(), "growth over 10 tasks": bench.result(arms["T=3"][0])["growth"]}
    gate = beats("C6", "T=10: trained on 3 tasks minus trained on 1 to 10, above -3", (short - long).tolist(), -3.0)
    return figures, judged(size, [gate])


def _c7(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    cell = _stream("cht", 0, size, rates)
    figures, gates = speed.steps_of_a_stream(bench.fill(make_stream("cht"), cell))
    return figures, judged(size, gates)


def _c8(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    cells = _streams(size, rates, ("nocarry",), size.seeds)
    found = {arm: [100 * np.array(orders(bench.fill(make_stream(arm), cell))) for cell in each] for arm, each in cells.items()}
    return {arm: {"standard deviation over 5 orders": [round(float(v.std(ddof=1)), 3) for v in each], "accuracies of seed 0": each[0].round(2).tolist()} for arm, each in found.items()}, []


def _head(arm: str, seed: int, size: Size) -> Cell:
    return Cell("head", {"arm": arm, "seed": seed, "steps": size.steps + size.steps // 4, "lr": 2e-3})


def _c1(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    found = {arm: [bench.result(_head(arm, seed, size)) for seed in size.seeds] for arm in ("cht", "nocarry")}
    figures = {arm: {name: [round(100 * result[name], 2) for result in each] for name in ("first", "second", "control")} for arm, each in found.items()}
    gain = [100 * (ours["first"] - rival["first"]) for ours, rival in zip(found["cht"], found["nocarry"], strict=True)]
    control = max(figures["cht"]["control"])
    return figures, judged(size, [
        beats("C1", "classes of the first step, answered by the weights after the second, above +20 - rival: NoCarry", gain, 20.0),
        Gate("C1", "control: other classes shown in the first step, at most 55 %", f"{control:.1f} % at most", control <= 55),
    ])  # fmt: skip


EXPERIMENTS: dict[str, Experiment] = {
    "H1": Experiment("5-way 1-shot, 8 channels, equal steps", _h1_cells, _h1),
    "C1": Experiment("memory in the weights alone", lambda s, r: [_head(arm, seed, s) for seed in s.seeds for arm in ("cht", "nocarry")], _c1),
    "C2": Experiment("no forgetting, task-incremental", _stream_cells(()), _c2),
    "C3": Experiment("class-incremental, against a constant embedding; C4a", _stream_cells(("constpn", "nocarry")), _c3),
    "H3": Experiment("all layers against logits only, by channels", _h3_cells, _h3),
    "H2": Experiment("5-way 1-shot, 8 channels, equal CPU time", lambda s, r: [*_h1_cells(s, r), *_h2_rivals(s, r)], _h2),
    "H5": Experiment("against MAML, five second-order steps, equal CPU time; adaptation timed", lambda s, r: [*_h1_cells(s, r), *_h5_rivals(s, r)], _h5),
    "H7": Experiment("do the kernels depend on the task?", _h7_cells, _h7),
    "C4b": Experiment("recurrence over three domains", _c4_cells, _c4),
    "C5": Experiment("mini-batches of one task", lambda s, r: [_mini(arm, seed, s, r) for arm in ("cht", "nocarry", "merged") for seed in s.seeds], _c5),
    "C6": Experiment("ten tasks after training on three", lambda s, r: [cell for cells in _c6_arms(s, r).values() for cell in cells], _c6),
    "C7": Experiment("cost of a step", lambda s, r: [_stream("cht", 0, s, r)], _c7),
    "C8": Experiment("order of the tasks", _stream_cells(("nocarry",)), _c8),
    "H6": Experiment("unlabelled images", lambda s, r: [_h6_cell(depth, seed, s, r) for depth in (1, 2) for seed in s.few], _h6),
    "speed": Experiment("batches of tasks, and what compiling buys", lambda s, r: [_few("ht", 0, s, r)], lambda b, s, r: _speed(b, s, r)),
    "reported": Experiment("one seed, not gated: 20 ways, 5 shots, 32 channels, generated heads", _reported_cells, _reported),
}


def _speed(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    figures, gates = speed.batches(bench.fill(make("ht", 8, 5), _few("ht", 0, size, rates)))
    return figures, judged(size, gates)


__all__ = ["EXPERIMENTS", "FULL", "QUICK", "Result", "Size", "tuned", "tuning_cells"]
