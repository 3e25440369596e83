"""Every example of docs/memory_tokens.md runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from remanence.keys import keyed_rng

PAGE = Path(__file__).parents[2] / "docs" / "memory_tokens.md"


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")  # peft asks transformers by an old name
def test_the_examples_of_the_page_run():
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(found) == 8
    shared = {}
    with keyed_rng("docs"):
        for block in found:
            exec(compile(block, PAGE.name, "exec"), shared)
    assert (Path(shared["mine"]) / "birds.onnx").stat().st_size > 1000
    assert not torch.equal(shared["answer"], shared["vit"](shared["pixels"]).logits)


def test_the_change_from_peft_is_five_lines():
    text = PAGE.read_text(encoding="utf-8")
    block = text.split("a task goes beside it:")[1].split("```python\n")[1].split("\n\nout = ")[0]
    lines = [line for line in block.splitlines() if line and not line.startswith(("from", "import"))]
    assert len(lines) == 5
