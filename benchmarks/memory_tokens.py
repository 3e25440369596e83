"""Acceptance of memory tokens: experiments M1 to M9.

    python benchmarks/memory_tokens.py                     # all of it, about half an hour of one core
    python benchmarks/memory_tokens.py --quick             # two seeds, no tuning, statistical gates not judged
    python benchmarks/memory_tokens.py --only M1 M6        # these parts anew; the others stay as they are in the JSON

Parts: M1 (old answers bit for bit), M2 (with M3: against the paper's masked sequence, and a mutation), M4 (digits, gated),
M4-fashion and M4-omniglot (reported), M5 (with M7: joining and forgetting), M6 (cost), M8 (transfer), M9 (starts). The local
sets of the two reported parts are found through REMANENCE_DATA. A part of the JSON names the command, seeds and machine that
made it. Exit code 1 when a gate of a part that was run fails; --quick writes only where --out says.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from continual_cases import Gate
from memory_tokens_cost import cost_part
from memory_tokens_exact import against_the_mask, old_answers
from memory_tokens_joining import join_and_forget
from memory_tokens_learning import digits_part, fashion_part, omniglot_part, start_part, transfer_part

from remanence.environment import environment
from remanence.grid import one_thread
from remanence.state import write_whole

RESULT = Path(__file__).parent / "results" / "memory_tokens.json"
Part = Callable[[bool, int], tuple[dict[str, Any], list[Gate]]]
PARTS: dict[str, Part] = {
    "M1": lambda quick, jobs: old_answers(quick),
    "M2": lambda quick, jobs: against_the_mask(quick),
    "M4": digits_part,
    "M4-fashion": fashion_part,
    "M4-omniglot": omniglot_part,
    "M5": lambda quick, jobs: join_and_forget(quick),
    "M6": lambda quick, jobs: cost_part(quick),
    "M8": transfer_part,
    "M9": start_part,
}


def command(name: str, quick: bool, jobs: int) -> str:
    """What makes a part anew."""
    return f"python benchmarks/memory_tokens.py --only {name}" + (" --quick" if quick else "") + (f" --jobs {jobs}" if jobs > 1 else "")


def run_part(name: str, quick: bool, jobs: int) -> dict[str, Any]:
    """One part: its figures, its gates, and what made them."""
    start = time.perf_counter()
    figures, gates = PARTS[name](quick, jobs)
    for gate in gates:
        print(f"{'holds' if gate.passed else 'FAILS':<7}{gate.row:<12}{gate.criterion}: {gate.seen}", flush=True)
    return {
        "command": command(name, quick, jobs), **figures, "gates": [asdict(gate) for gate in gates],
        "seconds": round(time.perf_counter() - start), "environment": environment(),
    }  # fmt: skip


def plain(value: Any) -> Any:
    """The value with NaN, the interval of a single seed, as null: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def merge(path: Path, parts: dict[str, Any]) -> dict[str, Any]:
    """The file's parts with these put in, in the order of `PARTS`; gates of all of them in one list."""
    before = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    found = before | parts
    ordered = {name: found[name] for name in PARTS if name in found}
    return {
        "command": "python benchmarks/memory_tokens.py", "environment": environment(),
        "gates": [gate for part in ordered.values() for gate in part["gates"]], "parts": ordered,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write after every part; 0 when every gate holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, no tuning, statistical gates not judged")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--jobs", type=int, default=1, help="processes for the parts that train (M4, M8, M9)")
    parser.add_argument("--out", type=Path, help="where the figures go; with --quick nowhere by default")
    options = parser.parse_args(arguments)
    path = options.out or (None if options.quick else RESULT)
    held = True
    with one_thread():
        for name in options.only:
            part = run_part(name, options.quick, options.jobs)
            held &= all(gate["passed"] for gate in part["gates"])
            if path is not None:
                write_whole(path, json.dumps(merge(path, {name: plain(part)}), indent=1, allow_nan=False) + "\n")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
