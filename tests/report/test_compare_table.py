import io

import pytest
from rich.console import Console
from synthetic_run import EVIL, LEARNERS, rows_of, write_run

from remanence.ledger import Ledger, to_frame
from remanence.report import compare_table
from remanence.report.columns import Value, count, kibibytes, percent, points, seconds, table_rows


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    return Ledger.open(write_run(tmp_path_factory.mktemp("run")))


def printed(renderable, width):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def test_table_fits_its_width_and_names_every_learner_and_verb(frame):
    text = printed(compare_table([frame]), 120)
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("\n") < 30, "at 120 columns two blocks are enough"
    for word in (*LEARNERS, "chance", "never learned", "learn", "keep", "disturb", "forget", "cost"):
        assert word in text


def test_narrow_terminal_gets_more_blocks_and_nothing_is_cut(frame):
    narrow, wide = printed(compare_table([frame]), 80), printed(compare_table([frame]), 200)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "…" not in narrow
    assert wide.count("learner") == 1
    assert narrow.count("learner") > 2


def test_cells_say_what_was_measured(frame):
    rows = {row.label: row for row in table_rows([frame])}
    assert list(rows)[-2:] == ["chance", "never learned"]
    # guessing among ten classes at the end
    assert percent(rows["chance"].values["average_accuracy"]) == "10.0 ± 0.0"
    text = printed(compare_table([frame]), 200)
    lora = next(line for line in text.splitlines() if line.startswith("LoRA"))
    assert "cannot" in lora
    assert "11.7" in lora  # 12,000 bytes per task in KiB


def test_hostile_names_are_printed_as_they_are(frame):
    assert EVIL in printed(compare_table([frame]), 120)
    rows = [row.__class__(**{**vars(row), "learner": "[bold]x[/bold]"}) for row in rows_of("Replay", 0)]
    assert "[bold]x[/bold]" in printed(compare_table([to_frame(rows)]), 120)


def test_streams_and_runs_are_told_apart_only_where_needed():
    first, other = rows_of("Replay", 0), rows_of("Replay", 0, stream="joint")
    assert [row.label for row in table_rows([to_frame(first)])] == ["Replay", "chance", "never learned"]
    labels = [row.label for row in table_rows([to_frame([*first, *other])])]
    assert labels[:2] == ["Replay @ split digits", "Replay @ joint"]
    second = [row.__class__(**{**vars(row), "run": "cafecafe"}) for row in first]
    labels = [row.label for row in table_rows([to_frame(first), to_frame(second)])]
    assert labels[:2] == ["Replay [feedbe]", "Replay [cafeca]"]


def test_empty_ledger_says_so():
    assert printed(compare_table([to_frame([])]), 80).strip() == "Nothing was measured yet."


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (percent, (0.5, 0.4, 0.6), "50.0 ± 10.0"),
        (points, (-0.123, float("nan"), float("nan")), "−12.3"),
        (points, (0.00001, float("nan"), float("nan")), "0.0"),
        (points, (0.05, 0.04, 0.06), "+5.0 ± 1.0"),
        (kibibytes, (1536.0, 0, 0), "1.5"),
        (kibibytes, (5_000_000.0, 0, 0), "4883"),
        (count, (999_999.0, 0, 0), "1000k"),
        (count, (3.2e12, 0, 0), "3.2T"),
        (seconds, (0.123, 0, 0), "0.12"),
        (seconds, (75.4, 0, 0), "75"),
    ],
)
def test_numbers_as_text(write, value, text):
    assert write(Value(*value)) == text
