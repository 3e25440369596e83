"""Tables of records on disk: JSONL and CSV, plain or packed by gzip, with the line on which each record begins."""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from remanence.errors import DataError

FORMATS = (".jsonl", ".csv", ".jsonl.gz", ".csv.gz")


class Line(NamedTuple):
    """One record of a file."""

    number: int
    """Where it begins; the first line is 1."""
    record: dict[str, Any]
    fault: str = ""
    """Why there is no record, where there is none."""


def format_of(path: Path) -> str:
    """jsonl or csv, by the suffix.

    Raises:
        DataError: the suffix is another one.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    if suffixes and suffixes[-1] in FORMATS:
        return suffixes[-1][1:]
    raise DataError(f"{path}: the name ends on none of {', '.join(FORMATS)}; rename the file after what it holds.")


def lines_of(path: Path) -> list[Line]:
    """All records of a file in order; blank lines are skipped, lines that cannot be read come with their fault.

    Raises:
        DataError: there is no such file, it cannot be unpacked or is not UTF-8, its name has an unknown suffix, or a CSV
            file names a column twice.
    """
    is_csv = format_of(path) == "csv"
    text = _text_of(path)
    return list(_csv_lines(path, text) if is_csv else _json_lines(text))


def _text_of(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix.lower() == ".gz" else content).decode("utf-8-sig")
    except FileNotFoundError as error:
        beside = sorted(other.name for other in path.parent.glob("*")) if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}; beside it lie {', '.join(beside[:5]) or 'no files'}.") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}); save it as UTF-8, packed by gzip if named .gz.") from error


def _json_lines(text: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            yield Line(number, {}, f"broken JSON ({error.msg} at column {error.colno}); the line begins {line[:60]!r}")
            continue
        is_object = isinstance(record, dict)
        yield Line(number, record if is_object else {}, "" if is_object else f"not a JSON object; the line begins {line[:60]!r}")


def _csv_lines(path: Path, text: str) -> Iterator[Line]:
    reader = csv.reader(io.StringIO(text, newline=""))
    number = 1
    try:
        header = next(reader, [])
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise DataError(f"{path}: the columns {repeated} occur twice in the header; rename one of each.")
        number = reader.line_num + 1
        for cells in reader:
            if cells:
                yield _csv_line(number, header, cells)
            number = reader.line_num + 1
    except csv.Error as error:
        yield Line(number, {}, f"broken CSV ({error})")


def _csv_line(number: int, header: Sequence[str], cells: Sequence[str]) -> Line:
    if len(cells) > len(header):
        return Line(number, {}, f"{len(cells)} cells under {len(header)} columns; the line begins {cells[0][:60]!r}")
    return Line(number, dict(zip(header, cells, strict=False)))


def pack(path: Path, records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """The content of a file of records, in the format of its suffix; CSV has `columns`, JSONL the fields of each record."""
    if format_of(path) == "csv":
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, columns, restval="")  # its default line end makes it quote lone carriage returns
        writer.writeheader()
        writer.writerows(records)
        text = stream.getvalue()
    else:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    # no time stamp: the same records are the same bytes
    return gzip.compress(text.encode(), mtime=0) if path.suffix.lower() == ".gz" else text.encode()
