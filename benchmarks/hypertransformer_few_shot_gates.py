"""H1 to H7: which cells each experiment needs, and what must hold."""

from collections.abc import Sequence
from typing import Any

import hypertransformer_speed as speed
import numpy as np
from continual_cases import Gate
from hypertransformer_baselines import accuracy, pixel_nearest_neighbour
from hypertransformer_cells import Bench, Cell
from hypertransformer_few_shot import TEST_EPISODES, TEST_SEED, TEST_TASKS, evaluation, make, swapped_tasks
from hypertransformer_sizes import Judged, Size, beats, cnn_rate, judged

from remanence.generated.sampling import EpisodeSampler


def _few(arm: str, seed: int, size: Size, rates: dict[str, float], budget: Cell | None = None, **more: Any) -> Cell:
    family = arm if arm in ("proto", "maml") else "ht"
    settings = {"arm": arm, "seed": seed, "steps": size.steps, "lr": rates[family]} | cnn_rate(family, rates)
    return Cell("few-shot", settings | more, budget)


def h1_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
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


def h1(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    ours, rival = ([_few(arm, seed, size, rates) for seed in size.seeds] for arm in ("ht", "proto"))
    mean = float(_accuracies(bench, ours, "query").mean())
    figures = {"HyperTransformer": _row(bench, ours), "ProtoNet": _row(bench, rival), "1-NN on pixels": _pixels()}
    return figures, judged(size, [
        *_against(bench, ours, rival, "H1", "ProtoNet", "equal steps"),
        Gate("H1", "HyperTransformer - 85 %: transductive, at least", f"{mean:.2f} %", mean >= 85),
    ])  # fmt: skip


def _pixels() -> float:
    """Accuracy of the nearest labelled image on the test episodes, in percent."""
    tests = EpisodeSampler(evaluation(), 5, 1, queries=15, tasks=TEST_TASKS, seed=TEST_SEED)
    episodes = [tests.sample(index) for index in range(TEST_EPISODES // TEST_TASKS)]
    return round(100 * float(np.mean([accuracy(pixel_nearest_neighbour(episode), episode).mean() for episode in episodes])), 2)


def _at_equal_cpu(arm: str, size: Size, rates: dict[str, float]) -> list[Cell]:
    return [_few(arm, seed, size, rates, budget=_few("ht", seed, size, rates)) for seed in size.seeds]


def _against(bench: Bench, ours: Sequence[Cell], rival: Sequence[Cell], row: str, name: str, words: str, least: float = 0.0) -> list[Gate]:
    """Both statistics of the HyperTransformer against a rival's."""
    gates = []
    for mode, word in (("query", "transductive"), ("support", "inductive")):
        differences = (_accuracies(bench, ours, mode) - _accuracies(bench, rival, mode)).tolist()
        gates.append(beats(row, f"HyperTransformer - {name}: {word}, {words}", differences, least))
    return gates


def h2_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [*h1_cells(size, rates), *_at_equal_cpu("proto", size, rates)]


def h2(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    ours, rival = [_few("ht", seed, size, rates) for seed in size.seeds], _at_equal_cpu("proto", size, rates)
    gates = _against(bench, ours, rival, "H2", "ProtoNet", "equal CPU, not worse than -0.5", -0.5)
    return {"HyperTransformer": _row(bench, ours), "ProtoNet": _row(bench, rival)}, judged(size, gates)


CHANNELS = (4, 8, 16)


def _h3_cell(arm: str, channels: int, seed: int, size: Size, rates: dict[str, float]) -> Cell:
    return _few(arm, seed, size, rates, channels=channels, steps=size.steps // 2)


def h3_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [_h3_cell(arm, c, seed, size, rates) for c in CHANNELS for seed in size.few for arm in ("ht-delta", "ht-logits")]


def h3(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    figures: dict[str, Any] = {"head of both arms": "proto+delta"}
    differences = {}
    for c in CHANNELS:
        arms = {arm: [_h3_cell(arm, c, seed, size, rates) for seed in size.few] for arm in ("ht-delta", "ht-logits")}
        figures[f"{c} channels"] = {"all": _row(bench, arms["ht-delta"]), "logits only": _row(bench, arms["ht-logits"])}
        differences[c] = _accuracies(bench, arms["ht-delta"], "query") - _accuracies(bench, arms["ht-logits"], "query")
    x = np.log2(CHANNELS)
    slopes = [float(np.polyfit(x, [differences[c][seed] for c in CHANNELS], 1)[0]) for seed in range(len(size.few))]
    figures["differences"] = {str(c): values.round(2).tolist() for c, values in differences.items()}
    return figures, judged(size, [
        beats("H3", "small - large: what generating all layers buys (minus its slope over log2 channels)", [-slope for slope in slopes]),
        beats("H3", "all layers - logits only: 4 channels", differences[4].tolist()),
    ])  # fmt: skip


def h5_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [*h1_cells(size, rates), *_at_equal_cpu("maml", size, rates)]


def h5(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    ours, rival = [_few("ht", seed, size, rates) for seed in size.seeds], _at_equal_cpu("maml", size, rates)
    gates = _against(bench, ours, rival, "H5", "MAML", "equal CPU")
    figures = {"HyperTransformer": _row(bench, ours), "MAML": _row(bench, rival)}
    model = bench.fill(make("ht", 8, 5), ours[0])
    maml = bench.fill(make("maml", 8, 5), rival[0])
    timed, timed_gates = speed.adaptation(model, maml)
    return figures | {"adaptation": timed}, judged(size, [*gates, *timed_gates])


def _h6_cell(depth: int, seed: int, size: Size, rates: dict[str, float]) -> Cell:
    settings = {"arm": f"depth {depth}", "seed": seed, "steps": size.steps * 2 // 3, "lr": rates["cht"], "depth": depth}
    return Cell("semi", settings | cnn_rate("cht", rates))


def h6_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [_h6_cell(depth, seed, size, rates) for depth in (1, 2) for seed in size.few]


def h6(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    found = {depth: [bench.result(_h6_cell(depth, seed, size, rates)) for seed in size.few] for depth in (1, 2)}
    gains = {depth: [100 * (result["with"] - result["without"]) for result in results] for depth, results in found.items()}
    figures = {
        f"depth {depth}": {name: [round(100 * result[name], 2) for result in results] for name in ("with", "without")}
        for depth, results in found.items()
    }
    return figures | {"gains": gains}, judged(size, [
        beats("H6", "with unlabelled images - without: two encoder layers", gains[2]),
        beats("H6", "gain with two encoder layers - gain with one: unlabelled images", (np.array(gains[2]) - np.array(gains[1])).tolist()),
    ])  # fmt: skip


def h7_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [_h3_cell("ht-delta", 4, seed, size, rates) for seed in size.few]


def h7(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    cells = h7_cells(size, rates)
    found = [swapped_tasks(bench.fill(make("ht-delta", 4, 5), cell)) for cell in cells]  # type: ignore[arg-type]
    drops = [100 * (result["own"] - result["other"]) for result in found]
    return {"seeds": found}, judged(size, [beats("H7", "kernels written for the task - for another: 4 channels", drops)])


REPORTED = {
    "20-way 1-shot": {"ways": 20, "tasks": 4},
    "5-way 5-shot": {"shots": 5},
    "32 channels": {"channels": 32},
}


def reported_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    cells = [_reported_cell(arm, size, rates, more) for more in REPORTED.values() for arm in ("ht", "proto")]
    return [*cells, *(_reported_cell(arm, size, rates, {}) for arm in ("ht-written", "ht-paper"))]


def _reported_cell(arm: str, size: Size, rates: dict[str, float], more: dict[str, Any]) -> Cell:
    return _few(arm, 0, size, rates, steps=size.steps // 3, **more)


def reported(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    figures = {
        name: {arm: _row(bench, [_reported_cell(arm, size, rates, more)]) for arm in ("ht", "proto")} for name, more in REPORTED.items()
    }
    figures["generated head"] = _row(bench, [_reported_cell("ht-written", size, rates, {})])
    figures["paper's preset"] = _row(bench, [_reported_cell("ht-paper", size, rates, {})])
    return figures, []


def speed_cells(size: Size, rates: dict[str, float]) -> list[Cell]:
    return [_few("ht", 0, size, rates)]


def speed_of_batches(bench: Bench, size: Size, rates: dict[str, float]) -> Judged:
    figures, gates = speed.batches(bench.fill(make("ht", 8, 5), _few("ht", 0, size, rates)))
    return figures, judged(size, gates)
