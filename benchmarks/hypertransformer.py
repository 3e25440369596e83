"""Acceptance of the HyperTransformer (H1 to H7) and of its continual form (C1 to C8).

    python benchmarks/hypertransformer.py                    # all of it; about an hour and a half on two cores
    python benchmarks/hypertransformer.py --quick            # one seed, few steps, nothing judged: does everything run?
    python benchmarks/hypertransformer.py --only H1 C2       # these experiments anew; the others stay as they are in the JSON

Data: Omniglot, 28 x 28, official background split to train on (four turns of every class), evaluation split untouched to test on,
found through REMANENCE_DATA. Every trained model is kept in --runs as soon as it is done, so that the same command resumes. Learning
rates are chosen for every arm on background alphabets that are held out, by a seed that is used nowhere else. "A beats B": the one-sided
95 % bootstrap bound, over seeds, of the mean paired difference lies above 0. Exit code 1 when a gate fails; --quick writes only where
--out says.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hypertransformer_cells import Bench, run_cell
from hypertransformer_experiments import EXPERIMENTS
from hypertransformer_sizes import FULL, QUICK, Size, tuned

from remanence.environment import environment
from remanence.grid import one_thread
from remanence.state import write_whole

RESULT = Path(__file__).parent / "results" / "hypertransformer.json"


def run(names: list[str], size: Size, bench: Bench, path: Path | None) -> bool:
    """Train what is missing, judge, print and write each experiment; True when all gates hold."""
    rates = tuned(bench, size, run_cell)
    print(f"learning rates: {rates}", flush=True)
    bench.run([cell for name in names for cell in EXPERIMENTS[name].cells(size, rates)], run_cell)
    held = True
    for name in names:
        start = time.perf_counter()
        experiment = EXPERIMENTS[name]
        with one_thread():
            figures, gates = experiment.judge(bench, size, rates)
        print(f"\n{name}: {experiment.about}")
        print(json.dumps(figures, indent=1) if len(json.dumps(figures)) < 6000 else "(figures: see the JSON)")
        for gate in gates:
            print(f"{'holds' if gate.passed else 'FAILS':<7}{gate.row:<6}{gate.criterion}: {gate.seen}", flush=True)
        held &= all(gate.passed for gate in gates)
        part = {
            "command": f"python benchmarks/hypertransformer.py --only {name}", "about": experiment.about, "figures": figures,
            "gates": [asdict(gate) for gate in gates], "seconds": round(time.perf_counter() - start), "environment": environment(),
        }  # fmt: skip
        if path is not None:
            write_whole(path, json.dumps(merge(path, name, part, rates), indent=1, allow_nan=False) + "\n")
    return held


def merge(path: Path, name: str, part: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """The file's experiments with this one put in, in their order; gates of all of them in one list."""
    before = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    found = before | {name: part}
    ordered = {each: found[each] for each in EXPERIMENTS if each in found}
    return {
        "command": "python benchmarks/hypertransformer.py", "environment": environment(), "learning_rates": rates,
        "gates": [gate for each in ordered.values() for gate in each["gates"]], "parts": ordered,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write after every experiment; 0 when every gate holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, nothing judged")
    names = list(EXPERIMENTS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ID", help=", ".join(names))
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/hypertransformer-benchmark"), help="where trained models are kept")
    parser.add_argument("--out", type=Path, help="where the figures go; with --quick nowhere by default")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else FULL
    bench = Bench(options.runs / ("quick" if options.quick else "full"), options.jobs)
    held = run(options.only, size, bench, options.out or (None if options.quick else RESULT))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
