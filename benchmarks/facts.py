"""Acceptance of facts: what training on a text does to a language model (G0 to G9), and erasure at equal memory (E4).

    python benchmarks/facts.py             # five seeds and a tuning seed, about a quarter of an hour on two cores
    python benchmarks/facts.py --quick     # two seeds, four facts of a kind, fewer steps, about four minutes

A GPT-2 of width 96 is pretrained on a closed world (remanence.facts.closed_world), one world and one model per seed. Facts of three kinds
are then spliced into the training that goes on. The unit of every interval is the fact, within seeds (cluster bootstrap, 2,000
resamples, 95 %). The share of a sparse update, and whether it reaches the embeddings, are chosen on a seed that is used nowhere else.
A seed's rows are kept as soon as it is done, so that the same command resumes. Exit code 1 when a gate fails; what is reported and
not gated is marked so.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from facts_gates import all_gates, print_tables, tables
from facts_runs import FRACTIONS, Seed, method_name
from facts_world import Bench

from remanence.environment import environment
from remanence.grid import one_thread
from remanence.state import write_whole

HERE = Path(__file__).parent
RESULT = HERE / "results" / "facts.json"
TUNING_SEED = 100
DILUTION = (0.08, False)
"""Inside training: the published share, embeddings left alone; what erases afterwards would let nothing be learned."""
LEAST_PRIMING_REMOVED, LEAST_MEMORY_REMOVED = 0.75, 0.5


class Size(NamedTuple):
    """How large the experiment is."""

    seeds: tuple[int, ...]
    pretraining_steps: int
    n_facts: int
    clean_steps: int


FULL = Size((0, 1, 2, 3, 4), 2500, 8, 400)
QUICK = Size((0, 1), 1500, 4, 50)


def tuned(rows: pd.DataFrame) -> tuple[float, bool]:
    """The gentlest sparse update of the tuning seed that removes enough priming and memory; else the strongest."""
    erased = rows[rows["experiment"] == "erased"].groupby("method")[["priming_median", "log_s_mem"]].median()
    whole = erased.loc["injected"]
    for fraction in FRACTIONS:
        for embeddings in (False, True):
            left = erased.loc[method_name("ignore_top", fraction, embeddings)] / whole
            if left["priming_median"] <= 1 - LEAST_PRIMING_REMOVED and left["log_s_mem"] <= 1 - LEAST_MEMORY_REMOVED:
                return fraction, embeddings
    return FRACTIONS[-1], True


def run_seed(seed: int, size: Size, chosen: tuple[float, bool] | None, path: Path) -> None:
    """All experiments of a seed; those of the tuning seed end with the sparse updates."""
    with one_thread():
        start = time.monotonic()
        bench = Bench(seed, size.pretraining_steps, size.n_facts)
        runs = Seed(bench, 0 if chosen is None else size.clean_steps)
        rows = [runs.known(), *runs.forecasts(), *runs.kinds(), *runs.erasures(FRACTIONS)]
        if chosen is not None:
            rows += [*runs.trains_on(*chosen), *runs.compared(*chosen), *runs.diluted(*DILUTION), *runs.stones(), *runs.nothing()]
        rows.append({"experiment": "cost", "seed": seed, "seconds": time.monotonic() - start})
    write_whole(path, json.dumps(rows))


def collect(size: Size, folder: Path, jobs: int) -> tuple[pd.DataFrame, pd.DataFrame, tuple[float, bool]]:
    """Rows of the tuning seed and of all seeds, from files where they are there already."""
    paths = {seed: folder / f"seed-{seed}.json" for seed in (TUNING_SEED, *size.seeds)}
    if not paths[TUNING_SEED].exists():
        run_seed(TUNING_SEED, size, None, paths[TUNING_SEED])
        print(f"tuning seed {TUNING_SEED} done", flush=True)
    tuning = read(paths[TUNING_SEED])
    chosen = tuned(tuning)
    print(f"sparse update chosen on seed {TUNING_SEED}: {method_name('ignore_top', *chosen)}", flush=True)
    missing = [seed for seed in size.seeds if not paths[seed].exists()]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(run_seed, seed, size, chosen, paths[seed]) for seed in missing]:
            done.result()
            print("a seed is done", flush=True)
    return tuning, pd.concat([read(paths[seed]) for seed in size.seeds], ignore_index=True), chosen


def read(path: Path) -> pd.DataFrame:
    """A seed's rows."""
    return pd.DataFrame(json.loads(path.read_text(encoding="utf-8")))


def plain(value: Any) -> Any:
    """JSON without NaN."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds, fewer facts and steps")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/facts-benchmark"), help="where a seed's rows are kept")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and stop")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    print(f"{len(size.seeds)} seeds and one for tuning, {3 * size.n_facts} facts each, {size.clean_steps} clean steps;", flush=True)
    print(f"about {4 if arguments.quick else 18} minutes on two cores; rows in {arguments.runs}", flush=True)
    if arguments.dry_run:
        return
    tuning, rows, chosen = collect(size, arguments.runs / ("quick" if arguments.quick else "full"), arguments.jobs)
    gates, shown = all_gates(rows, chosen), tables(rows, tuning)
    print_tables(shown)
    for gate in gates:
        print(gate)
    result = {
        "command": " ".join(["python", "benchmarks/facts.py", *sys.argv[1:]]), "size": size._asdict(), "chosen": list(chosen),
        "seed_seconds": rows[rows["experiment"] == "cost"]["seconds"].round().tolist(), "environment": environment(),
        "gates": [asdict(gate) | {"passed": gate.passed} for gate in gates], "tables": shown,
    }  # fmt: skip
    path = RESULT.with_stem("facts-quick") if arguments.quick else RESULT
    write_whole(path, json.dumps(plain(result), indent=1) + "\n")
    print(f"written to {path}")
    sys.exit(0 if all(gate.passed for gate in gates) else 1)


if __name__ == "__main__":
    main()
