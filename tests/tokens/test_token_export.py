"""A backbone with its memories through torch.export and ONNX: any batch size, equal answers."""

import logging
import sys
import warnings

import pytest
import torch
from vision_zoo import backbone, images, memory_of, stir

from remanence.errors import MissingExtra, SettingError
from remanence.tokens import AllTasksReader, MemoryViT, TaskReader, export_onnx


def family(kind="ViTModel", layers=1):
    memory = memory_of(backbone(kind, num_hidden_layers=layers), "a")
    memory.add_task("b", [2, 3, 4], tokens=2, parents=["a"])
    memory.add_task("c.1", [5], mode="head")
    for name in ("b", "c.1"):
        stir(memory, name)
    return memory


@pytest.fixture
def memory():
    return family()


def test_a_reader_answers_raw_pixels_as_the_memory_does_and_shares_nothing(memory):
    pixels = images(5)
    wanted = {name: memory((pixels - 0.5) / 0.25, [name]).logits[name].detach() for name in memory.tasks}
    reader, everything = TaskReader(memory, "b", 0.5, 0.25), AllTasksReader(memory, 0.5, 0.25)
    assert reader.all.memory.tasks == ["a", "b"]
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.zero_()
    assert torch.equal(reader(pixels), wanted["b"])
    assert list(everything(pixels)) == ["a", "b", "c.1"]
    assert all((logits - wanted[name]).abs().max() < 1e-5 for name, logits in everything(pixels).items())
    assert not any(parameter.requires_grad for parameter in reader.parameters())
    assert not any(module.training for module in reader.modules())


@pytest.mark.parametrize(
    ("kind", "make"), [("ViTModel", lambda memory: TaskReader(memory, "b")), ("Dinov2ForImageClassification", AllTasksReader)]
)
def test_torch_export_with_a_free_batch_axis(kind, make):
    memory = family(kind, layers=2)
    reader = make(memory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, from inside its exporter
        program = torch.export.export(reader, (images(3),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for batch in (1, 3, 8):
        found, wanted = program.module()(images(batch, seed=1)), reader(images(batch, seed=1))
        pairs = [(found, wanted)] if torch.is_tensor(wanted) else [(found[name], wanted[name]) for name in wanted]
        assert all((one - other).abs().max() <= 1e-5 for one, other in pairs)


@pytest.mark.parametrize("make", [lambda memory: TaskReader(memory, "b"), AllTasksReader], ids=["one", "all"])
def test_onnx_with_a_free_batch_axis(make, memory, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    reader = make(memory)
    export_onnx(reader, images(3), tmp_path / "reader.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "reader.onnx", providers=["CPUExecutionProvider"])
    one = isinstance(reader, TaskReader)
    assert [output.name for output in session.get_outputs()] == (["logits"] if one else ["a", "b", "c.1"])
    for batch in (1, 3, 8):
        pixels = images(batch, seed=1)
        wanted = [reader(pixels)] if one else list(reader(pixels).values())
        found = session.run(None, {"pixels": pixels.numpy()})
        assert all((torch.from_numpy(value) - logits).abs().max() <= 1e-5 for value, logits in zip(found, wanted, strict=True))


def test_what_cannot_be_exported(memory, tmp_path, monkeypatch):
    with pytest.raises(SettingError, match=r"no task 'bb'. Did you mean 'b'"):
        TaskReader(memory, "bb")
    with pytest.raises(SettingError, match="holds no task to read"):
        AllTasksReader(MemoryViT(backbone()))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match=r"onnxscript is not installed; pip install 'remanence\[onnx\]'"):
        export_onnx(TaskReader(memory, "a"), images(), tmp_path / "reader.onnx")
