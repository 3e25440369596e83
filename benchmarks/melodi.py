"""Acceptance of MELODI and its baselines (A1 to A5).

    python benchmarks/melodi.py                    # all of it; about nine hours of one core, half as long on two
    python benchmarks/melodi.py --quick            # one seed, very few steps, nothing judged: does everything run?
    python benchmarks/melodi.py --only A1 A2       # these experiments anew; the others stay as they are in the JSON

Data: 36 public-domain books of the folder REMANENCE_DATA as bytes, 8 of them held out; with --corpus python, the standard library's
long sources, which vary with Python's version. Every trained model's figures are kept in --runs as soon as it is done, and a training
that is killed goes on from its checkpoint: the same command resumes. "At most": the one-sided 95 % bound, by a bootstrap over seeds x
held-out documents, of the mean paired difference is not above 0. Exit code 1 when a gate fails; --quick writes only where --out says.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from melodi_cells import Bench, run_cell
from melodi_experiments import EXPERIMENTS
from melodi_sizes import QUICK, Size

from remanence.environment import environment
from remanence.grid import one_thread
from remanence.state import write_whole

RESULT = Path(__file__).parent / "results" / "melodi.json"


def run(names: list[str], size: Size, bench: Bench, path: Path | None) -> bool:
    """Train what is missing, judge, print and write each experiment; True when all gates hold."""
    held = True
    for name in names:
        start = time.perf_counter()
        experiment = EXPERIMENTS[name]
        bench.run(experiment.cells(size), run_cell)
        with one_thread():
            figures, gates = experiment.judge(bench, size)
        print(f"\n{name}: {experiment.about}")
        print(json.dumps(figures, indent=1) if len(json.dumps(figures)) < 4000 else "(figures: see the JSON)")
        for gate in gates:
            print(f"{'holds' if gate.passed else 'FAILS':<7}{gate.row:<6}{gate.criterion}: {gate.seen}", flush=True)
        held &= all(gate.passed for gate in gates)
        part = {
            "command": f"python benchmarks/melodi.py --only {name}", "about": experiment.about, "corpus": size.corpus, "figures": figures,
            "gates": [asdict(gate) for gate in gates], "seconds": round(time.perf_counter() - start), "environment": environment(),
        }  # fmt: skip
        if path is not None:
            write_whole(path, json.dumps(merge(path, name, part), indent=1, allow_nan=False) + "\n")
    return held


def merge(path: Path, name: str, part: dict[str, Any]) -> dict[str, Any]:
    """The file's experiments with this one put in, in their order; gates of all of them in one list."""
    before = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    found = before | {name: part}
    ordered = {each: found[each] for each in EXPERIMENTS if each in found}
    gates = [gate for each in ordered.values() for gate in each["gates"]]
    return {"command": "python benchmarks/melodi.py", "environment": environment(), "gates": gates, "parts": ordered}


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write after every experiment; 0 when every gate holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, very few steps, nothing judged")
    names = list(EXPERIMENTS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ID", help=", ".join(names))
    parser.add_argument("--corpus", choices=("books", "python"), default="books", help="what language models read (default: books)")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/melodi-benchmark"), help="where finished cells and checkpoints are kept")
    parser.add_argument("--out", type=Path, help="where the figures go; with --quick nowhere by default")
    options = parser.parse_args(arguments)
    size = Size(options.corpus, **(QUICK if options.quick else {}))
    bench = Bench(options.runs / ("quick" if options.quick else "full"), options.jobs)
    held = run(options.only, size, bench, options.out or (None if options.quick else RESULT))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
