"""`remanence context stream`: a file of any length, or standard input, read in constant memory."""

import argparse
import contextlib
import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch

from remanence.commands._common import require_positive, say
from remanence.commands._context_models import load_byte_model, memory_said, require_file
from remanence.context import Reading, begin_reading, load_reading, read_on, save_reading
from remanence.environment import resident_bytes
from remanence.errors import DataError
from remanence.progress import terminal

if TYPE_CHECKING:
    from rich.console import Console

WARM_BYTES = 131_072
"""Behind them the process has all the memory it will need."""
_SEGMENT, _CHUNK = 1024, 1 << 20
_SECONDS_BETWEEN_LINES, _SECONDS_BETWEEN_SAVES = 10.0, 60.0


class _Place(NamedTuple):
    """How far was read: of the document, and of the file that is its last part."""

    reading: Reading
    digest: Any
    n_bytes: int

    def about(self) -> dict[str, Any]:
        return {"part": {"n_bytes": self.n_bytes, "sha256": self.digest.hexdigest()}}


def stream(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    require_positive(arguments, "segment")
    is_stdin = str(arguments.file) == "-"
    if not is_stdin:
        require_file(arguments.file)
    model = load_byte_model(arguments.folder)
    reading, part = _remembered(arguments.state, model)
    console = terminal()
    with contextlib.nullcontext(sys.stdin.buffer) if is_stdin else arguments.file.open("rb") as file:
        place, said = _found(file, reading, part)
        say(console, [f"a {model.config.model_type} reads with a memory of {memory_said(model)}", *said])
        place = _read(file, model, place, arguments, console)
    if arguments.state is not None:
        say(console, [f"state: {arguments.state} ({arguments.state.stat().st_size:,} bytes)"])
    return 0


def _remembered(path: Path | None, model: Any) -> tuple[Reading, dict[str, Any]]:
    """What was read before, and which part of the document came last."""
    if path is None or not path.exists():
        return begin_reading(model), {}
    require_file(path)
    reading, about = load_reading(path, model)
    return reading, about.get("part", {})


def _found(file: BinaryIO, reading: Reading, part: dict[str, Any]) -> tuple[_Place, list[str]]:
    """The file's position behind what was read of it before, if it begins with that."""
    digest = hashlib.sha256()
    if part and file.seekable():
        left = part["n_bytes"]
        while chunk := file.read(min(_CHUNK, left)):
            digest.update(chunk)
            left -= len(chunk)
        if left == 0 and digest.hexdigest() == part["sha256"]:
            said = [f"the file's first {part['n_bytes']:,} bytes were read before; goes on behind them"]
            return _Place(reading, digest, part["n_bytes"]), said
        file.seek(0)
    said = [f"read before: {reading.n_tokens:,} bytes; this is the document's next part"] if reading.n_tokens else []
    return _Place(reading, hashlib.sha256(), 0), said


def _read(file: BinaryIO, model: Any, place: _Place, arguments: argparse.Namespace, console: "Console") -> _Place:
    """Read to the end, say how it goes, and remember."""
    window = model.config.window
    segment = arguments.segment or max(_SEGMENT // window, 1) * window
    watch = _Watch(console, place.reading)
    saved, start = time.monotonic(), place
    try:
        for place in _places(file, model, start, segment):
            watch.tick(place.reading)
            if arguments.state is not None and time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                save_reading(arguments.state, place.reading, model, place.about())
                saved = time.monotonic()
        if place.n_bytes == 0:
            raise DataError(f"{'standard input' if str(arguments.file) == '-' else arguments.file} is empty; there is nothing to read.")
    finally:  # when interrupted, too: the same command goes on from here
        if arguments.state is not None and place.n_bytes:
            save_reading(arguments.state, place.reading, model, place.about())
    watch.conclude(place.reading)
    return place


def _places(file: BinaryIO, model: Any, place: _Place, segment: int) -> Iterator[_Place]:
    while chunk := file.read(segment - place.reading.n_tokens % segment):  # calls end where windows do
        digest = place.digest.copy()
        digest.update(chunk)
        ids = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
        place = _Place(read_on(model, place.reading, ids, segment), digest, place.n_bytes + len(chunk))
        yield place


class _Watch:
    """Says how the reading goes, and what the process takes."""

    def __init__(self, console: "Console", reading: Reading) -> None:
        self._console, self._first = console, reading.n_tokens
        self._start = self._last_line = time.monotonic()
        self._warm: int | None = None
        self._most = 0

    def tick(self, reading: Reading) -> None:
        resident = resident_bytes() or 0
        if reading.n_tokens - self._first >= WARM_BYTES:
            self._warm = self._warm or resident
            self._most = max(self._most, resident)
        if time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            say(self._console, [f"{self._progress(reading)}, {resident / 1e6:.0f} MB resident"])

    def conclude(self, reading: Reading) -> None:
        lines = [self._progress(reading)] if reading.n_tokens > self._first else ["nothing new in it"]
        resident = resident_bytes()
        if resident is not None:
            warm = f", {self._warm:,} after the first {WARM_BYTES:,}, {self._most:,} at most since then" if self._warm else ""
            lines.append(f"resident bytes: {resident:,} at the end{warm}")
        say(self._console, lines)

    def _progress(self, reading: Reading) -> str:
        rate = (reading.n_tokens - self._first) / max(time.monotonic() - self._start, 1e-9)
        return f"{reading.n_tokens:,} bytes: {reading.bits_per_token:.4f} bits per byte, {rate:,.0f} tokens/s"
