"""Every example of docs/context.md runs as it stands."""

import re
from pathlib import Path

from remanence.keys import keyed_rng

PAGE = Path(__file__).parents[2] / "docs" / "context.md"


def test_the_examples_of_the_page_run():
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(found) == 7
    shared = {}
    with keyed_rng("docs"):
        for block in found:
            exec(compile(block, PAGE.name, "exec"), shared)
    assert len(shared["text"]) == 40
    assert set(shared["losses"][0].shape) == {len(shared["documents"][7])}
