"""Checkpoint folders: equal to sparse_delta in memory, any sharding, little memory, whole or not at all; refusals."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import drift, tiny_gpt2, tiny_llama
from tokenizers import Tokenizer, models
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from remanence.erasure import _shards, drift_table, sparse_checkpoint, sparse_delta, write_checkpoint
from remanence.errors import DataError, SettingError, StateMismatchError
from remanence.state import copy_state, states_equal

FAMILIES = {"gpt2": tiny_gpt2, "llama": lambda: tiny_llama(tie_word_embeddings=False)}


def save(model, folder, shard_size="1GB"):
    model.save_pretrained(folder, max_shard_size=shard_size)
    words = {word: index for index, word in enumerate("abcdefghijklm")}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a"))).save_pretrained(folder)
    return folder


def tensors_of(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[("gpt2", torch.float32, 1000, 4000), ("llama", torch.bfloat16, 300, 1000)], ids=["gpt2", "llama"])
def folders(request, tmp_path):
    family, dtype, *shard_sizes = request.param
    model = FAMILIES[family]().to(dtype)
    before = save(model, tmp_path / "before", shard_sizes[0])
    after = save(drift(model), tmp_path / "after", shard_sizes[1])
    return before, after


@pytest.fixture
def pair(tmp_path):
    model = tiny_gpt2()
    return save(model, tmp_path / "before"), save(drift(model), tmp_path / "after")


@pytest.mark.parametrize("granularity", ["tensor", "layer", "global"])
@pytest.mark.parametrize("select", ["ignore_top", ("band", 0.0, 0.8)])
def test_equals_the_update_in_memory_across_shardings(folders, tmp_path, select, granularity):
    before, after = folders
    assert len(list(before.glob("*.safetensors"))) > len(list(after.glob("*.safetensors"))) > 1
    table = sparse_checkpoint(before, after, tmp_path / "out", select, 0.1, granularity)
    expected = sparse_delta(tensors_of(before), tensors_of(after), select, 0.1, granularity)
    assert states_equal(tensors_of(tmp_path / "out"), expected)
    same = drift_table(tensors_of(before), tensors_of(after), expected)
    assert table.sort_values("name").reset_index(drop=True).equals(same.sort_values("name").reset_index(drop=True))


def test_layout_configs_and_tokenizer_are_those_of_after(folders, tmp_path):
    before, after = folders
    out = tmp_path / "out"
    (after / "optimizer.pt").write_bytes(b"moments")
    (after / "trainer_state.json").write_text("{}")
    (before / "only_before.txt").write_text("")
    sparse_checkpoint(before, after, out)
    assert names_in(out) == [name for name in names_in(after) if name not in ("optimizer.pt", "trainer_state.json")]
    for name in names_in(out):
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (after / name).read_bytes()
    for file in after.glob("*.safetensors"):
        with safe_open(file, "pt") as old, safe_open(out / file.name, "pt") as new:
            assert (old.metadata(), old.keys()) == (new.metadata(), new.keys())
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == AutoModelForCausalLM.from_pretrained(after).dtype
    assert (out.stat().st_mode & 0o777) == (after.stat().st_mode & 0o777)


@pytest.mark.parametrize(
    ("select", "fraction", "end"), [("ignore_top", 0, 1), ("ignore_top", 1, 0), ("keep_top", 0, 0), ("keep_top", 1, 1)]
)
def test_both_ends_are_bit_exact(folders, tmp_path, select, fraction, end):
    sparse_checkpoint(*folders, tmp_path / "out", select, fraction)
    assert states_equal(tensors_of(tmp_path / "out"), tensors_of(folders[end]))


def test_a_start_in_half_the_precision_is_widened(tmp_path):
    model = tiny_gpt2().to(torch.bfloat16)
    before = save(model, tmp_path / "before")
    after = save(drift(model.float()), tmp_path / "after")
    sparse_checkpoint(before, after, tmp_path / "out", fraction=1)
    wide = {name: value.float() for name, value in tensors_of(before).items()}
    assert states_equal(tensors_of(tmp_path / "out"), wide)
    with pytest.raises(StateMismatchError, match="old values would be rounded"):
        sparse_checkpoint(after, before, tmp_path / "none")


@pytest.mark.parametrize("granularity", ["tensor", "global"])
def test_few_tensors_are_in_memory_at_a_time(folders, tmp_path, monkeypatch, granularity):
    refs, most = [], 0

    class Counting:
        def __init__(self, file):
            self.file = file

        def get_tensor(self, name):
            nonlocal most
            tensor = self.file.get_tensor(name).clone()  # a storage of its own, whatever the file's mapping does
            refs.append(StorageWeakRef(tensor.untyped_storage()))
            most = max(most, sum(not ref.expired() for ref in refs))
            return tensor

    @contextmanager
    def counting_open(*args, **kwargs):
        with safe_open(*args, **kwargs) as file:
            yield Counting(file)

    monkeypatch.setattr(_shards, "safe_open", counting_open)
    sparse_checkpoint(*folders, tmp_path / "out", fraction=0.1, granularity=granularity)
    assert len(refs) > 2 * 28
    assert most == 2


def test_a_failure_leaves_nothing_behind(pair, tmp_path, monkeypatch):
    before, after = pair
    calls = []

    def break_late(self, name, tensor):
        calls.append(name)
        if len(calls) == 3:
            raise OSError("disk full")

    monkeypatch.setattr(_shards.Overwriter, "put", break_late)
    with pytest.raises(OSError, match="disk full"):
        sparse_checkpoint(before, after, tmp_path / "out")
    assert names_in(tmp_path) == ["after", "before"]


def test_no_folder_is_overwritten(pair, tmp_path):
    before, after = pair
    held = {folder: {path.name: path.read_bytes() for path in folder.iterdir()} for folder in pair}
    for out in pair:
        with pytest.raises(DataError, match="exists already; nothing is ever overwritten"):
            sparse_checkpoint(before, after, out)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(DataError, match="exists already"):
        sparse_checkpoint(before, after, tmp_path / "file")
    assert held == {folder: {path.name: path.read_bytes() for path in folder.iterdir()} for folder in pair}
    (tmp_path / "empty").mkdir()
    sparse_checkpoint(before, after, tmp_path / "empty")
    sparse_checkpoint(str(before), str(after), tmp_path / "new" / "deep")
    assert names_in(tmp_path / "empty") == names_in(tmp_path / "new" / "deep") == names_in(after)


def test_folders_that_are_no_checkpoints_are_refused(pair, tmp_path):
    before, after = pair
    out, other = tmp_path / "out", tmp_path / "other"
    with pytest.raises(DataError, match=r"holds neither .* \(no such folder\)"):
        sparse_checkpoint(tmp_path / "absent", after, out)
    other.mkdir()
    with pytest.raises(DataError, match="it is empty"):
        sparse_checkpoint(other, after, out)
    (other / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"\(pytorch_model\.bin\); save the model with save_pretrained"):
        sparse_checkpoint(other, after, out)
    (other / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="holds a LoRA adapter; merge it"):
        sparse_checkpoint(before, other, out)
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    with pytest.raises(DataError, match=r"names 1 files that are absent \(first: model-1\.safetensors\)"):
        sparse_checkpoint(before, other, out)
    assert not out.exists()


def test_other_models_and_quantised_ones_are_refused(pair, tmp_path):
    before, after = pair
    with pytest.raises(StateMismatchError, match=r"hold different tensors: 28 only before .*save_pretrained so that names agree"):
        sparse_checkpoint(before, save(tiny_llama(), tmp_path / "llama"), tmp_path / "out")
    with pytest.raises(StateMismatchError, match="vocabulary resized"):
        sparse_checkpoint(before, save(tiny_gpt2(vocab_size=15), tmp_path / "words"), tmp_path / "out")
    config = json.loads((after / "config.json").read_text())
    (after / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(SettingError, match=r"config\.json declares quantised weights"):
        sparse_checkpoint(before, after, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard_size", ["4KB", "1GB"])
def test_a_model_in_memory_is_written_like_its_source(tmp_path, shard_size):
    model = tiny_gpt2().to(torch.bfloat16)
    like = save(model, tmp_path / "like", shard_size)
    drift(model)
    write_checkpoint(model, like, tmp_path / "out")
    assert names_in(tmp_path / "out") == names_in(like)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert states_equal(copy_state(dict(loaded.state_dict())), copy_state(dict(model.state_dict())))
    with pytest.raises(DataError, match="exists already"):
        write_checkpoint(model, like, tmp_path / "out")
    with pytest.raises(DataError, match="holds neither"):
        write_checkpoint(model, tmp_path, tmp_path / "more")


def test_a_model_that_cannot_be_saved_leaves_nothing(pair, tmp_path):
    class Broken:
        def save_pretrained(self, folder, **settings):
            shutil.copy(pair[0] / "config.json", folder)
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        write_checkpoint(Broken(), pair[0], tmp_path / "out")
    assert names_in(tmp_path) == ["after", "before"]


@pytest.mark.kill
def test_a_killed_process_leaves_no_folder_under_the_name(pair, tmp_path):
    before, after = pair
    script = (
        "import os, signal\n"
        "from remanence.erasure import _shards, sparse_checkpoint\n"
        "_shards.Overwriter.put = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"sparse_checkpoint({str(before)!r}, {str(after)!r}, {str(tmp_path / 'out')!r})\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    sparse_checkpoint(before, after, tmp_path / "out")  # what the dead process left is in nobody's way
    assert names_in(tmp_path / "out") == names_in(after)
