"""A1 to A4: which cells each experiment needs, and what must hold.

Figures of several seeds and documents are means; "a - b" is paired, seed by seed and document by document.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from continual_cases import Gate
from melodi_arms import (
    ABLATED,
    ABLATED_ONCE,
    CHOSEN,
    COMPARED,
    COMPARED_ONCE,
    FULL_ATTENTION,
    FULL_RATES,
    MELODI,
    RATES,
    RECALL,
    RECALL_ONCE,
    Arm,
)  # fmt: skip
from melodi_cells import Bench, Cell
from melodi_language import BIN, ROWS, SEGMENT
from melodi_recall import CHANCE, GAPS, STAGES, UNBOUND
from melodi_sizes import Judged, Size, at_most, best_or_within_noise, compared, judged, language_cell, recall_cell

FOUR_K = 4096 // BIN
_EDGE = 8
"""Places at the beginning of a window whose loss is told apart: short-term memory is there for them."""


# --- bits per byte -------------------------------------------------------------------------------------------------------


def bits_per_byte(results: Sequence[dict[str, Any]], first: int = 0, last: int | None = None) -> np.ndarray:
    """(seeds, documents) bits per byte in the bins from `first` to `last`, which count from the end where negative."""
    rows = []
    for result in results:
        documents = zip(result["n_bytes"], result["bits"], strict=True)
        sized = [(bits, [min(BIN, n - BIN * index) for index in range(len(bits))]) for n, bits in documents]
        rows.append([sum(bits[first:last]) / sum(sizes[first:last]) for bits, sizes in sized])
    return np.array(rows)


def by_position(results: Sequence[dict[str, Any]]) -> list[float]:
    """Mean bits per byte in pieces of 4 k bytes, as far as the shortest document goes."""
    n_bins = min(len(bits) for result in results for bits in result["bits"])
    return [round(float(bits_per_byte(results, at, at + FOUR_K).mean()), 4) for at in range(0, n_bins, FOUR_K)]


def _language_row(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    whole = bits_per_byte(results)
    places = np.array([result["bits_by_place_in_window"] for result in results])
    return {
        "bits_per_byte": round(float(whole.mean()), 4),
        "seeds": whole.mean(1).round(4).tolist(), "documents": whole.mean(0).round(4).tolist(),
        "first_4k": round(float(bits_per_byte(results, 0, FOUR_K).mean()), 4),
        "last_4k": round(float(bits_per_byte(results, -FOUR_K).mean()), 4),
        "by_position": by_position(results), "first_places_of_window": round(float(places[:, :_EDGE].mean()), 4),
        "other_places_of_window": round(float(places[:, _EDGE:].mean()), 4) if places.shape[1] > _EDGE else None,
        "kv_bytes": results[0]["memory_bytes"]["kv"], "stored_bytes": results[0]["memory_bytes"]["stored"],
        "parameters": results[0]["parameters"], "steps": results[0]["steps"], "n_trained_tokens": results[0]["n_trained_tokens"],
        "cpu_seconds_per_step": [result["cpu_seconds_per_step"] for result in results],
    }  # fmt: skip


def _rows(bench: Bench, cells: dict[str, list[Cell]]) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    results = {name: [bench.result(cell) for cell in found] for name, found in cells.items()}
    return results, {name: _language_row(found) for name, found in results.items()}


def _listed(cells: dict[str, list[Cell]]) -> list[Cell]:
    return [cell for found in cells.values() for cell in found]


# --- A0 ------------------------------------------------------------------------------------------------------------------

_TUNING_SEED = 100


def _a0(size: Size) -> dict[str, dict[float, Cell]]:
    def cell(name: str, arm: Arm, rate: float) -> Cell:
        return language_cell(name, arm, _TUNING_SEED, size.tuning_steps, size, lr=rate, split="valid")

    arms = COMPARED | COMPARED_ONCE
    return {name: {rate: cell(name, arm, rate) for rate in RATES} for name, arm in arms.items()}


def a0_cells(size: Size) -> list[Cell]:
    return [cell for cells in _a0(size).values() for cell in cells.values()]


def a0(bench: Bench, size: Size) -> Judged:
    found = {
        name: {rate: round(float(bits_per_byte([bench.result(cell)]).mean()), 4) for rate, cell in cells.items()}
        for name, cells in _a0(size).items()
    }
    return {"bits_per_byte": found}, judged(size, [_best_rate(name, each) for name, each in found.items()])


def _best_rate(name: str, found: dict[float, float]) -> Gate:
    best = min(found, key=found.__getitem__)
    criterion = f"rate of A1 - best of {len(found)}: {name}, on validation documents, inside the range"
    seen = f"{CHOSEN[name]}; " + ", ".join(f"{rate} {value:.4f}" for rate, value in found.items())
    return Gate("A0", criterion, seen, best == CHOSEN[name] and min(found) < best < max(found))


# --- A1 ------------------------------------------------------------------------------------------------------------------


def _a1(size: Size) -> dict[str, list[Cell]]:
    def cell(name: str, arm: Arm, seed: int) -> Cell:
        return language_cell(name, arm, seed, size.steps, size, lr=CHOSEN[name])

    paired = {name: [cell(name, arm, seed) for seed in size.seeds] for name, arm in COMPARED.items()}
    return paired | {name: [cell(name, arm, size.seeds[0])] for name, arm in COMPARED_ONCE.items()}


def a1_cells(size: Size) -> list[Cell]:
    return sorted(_listed(_a1(size)), key=lambda cell: cell.settings["seed"])


def a1(bench: Bench, size: Size) -> Judged:
    results, rows = _rows(bench, _a1(size))
    ours = bits_per_byte(results["melodi"])
    differences = {f"melodi - {name}": compared(ours[: len(found)] - bits_per_byte(found)) for name, found in results.items()}
    del differences["melodi - melodi"]
    beside = ("transformer-xl", "transformer-xl, equal memory")
    figures = {"arms": rows, "differences": differences, "gap": {name: _gap(results["melodi"], results[name]) for name in beside}}
    return figures, judged(size, [
        at_most("A1", "MELODI - Transformer-XL: at most 0", ours - bits_per_byte(results["transformer-xl"])),
        at_most("A1", "MELODI - 1.01 x Memorizing Transformer: at most 0", ours - 1.01 * bits_per_byte(results["memorizing"])),
        _memory(rows),
    ])  # fmt: skip


def _memory(rows: dict[str, Any]) -> Gate:
    ours, theirs = rows["melodi"]["kv_bytes"], rows["memorizing"]["kv_bytes"]
    seen = f"{ours:,} of {theirs:,} bytes, 1/{theirs / ours:.2f}"
    return Gate("A1", "MELODI's memory: at most 1/8 of the Memorizing Transformer's", seen, 8 * ours <= theirs)


def _gap(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By how much a baseline is worse, along the documents, and whether that grows; over the seeds that it has."""
    ours = ours[: len(theirs)]
    first = bits_per_byte(theirs, 0, FOUR_K) - bits_per_byte(ours, 0, FOUR_K)
    last = bits_per_byte(theirs, -FOUR_K) - bits_per_byte(ours, -FOUR_K)
    return {
        "first_4k": compared(first), "last_4k": compared(last), "growth": compared(last - first),
        "by_position": (np.array(by_position(theirs)) - np.array(by_position(ours))).round(4).tolist(),
    }  # fmt: skip


def _a1_long(size: Size) -> dict[str, list[Cell]]:
    def cell(name: str, seed: int) -> Cell:
        return language_cell(name, COMPARED[name], seed, size.long_steps, size, lr=CHOSEN[name])

    return {name: [cell(name, seed) for seed in size.seeds[:2]] for name in ("melodi", "transformer-xl")}


def a1_long_cells(size: Size) -> list[Cell]:
    return _listed(_a1_long(size))


def a1_long(bench: Bench, size: Size) -> Judged:
    results, rows = _rows(bench, _a1_long(size))
    difference = compared(bits_per_byte(results["melodi"]) - bits_per_byte(results["transformer-xl"]))
    gap = _gap(results["melodi"], results["transformer-xl"])
    return {"arms": rows, "differences": {"melodi - transformer-xl": difference}, "gap": {"transformer-xl": gap}}, []


# --- A2 ------------------------------------------------------------------------------------------------------------------


def _a2(size: Size) -> dict[str, list[Cell]]:
    paired = {name: [recall_cell(name, arm, seed, size) for seed in size.seeds] for name, arm in RECALL.items()}
    return paired | {name: [recall_cell(name, arm, size.seeds[0], size)] for name, arm in RECALL_ONCE.items()}


def a2_cells(size: Size) -> list[Cell]:
    return _listed(_a2(size))


def a2(bench: Bench, size: Size) -> Judged:
    results = {name: [bench.result(cell) for cell in found] for name, found in _a2(size).items()}
    rows = {name: _recall_row(found) for name, found in results.items()}
    n_layers, least = 4, {"10": 0.9, "16": 0.85}
    beyond = [str(gap) for gap in GAPS if gap > n_layers]
    gates = [_each_seed("MELODI", results["melodi"], gap, share) for gap, share in least.items()]
    gates.append(_at_chance("Transformer-XL, G beyond its reach", results["transformer-xl"], beyond))
    gates.append(_at_chance("windowed, every G", results["windowed"], [str(gap) for gap in GAPS]))
    return {"chance": CHANCE, "unbound": round(UNBOUND, 4), "arms": rows}, judged(size, gates)


def _recall_row(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "accuracy": {str(gap): [round(result["accuracy"][str(gap)], 4) for result in results] for gap in GAPS},
        "stage_began": [result["stages"] for result in results], "steps": [result["steps"] for result in results],
        "cpu_seconds": [round(result["cpu_seconds"]) for result in results], "parameters": results[0]["parameters"],
    }  # fmt: skip


def _each_seed(name: str, results: Sequence[dict[str, Any]], gap: str, least: float) -> Gate:
    found = [result["accuracy"][gap] for result in results]
    trained = "" if int(gap) in STAGES else ", never trained"
    seen = ", ".join(f"{value:.3f}" for value in found)
    return Gate("A2", f"{name}, G = {gap}{trained}: at least {least} with every seed", seen, min(found) >= least)


def _at_chance(name: str, results: Sequence[dict[str, Any]], gaps: Sequence[str]) -> Gate:
    worst = max(result["accuracy"][gap] for result in results for gap in gaps)
    return Gate("A2", f"{name}: at most chance + 0.05", f"at most {worst:.3f}, chance {CHANCE}", worst <= CHANCE + 0.05)


# --- A3 and A4 -----------------------------------------------------------------------------------------------------------


def _short_cell(name: str, arm: Arm, seed: int, steps: int, size: Size, **others: Any) -> Cell:
    settings = {"lr": CHOSEN.get(name, CHOSEN["melodi"]), "n_test_bytes": size.n_ablation_bytes} | others
    return language_cell(name, arm, seed, steps, size, **settings)


def _a3(size: Size) -> dict[str, list[Cell]]:
    arms = {"melodi": MELODI} | ABLATED
    return {name: [_short_cell(name, arm, seed, size.ablation_steps, size) for seed in size.seeds] for name, arm in arms.items()}


def a3_cells(size: Size) -> list[Cell]:
    return _listed(_a3(size))


def a3(bench: Bench, size: Size) -> Judged:
    results, rows = _rows(bench, _a3(size))
    ours = bits_per_byte(results["melodi"])
    against = {name: ours - bits_per_byte(results[name]) for name in ABLATED}
    figures = {"arms": rows, "differences": {f"melodi - {name}": compared(found) for name, found in against.items()}}
    gates = [best_or_within_noise("A3", f"full - {name}: best or within noise", found) for name, found in against.items()]
    return figures, judged(size, gates)


def _a3_once(size: Size) -> dict[str, list[Cell]]:
    arms = {"melodi": MELODI} | ABLATED_ONCE
    return {name: [_short_cell(name, arm, size.seeds[0], size.reported_steps, size)] for name, arm in arms.items()}


def a3_once_cells(size: Size) -> list[Cell]:
    return _listed(_a3_once(size))


def a3_once(bench: Bench, size: Size) -> Judged:
    results, rows = _rows(bench, _a3_once(size))
    ours = bits_per_byte(results["melodi"])
    return {"arms": rows, "differences": {f"melodi - {name}": compared(ours - bits_per_byte(results[name])) for name in ABLATED_ONCE}}, []


def _a4(size: Size) -> dict[str, list[Cell]]:
    seed, steps = size.seeds[0], size.reported_steps
    cells = {name: [_short_cell(name, arm, seed, steps, size)] for name, arm in COMPARED.items()}
    # as many tokens a step as the others, in one row: gradients reach as far as attention does
    rows = {"rows": 1, "segment": ROWS * SEGMENT}
    full = {rate: _short_cell("full attention", FULL_ATTENTION, seed, steps, size, lr=rate, **rows) for rate in FULL_RATES}
    return cells | {f"full attention at {rate}": [cell] for rate, cell in full.items()}


def a4_cells(size: Size) -> list[Cell]:
    return _listed(_a4(size))


def a4(bench: Bench, size: Size) -> Judged:
    results, rows = _rows(bench, _a4(size))
    found = {name: bits_per_byte(each) for name, each in results.items()}
    best = min((f"full attention at {rate}" for rate in FULL_RATES), key=lambda name: found[name].mean())
    differences = {f"{name} - {best}": compared(found[name] - found[best]) for name in COMPARED}
    return {"arms": rows, "differences": differences}, []
