"""The ledger: idempotent by key, append-only, and a torn last line is all that a crash costs."""

import json
import math
from dataclasses import asdict, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remanence.errors import DataError, NotDeterministic
from remanence.ledger import COLUMNS, KEY, Ledger, Row, to_frame

BASE = Row("r", "s", "l", "weights", 0, 0, "learn", "t", None, "accuracy", "", "t", "accuracy", None, 0.5, "1")
WORDS = st.text(max_size=4)
ROWS = st.lists(
    st.builds(
        lambda key, value, note, exact: replace(BASE, **key, value=value, note=note, exact=exact),
        st.fixed_dictionaries(
            {
                "event": st.integers(-1, 2),
                "step": st.none() | st.integers(1, 2),
                "subject": WORDS,
                "reader": st.sampled_from(["", "b"]),
                "at": st.none() | st.integers(0, 1),
            }
        ),
        st.floats(allow_nan=False, allow_infinity=False) | st.integers(-5, 5),
        WORDS,
        st.booleans(),
    ),
    max_size=8,
    unique_by=lambda row: row.key,
)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cell" / "ledger.jsonl"


def fresh(path):
    path.unlink(missing_ok=True)
    return Ledger(path)


@quick
@given(ROWS)
def test_appending_twice_is_appending_once(path, rows):
    ledger = fresh(path)
    assert ledger.append(rows) == len(rows)
    content = path.read_bytes() if rows else b""
    assert ledger.append(rows) == 0
    assert Ledger(path).append(reversed(rows)) == 0
    assert (path.read_bytes() if rows else b"") == content
    assert list(Ledger(path)) == rows


@quick
@given(ROWS.filter(bool), st.data())
def test_a_cut_anywhere_costs_the_torn_line_at_most(path, rows, data):
    fresh(path).append(rows)
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    again = Ledger(path)
    assert list(again) == rows[:whole]
    assert again.append(rows) == len(rows) - whole
    assert path.read_bytes() == content
    assert list(Ledger(path)) == rows


def test_reading_does_not_write_since_another_process_may_be_in_the_middle_of_a_line(path):
    fresh(path).append([BASE, replace(BASE, event=1)])
    content = path.read_bytes()[:-9]
    path.write_bytes(content)
    assert list(Ledger(path)) == [BASE]
    (path.parent.parent / "run.json").write_text(json.dumps({"cells": ["."]}))
    (path.parent.parent / "cells").mkdir()
    (path.parent.parent / "cells" / "ledger.jsonl").write_bytes(content)
    assert len(Ledger.open(path.parent.parent)) == 1
    assert path.read_bytes() == content
    assert (path.parent.parent / "cells" / "ledger.jsonl").read_bytes() == content


def test_the_same_key_with_another_value(path):
    ledger = fresh(path)
    ledger.append([BASE, replace(BASE, metric="seconds", value=1.0, exact=False)])
    assert ledger.append([replace(BASE, metric="seconds", value=2.0, exact=False)]) == 0
    assert [row.value for row in Ledger(path)] == [0.5, 1.0]
    with pytest.raises(NotDeterministic, match=r"l on s, seed 0, event 0 step None: accuracy of 't' was 0.5, now 0.25"):
        ledger.append([replace(BASE, value=0.25)])
    with pytest.raises(NotDeterministic, match=r"was 0.5, now None"):
        Ledger(path).append([replace(BASE, value=None, note="gone")])
    with pytest.raises(NotDeterministic):
        fresh(path).append([BASE, replace(BASE, value=0.1)])
    assert not path.exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_ledger_holds_numbers(path, value):
    with pytest.raises(DataError, match=r"accuracy/accuracy of 't' is -?(nan|inf); a ledger holds None with a note"):
        fresh(path).append([replace(BASE, event=4), replace(BASE, value=value)])
    assert not path.exists()


@pytest.mark.parametrize("line", [b"{", b"[1]", b"null", b'{"run": 1}', b"\xff\xfe", b"\x00\x00", b""])
def test_a_wrong_line_in_the_middle_is_an_error(path, line):
    fresh(path).append([BASE, replace(BASE, event=1)])
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, second, b""]))
    with pytest.raises(DataError, match=r"ledger.jsonl, line 2 is not a ledger row"):
        Ledger(path)


def test_rows_are_on_disk_before_append_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append(path.read_bytes().count(b"\n")))
    fresh(path).append([BASE, replace(BASE, event=1)])
    assert synced == [2]


def test_names_with_odd_characters_survive(path):
    row = replace(BASE, task="a\u2028b\nc\x0b\x1c é", note='"')
    fresh(path).append([row, replace(row, event=1)])
    assert next(iter(Ledger(path))) == row


def test_the_table_has_every_column_in_order(path, tmp_path):
    ledger = fresh(path)
    ledger.append([BASE, replace(BASE, event=1, step=3, value=None, note="why")])
    frame = ledger.frame()
    assert tuple(frame.columns) == COLUMNS
    assert frame["step"].isna().tolist() == [True, False]
    assert str(frame["step"].dtype) == "Int64"
    assert frame["value"].isna().tolist() == [False, True]
    assert tuple(to_frame([]).columns) == COLUMNS
    assert set(COLUMNS) - set(KEY) == {"value", "unit", "exact", "note"}
    assert asdict(BASE).keys() == set(COLUMNS)


def test_a_run_is_read_in_recipe_order(tmp_path):
    for name, seed in (("b", 1), ("a", 2)):
        Ledger(tmp_path / "cells" / name / "ledger.jsonl").append([replace(BASE, seed=seed)])
    (tmp_path / "run.json").write_text(json.dumps({"cells": ["b", "a", "not begun"]}))
    assert Ledger.open(tmp_path)["seed"].tolist() == [1, 2]
    with pytest.raises(DataError, match=r"is not a run folder: it has no run.json"):
        Ledger.open(tmp_path / "cells")
