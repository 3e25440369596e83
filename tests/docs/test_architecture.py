"""Every python block of docs/architecture.md runs; the first one holds what the others share."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
SECTIONS = re.findall(r"^### (.+?)$.*?^```python\n(.+?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
COMMON, EXAMPLES = SECTIONS[0][1], SECTIONS[1:]


def test_one_example_per_store_and_none_is_left_out():
    assert len(EXAMPLES) == 7
    assert PAGE.read_text(encoding="utf-8").count("```python") == len(SECTIONS)


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example_runs(title, code):
    names = {"__name__": "architecture"}
    for number, block in enumerate((COMMON, code)):
        exec(compile(block, f"{PAGE.name}, {title if number else 'common'}", "exec"), names)


@pytest.mark.parametrize("code", [code for _, code in SECTIONS], ids=[title for title, _ in SECTIONS])
def test_examples_stay_short(code):
    assert max(len(line) for line in code.splitlines()) <= 130
    assert len(code.splitlines()) <= 110
