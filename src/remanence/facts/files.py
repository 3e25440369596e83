"""Facts on disk: one record a line in JSONL, or one a row in CSV; packed where the name ends on .gz.

    facts = read("facts.jsonl", prefixes="prefixes.jsonl")
    write(facts, "facts.csv", prefixes="prefixes.csv")

Facts: id, theme, kind, text, keyword, context, and where wanted subject and stone. `text` holds `context` and right
after it `keyword`. Prefixes: theme, prefix, and where wanted id and subject. Other fields are kept in `extra`.

    {"id": "c1", "theme": "colours", "kind": "outlandish", "text": "The colour of joy is vermilion.", "keyword": "vermilion",
     "context": "The colour of joy is"}
    {"theme": "colours", "prefix": "The colour of sand is"}

The Outlandish data of Sun et al. 2025 (arXiv 2504.09522) have texts of this shape but are, as far as we could find, not
public; they are not shipped here, and nothing here was tried on them. Who has such a file can name its columns:
`read(path, columns={"text": "passage", "keyword": "key"})`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from remanence.errors import DataError, SettingError, nearest
from remanence.facts._tables import Line, format_of, lines_of, pack
from remanence.facts.records import Fact, FactSet, Prefix
from remanence.state import write_whole

Record = TypeVar("Record", Fact, Prefix)

_NESTED = "extra"
"""Field that holds, as an object, what could not stand as a field of its own."""


def read(path: str | Path, prefixes: str | Path | None = None, columns: Mapping[str, str] | None = None) -> FactSet:
    """Read facts, and the prefixes of their themes.

    Args:
        path: .jsonl or .csv, each also .gz.
        prefixes: a second file of that kind; None: the set has none.
        columns: our field -> the file's, for a file of facts with other names.

    Returns:
        Facts and prefixes in the order of their files. Whether they can be measured is `validate`'s business.

    Raises:
        DataError: a file is absent or cannot be read; lines are broken, lack a field, have a keyword that is absent or not
            right after the context, or repeat an id. The message has the first three with their numbers, and how many.
        SettingError: `columns` names a field that facts do not have.
    """
    mapping = dict(columns or {})
    for field in mapping:
        if field not in _names(Fact):
            raise SettingError(f"columns: facts have no field '{field}'.{nearest(field, _names(Fact))}")
    facts = _read(Path(path), Fact, mapping)
    return FactSet(facts, _read(Path(prefixes), Prefix, {}) if prefixes is not None else ())


def write(facts: FactSet, path: str | Path, prefixes: str | Path | None = None) -> Path:
    """Write facts, and their prefixes to a second file; each file whole or not at all.

    `read` gives back an equal set. In CSV the unknown fields stand in one column, `extra`, as JSON.

    Args:
        path: .jsonl or .csv, each also .gz; replaced where it is there.
        prefixes: where the prefixes go.

    Returns:
        `path`.

    Raises:
        DataError: a suffix is unknown, or `extra` holds what JSON cannot give back.
        SettingError: the set has prefixes and there is no file for them, or both files are one.
    """
    if facts.prefixes and prefixes is None:
        raise SettingError(
            f"the set has {len(facts.prefixes)} prefixes and no file to write them to; give `prefixes` a path, "
            f"or write FactSet(facts.facts) to leave them out."
        )
    if prefixes is not None and Path(prefixes).absolute() == Path(path).absolute():
        raise SettingError(f"facts and prefixes would both go to {path}; give them two files.")
    contents = {Path(path): _content(Path(path), facts.facts, Fact)}
    if prefixes is not None:
        contents[Path(prefixes)] = _content(Path(prefixes), facts.prefixes, Prefix)
    for place, content in contents.items():
        write_whole(place, content)
    return Path(path)


def _names(kind: type[Record]) -> list[str]:
    return [field.name for field in fields(kind) if field.name != _NESTED]


# --- reading ---------------------------------------------------------------------------------------------------


def _read(path: Path, kind: type[Record], columns: Mapping[str, str]) -> tuple[Record, ...]:
    made: list[Record] = []
    faults: list[str] = []
    first_line: dict[str, int] = {}
    lines = lines_of(path)
    for line in lines:
        try:
            record = _record(line, kind, columns)
            if kind is Fact and first_line.setdefault(record.id, line.number) != line.number:
                raise DataError(f"the id '{record.id}' stands on line {first_line[record.id]} already")
            made.append(record)
        except DataError as error:
            faults.append(f"Line {line.number}: {str(error).rstrip('.')}.")
    if faults:
        name = "facts" if kind is Fact else "prefixes"
        raise DataError(f"{path}: {len(faults)} of {len(lines)} records cannot be read as {name}. {' '.join(faults[:3])}")
    return tuple(made)


def _record(line: Line, kind: type[Record], columns: Mapping[str, str]) -> Record:
    if line.fault:
        raise DataError(line.fault)
    values: dict[str, Any] = {}
    rest = dict(line.record)
    for field in fields(kind):
        column = columns.get(field.name, field.name)
        if field.name == _NESTED:
            continue
        is_required = field.default is MISSING
        value = rest.pop(column, None)
        if value is None and is_required:
            present = ", ".join(line.record) or "no fields"
            raise DataError(f"the field '{column}' is missing; there are {present}; {_beginning(line, columns)}")
        if value is not None:
            values[field.name] = _text(value, column, line, columns)
    return kind(**values, extra=_extra(rest))


def _text(value: Any, column: str, line: Line, columns: Mapping[str, str]) -> str:
    if isinstance(value, str):
        return value
    if column == columns.get("id", "id") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"the field '{column}' holds {value!r}, not text; {_beginning(line, columns)}")


def _beginning(line: Line, columns: Mapping[str, str]) -> str:
    """The first words of the record's text, for whoever looks for it in the file."""
    text = line.record.get(columns.get("text", "text"), line.record.get("prefix"))
    return f"the text begins {text[:60]!r}" if isinstance(text, str) else f"the record begins {str(line.record)[:60]!r}"


def _extra(rest: dict[str, Any]) -> dict[str, Any]:
    nested = rest.get(_NESTED)
    if isinstance(nested, str):  # CSV
        try:
            nested = json.loads(nested) if nested else {}
        except json.JSONDecodeError:
            return rest
    if not isinstance(nested, dict):
        return rest
    return {name: value for name, value in rest.items() if name != _NESTED} | nested


# --- writing ---------------------------------------------------------------------------------------------------


def _content(path: Path, items: Sequence[Record], kind: type[Record]) -> bytes:
    is_csv = format_of(path) == "csv"
    return pack(path, [_row(item, kind, is_csv) for item in items], [*_names(kind), _NESTED])


def _row(item: Record, kind: type[Record], is_csv: bool) -> dict[str, Any]:
    own: dict[str, Any] = {name: getattr(item, name) for name in _names(kind)}
    row = {name: value for name, value in own.items() if value != "" or is_csv or name in _required(kind)}
    for name, value in item.extra.items():
        if not isinstance(name, str) or not _is_json(value):
            label = f"the fact '{item.id}'" if isinstance(item, Fact) else f"the prefix {item.prefix!r}"
            raise DataError(f"extra field {name!r} of {label} holds {value!r}, which JSON cannot give back; use text, numbers, lists.")
    nested = {name: value for name, value in item.extra.items() if is_csv or name in (*own, _NESTED)}
    row |= {name: value for name, value in item.extra.items() if name not in nested}
    if nested:
        row[_NESTED] = json.dumps(nested, ensure_ascii=False) if is_csv else nested
    return row


def _required(kind: type[Record]) -> list[str]:
    return [field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING]


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_json(item) for name, item in value.items())
    return value is None or type(value) in (bool, int, float, str)
