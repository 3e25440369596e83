"""A MELODI memory attached to a frozen language model, beside low-rank adapters of as many parameters (point 3 of MELODI's acceptance).

    python benchmarks/melodi_attach.py               # about 45 CPU minutes
    python benchmarks/melodi_attach.py --quick       # very few steps, nothing judged: does everything run?

Host: a Llama of 0.64 million parameters (see `melodi_attach_cells`), pretrained on windows of 32 subwords of the training books. It reads
windows of 32 throughout. Trained on the same books, with equal tokens, steps and schedule, each at the best of five rates by two books
kept back:

    melodi      memory layers behind all four blocks, and adapters of rank 4
    adapters    low-rank adapters alone (peft), of the rank that comes nearest to as many parameters
    memory off  what is left of the first one when its memory is always empty: adapters of rank 4

Measured: nats per token of the beginning of eight books that nobody has seen. "Below": the one-sided 95 % bound of the mean paired
difference, by a bootstrap over seeds x documents, lies below 0. Figures of finished cells are kept in --runs, a killed training goes
on from its checkpoint: the same command resumes. Exit code 1 when a gate fails.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from continual_cases import Gate
from melodi_attach_cells import Bench, Cell, Result, prepare, run_cell
from melodi_sizes import bound, compared

from remanence.environment import environment
from remanence.grid import one_thread
from remanence.state import write_whole

RESULT = Path(__file__).parent / "results" / "melodi_attach.json"
ARMS, RATES, TUNING_SEED = ("melodi", "adapters", "memory off"), (2e-4, 6e-4, 2e-3, 5e-3, 1e-2), 100
_EDGE = 8
"""Places at the beginning of a window whose loss is told apart."""


class Size(NamedTuple):
    """How large the benchmark is.

    Args:
        host_steps: of pretraining, 64 windows each.
        steps, tuning_steps: of 3,328 tokens, at the chosen rate and at each candidate.
        n_characters: read of every training document.
        n_test_tokens: scored of every held-out document, from its beginning.
    """

    corpus: str
    seeds: tuple[int, ...] = (0, 1, 2)
    host_steps: int = 3000
    steps: int = 600
    tuning_steps: int = 200
    n_characters: int = 600_000
    n_test_tokens: int = 16_384


QUICK = {"seeds": (0,), "host_steps": 2, "steps": 2, "tuning_steps": 1, "n_characters": 20_000, "n_test_tokens": 512}


class Cells:
    """The cells of a run around one host."""

    def __init__(self, size: Size, host: Path, folder: Path) -> None:
        self.size = size
        path = next(folder.glob(f"documents-{host.name}-{size.n_characters}-{size.n_test_tokens}.safetensors"))
        self.shared = {"host": str(host), "documents": path.name}

    def bare(self) -> Cell:
        return Cell("bare", self.shared)

    def tuning(self, arm: str) -> list[Cell]:
        settings = {"arm": arm, "seed": TUNING_SEED, "steps": self.size.tuning_steps, "side": "valid"}
        return [Cell("trained", self.shared | settings | {"rate": rate}) for rate in RATES]

    def judged(self, arm: str, rate: float) -> list[Cell]:
        settings = {"arm": arm, "rate": rate, "steps": self.size.steps, "side": "test"}
        return [Cell("trained", self.shared | settings | {"seed": seed}) for seed in self.size.seeds]


def best_rate(bench: Bench, cells: list[Cell]) -> tuple[float, dict[str, float]]:
    """The rate with the lowest loss on the documents kept back, and all of them."""
    losses = {cell.settings["rate"]: float(np.mean(bench.result(cell)["nats"])) for cell in cells}
    return min(losses, key=losses.__getitem__), {str(rate): round(loss, 4) for rate, loss in losses.items()}


def nats(results: list[Result]) -> np.ndarray:
    """(seeds, documents)."""
    return np.array([result["nats"] for result in results])


def row(results: list[Result]) -> dict[str, Any]:
    """An arm as the table shows it."""
    found, places = nats(results), np.array([result["by_place"] for result in results])
    return {
        "nats_per_token": round(float(found.mean()), 4), "seeds": found.mean(1).round(4).tolist(),
        "documents": found.mean(0).round(4).tolist(), "first_places_of_window": round(float(places[:, :_EDGE].mean()), 4),
        "other_places_of_window": round(float(places[:, _EDGE:].mean()), 4),
        **{name: results[0][name] for name in ("parameters", "kv_bytes", "stored_bytes") if name in results[0]},
        "cpu_seconds_per_step": [result.get("cpu_seconds_per_step") for result in results],
    }  # fmt: skip


def below(criterion: str, differences: np.ndarray) -> Gate:
    """A gate: the upper one-sided 95 % bound of the mean difference lies below 0."""
    high = bound(differences, 0.95)
    n_seeds, n_documents = differences.shape
    seen = f"{differences.mean():+.4f} nats per token, upper bound {high:+.4f} ({n_seeds} seeds x {n_documents} documents)"
    return Gate("attach", criterion, seen, bool(high < 0))


def judge(bench: Bench, cells: Cells, rates: dict[str, float]) -> tuple[dict[str, Any], list[Gate]]:
    """The table and its gates."""
    results = {arm: [bench.result(cell) for cell in cells.judged(arm, rate)] for arm, rate in rates.items()}
    emptied = [result["emptied"] for result in results["melodi"]]
    plain = bench.result(cells.bare())
    rows = {"bare host": row([plain])} | {arm: row(found) for arm, found in results.items()} | {"melodi, emptied in the test": row(emptied)}
    ours = nats(results["melodi"])
    others = {"adapters": nats(results["adapters"]), "memory off": nats(results["memory off"]), "emptied in the test": nats(emptied)}
    differences = {f"melodi - {name}": compared(ours - found) for name, found in (others | {"bare host": nats([plain])}).items()}
    n_ours, n_theirs = rows["melodi"]["parameters"], rows["adapters"]["parameters"]
    is_equal, is_fair = plain["is_bare_at_attach"], abs(n_ours - n_theirs) <= 0.05 * n_ours
    gates = [
        Gate("attach", "melodi - bare host: equal bit for bit at attach", str(is_equal), is_equal),
        Gate("attach", "melodi - adapters, parameters: within 5 %", f"{n_ours:,} and {n_theirs:,}", is_fair),
        below("melodi - adapters: below 0", ours - others["adapters"]),
        below("melodi - memory off: below 0", ours - others["memory off"]),
        below("melodi - bare host, untrained: below 0", ours - nats([plain])),
    ]
    return {"arms": rows, "differences": differences}, gates


def run(size: Size, bench: Bench, host: Path) -> tuple[dict[str, Any], list[Gate]]:
    """Choose rates, train what is missing, judge."""
    cells = Cells(size, host, bench.folder)
    tuning = {arm: cells.tuning(arm) for arm in ARMS}
    bench.run([cells.bare(), *(cell for found in tuning.values() for cell in found)], run_cell)
    chosen = {arm: best_rate(bench, found) for arm, found in tuning.items()}
    rates = {arm: rate for arm, (rate, _) in chosen.items()}
    bench.run([cell for arm, rate in rates.items() for cell in cells.judged(arm, rate)], run_cell)
    figures, gates = judge(bench, cells, rates)
    report = json.loads((host / "pretraining.json").read_text(encoding="utf-8"))
    return {"host": report, "rates": rates, "tuning": {arm: losses for arm, (_, losses) in chosen.items()}} | figures, gates


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write; 0 when every gate holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, very few steps, nothing judged")
    parser.add_argument("--corpus", choices=("books", "python"), default="books", help="what is read (default: books)")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/melodi-attach"), help="where finished cells and checkpoints are kept")
    parser.add_argument("--out", type=Path, help="where the figures go; with --quick nowhere by default")
    options = parser.parse_args(arguments)
    size = Size(options.corpus, **(QUICK if options.quick else {}))
    bench = Bench(options.runs / ("quick" if options.quick else "full"), options.jobs)
    with one_thread():
        host = prepare(bench.folder, size.corpus, size.host_steps, size.n_characters, size.n_test_tokens)
    figures, gates = run(size, bench, host)
    gates = [] if options.quick else gates
    for name, found in figures["arms"].items():
        print(f"{name:<28}{found['nats_per_token']:.4f} nats per token, {found.get('parameters', 0):>7,} parameters")
    for gate in gates:
        print(f"{'holds' if gate.passed else 'FAILS':<7}{gate.criterion}: {gate.seen}")
    out = options.out or (None if options.quick else RESULT)
    if out is not None:
        flags = (" --quick" if options.quick else "") + ("" if size.corpus == "books" else f" --corpus {size.corpus}")
        result = {
            "command": f"python benchmarks/melodi_attach.py{flags}", "environment": environment(), "threads": 1, "size": size._asdict(),
            "gates": [asdict(gate) for gate in gates], **figures,
        }  # fmt: skip
        write_whole(out, json.dumps(result, indent=1, allow_nan=False) + "\n")
        print(f"figures in {out}")
    return 0 if all(gate.passed for gate in gates) else 1


if __name__ == "__main__":
    sys.exit(main())
