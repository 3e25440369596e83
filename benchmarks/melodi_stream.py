"""Ten million tokens through MELODI in one go: does memory stay flat?

    python benchmarks/melodi_stream.py            # ten million, about a minute of one core
    python benchmarks/melodi_stream.py --quick    # one million

A tiny MELODI with random weights (width 16, one layer, windows of 256, a queue of 16 windows that is full after 4,096 tokens) reads the
standard library's long sources as bytes, over and over, as one document. The resident memory of the process is looked at after every call
of 1,024 tokens. Before the last tenth the reading is saved, restored, and read on beside the one that stayed; that tenth takes
twice the time.

Exit code 1 when memory, after the first 131,072 tokens, leaves 1 % of what it was there, when the state grew, or when the restored
reading ended otherwise than the one that stayed.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from continual_cases import Gate
from torch import Tensor

from remanence.context import MelodiConfig, MelodiLM, Reading, begin_reading, load_reading, read_on, save_reading
from remanence.environment import environment, resident_bytes
from remanence.grid import one_thread
from remanence.keys import keyed_rng
from remanence.state import states_equal, write_whole
from remanence.streams import byte_ids, python_sources

TOKENS, QUICK_TOKENS, SEGMENT, WARM, SEED = 10_000_000, 1_000_000, 1024, 131_072, 0
LIMIT = 0.01
RESULT = Path(__file__).parent / "results" / "melodi_stream.json"
CONFIG = {
    "hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1, "window": 256, "short": 4, "long_per_window": 2,
    "long_windows": 16, "long_layers": [0],
}  # fmt: skip


def tiny_model() -> Any:
    with keyed_rng(SEED, "stream"):
        return MelodiLM(MelodiConfig(**CONFIG)).eval()


def calls(n_tokens: int) -> Iterator[Tensor]:
    """Pieces of the endless document, (SEGMENT,) uint8 each."""
    document = torch.cat([byte_ids(text).to(torch.uint8) for text in python_sources().train])
    place = torch.arange(SEGMENT)
    for first in range(0, n_tokens, SEGMENT):
        yield document[(first + place[: n_tokens - first]) % len(document)]


class Watch:
    """Resident bytes from the warm-up on, and at every tenth of the way."""

    def __init__(self, n_tokens: int) -> None:
        self.every = n_tokens // 10
        self.seen: list[int] = []
        self.tenths: list[dict[str, Any]] = []
        self._cpu = time.process_time()

    def look(self, n_read: int) -> None:
        resident = resident_bytes() or 0
        if n_read >= WARM:
            self.seen.append(resident)
        if n_read // self.every > len(self.tenths):
            now = time.process_time()
            rate = self.every / (now - self._cpu)
            self._cpu = now
            self.tenths.append({"n_tokens": n_read, "resident_bytes": resident, "tokens_per_cpu_second": round(rate)})
            print(f"{n_read:>12,} tokens  {resident / 1e6:8.1f} MB resident  {rate:10,.0f} tokens/s of CPU", flush=True)


def read(model: Any, n_tokens: int, folder: Path) -> tuple[Reading, Reading, Watch]:
    """The reading, the one that was restored before the last tenth, and what was seen of memory on the way."""
    reading, restored, watch = begin_reading(model), None, Watch(n_tokens)
    for piece in calls(n_tokens):
        if restored is None and reading.n_tokens >= 0.9 * n_tokens:
            save_reading(folder / "reading.safetensors", reading, model)
            restored, _ = load_reading(folder / "reading.safetensors", model)
        reading = read_on(model, reading, piece, SEGMENT)
        if restored is not None:
            restored = read_on(model, restored, piece, SEGMENT)
        watch.look(reading.n_tokens)
    assert restored is not None
    return reading, restored, watch


def judge(reading: Reading, restored: Reading, watch: Watch, begun: Reading) -> list[Gate]:
    """What must hold."""
    first, least, most = watch.seen[0], min(watch.seen), max(watch.seen)
    flat = f"{first:,} bytes after {WARM:,} tokens, then {least:,} to {most:,}"
    sizes = [each.state.nbytes("all") for each in (begun, reading)]
    same = (reading.nats, reading.last) == (restored.nats, restored.last) and states_equal(
        reading.state.state_dict(), restored.state.state_dict()
    )
    return [
        Gate("S1", f"resident memory - within {LIMIT:.0%} of the warm process's", flat, max(most - first, first - least) <= LIMIT * first),
        Gate("S2", "state - no byte more than at the beginning", f"{sizes[0]:,} and {sizes[1]:,} bytes", sizes[0] == sizes[1]),
        Gate("S3", "restored - ends bit for bit like the reading that stayed", "equal" if same else "differs", same),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Read, judge, write; 0 when every gate holds."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one million tokens; writes no figures unless --out is given")
    parser.add_argument("--out", type=Path, help="where the figures go")
    options = parser.parse_args(arguments)
    if resident_bytes() is None:
        sys.exit("this system does not tell the resident memory of a process; run it on Linux.")
    n_tokens, model = QUICK_TOKENS if options.quick else TOKENS, tiny_model()
    start = time.perf_counter()
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        reading, restored, watch = read(model, n_tokens, Path(folder))
    gates = judge(reading, restored, watch, begin_reading(model))
    for gate in gates:
        print(f"{'holds' if gate.passed else 'FAILS':<7}{gate.row:<4}{gate.criterion}: {gate.seen}")
    out = options.out or (None if options.quick else RESULT)
    if out is not None:
        result = {
            "command": "python benchmarks/melodi_stream.py" + " --quick" * options.quick, "seed": SEED, "threads": 1, "config": CONFIG,
            "n_tokens": reading.n_tokens, "segment": SEGMENT, "wall_seconds": round(time.perf_counter() - start),
            "state_bytes": {kind: reading.state.nbytes(kind) for kind in ("stored", "kv", "all")}, "resident_bytes_warm": watch.seen[0],
            "resident_bytes_least": min(watch.seen), "resident_bytes_most": max(watch.seen), "tenths": watch.tenths,
            "gates": [asdict(gate) for gate in gates], "passed": all(gate.passed for gate in gates), "environment": environment(),
        }  # fmt: skip
        write_whole(out, json.dumps(result, indent=1) + "\n")
    return 0 if all(gate.passed for gate in gates) else 1


if __name__ == "__main__":
    sys.exit(main())
