"""`remanence context`: training that resumes, figures by position, bytes of memory, and files of any length in constant memory."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from remanence.cli import main
from remanence.commands import _context_stream, _context_train
from remanence.context import (
    ContextTrainer,
    MelodiConfig,
    MelodiLM,
    TransformerXL,
    TransformerXLConfig,
    begin_reading,
    document_losses,
    load_context_model,
    load_context_state,
    load_reading,
    read_on,
    save_context_state,
    save_reading,
)
from remanence.errors import NonFiniteLoss, SettingError, StateMismatchError
from remanence.keys import generator, keyed_rng
from remanence.parts.hosts import no_progress_bar
from remanence.state import states_equal

BODY = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "window": 16}
MEMORY = {"short": 3, "long_per_window": 2, "long_windows": 4, "long_layers": [1]}
RESIDENT = re.compile(r"resident bytes: ([\d,]+) at the end, ([\d,]+) after the first 131,072, ([\d,]+) at most since then")


def settings(**values):
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


TINY = settings(**BODY, **MEMORY)


def call(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["context", *map(str, arguments)])
    return ended.value.code


def refused(capsys, *arguments):
    capsys.readouterr()
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def text(*key, n):
    """Words of few letters, so that a model learns something in a few steps."""
    return bytes(torch.randint(97, 105, (n,), generator=generator("text", *key)).tolist())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(6):
        (folder / f"{index}.txt").write_bytes(text("corpus", index, n=700 + 100 * index))
    return folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory, corpus):
    """A trained model, and what the command said."""
    folder = tmp_path_factory.mktemp("trained") / "reader"
    with pytest.MonkeyPatch.context() as patch:
        lines = io.StringIO()
        patch.setattr(sys, "stdout", lines)
        assert call("train", corpus, "--out", folder, "--steps", 6, *TINY) == 0
    return SimpleNamespace(folder=folder, lines=lines.getvalue().splitlines())


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(text("book", n=5000))
    return path


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


# --- train ---------------------------------------------------------------------------------------------------------


def test_training_leaves_a_model_a_report_and_nothing_else(reader):
    report = json.loads((reader.folder / "training.json").read_text())
    assert {path.name for path in reader.folder.iterdir()} == {"config.json", "model.safetensors", "training.json"}
    assert report["finished"]
    assert report["n_held_out"] == 1
    assert report["settings"]["model window"] == 16
    assert report["state_bytes"] == {"stored": (2 * 3 * 16 + 4 * 2 * 16) * 4, "kv": (2 * 3 * 16 + 2 * 4 * 2 * 16) * 4}
    model = load_context_model(reader.folder)
    assert report["n_parameters"] == sum(each.numel() for each in model.parameters())
    assert model.config.long_layers == [1]


def test_training_says_what_it_does_and_what_came_out(reader):
    report = json.loads((reader.folder / "training.json").read_text())
    first, *phases, took, bits, memory, place = reader.lines
    n_parameters = report["n_parameters"]
    assert first.startswith(f"melodi of {n_parameters:,} parameters: 6 steps of 1,024 bytes, ")
    assert first.endswith("passes through the 5 documents of 'corpus0'; held out: 1")
    assert phases == ["training melodi: 6/6", "reading held-out documents: 1/1"]
    assert took.startswith("done in ")
    n_bytes = f"{report['n_held_out_bytes']:,} bytes"
    assert bits.startswith(f"{report['bits_per_byte']:.4f} bits per byte on {n_bytes} of held-out text (documents: 1,")
    assert memory == "memory of a document: 896 bytes stored, 1,408 with keys and values counted"
    assert place == f"it lies in {reader.folder}"


def test_the_same_command_finds_what_is_finished(reader, corpus, capsys, monkeypatch):
    before = weights(reader.folder)
    monkeypatch.setattr(ContextTrainer, "run", lambda self: pytest.fail("trained again"))
    assert call("train", corpus, "--out", reader.folder, "--steps", 6, *TINY) == 0
    assert weights(reader.folder) == before
    printed = capsys.readouterr().out.splitlines()
    assert printed == [reader.lines[0], *reader.lines[-3:]]


def test_an_interrupted_training_goes_on_and_ends_alike(reader, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_context_train, "_SAVE_EVERY", 2)
    train_step = ContextTrainer._train_step

    def interrupted(self):
        if self.step == 5:
            raise KeyboardInterrupt
        return train_step(self)

    monkeypatch.setattr(ContextTrainer, "_train_step", interrupted)
    assert call("train", corpus, "--out", tmp_path / "cut", "--steps", 6, *TINY) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert "has not come to its end" in refused(capsys, "bytes", tmp_path / "cut")
    steps = []
    monkeypatch.setattr(ContextTrainer, "_train_step", lambda self: (steps.append(self.step), train_step(self))[1])
    assert call("train", corpus, "--out", tmp_path / "cut", "--steps", 6, *TINY) == 0
    assert steps == [4, 5]
    assert weights(tmp_path / "cut") == weights(reader.folder)


@pytest.mark.kill
def test_a_killed_training_goes_on_and_ends_alike(reader, corpus, tmp_path):
    code = f"""
import os, signal, sys
from remanence.cli import main
from remanence.commands import _context_train
from remanence.context import ContextTrainer
import torch
torch.set_num_threads(1)
_context_train._SAVE_EVERY = 2
train_step = ContextTrainer._train_step
def killed(self):
    if self.step == 3:
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    return train_step(self)
ContextTrainer._train_step = killed
main(sys.argv[1:])
"""
    command = ["train", str(corpus), "--out", str(tmp_path / "cut"), "--steps", "6", *TINY]
    done = subprocess.run([sys.executable, "-c", code, "context", *command], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert call(*command) == 0
    assert weights(tmp_path / "cut") == weights(reader.folder)


def test_a_kill_while_the_model_is_saved_leaves_a_folder_that_says_so(reader, corpus, tmp_path, capsys, monkeypatch):
    replace = Path.replace

    def killed(self, target):
        if target == tmp_path / "cut" / "config.json":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        assert call("train", corpus, "--out", tmp_path / "cut", "--steps", 6, *TINY) == 130
    assert "has not come to its end" in refused(capsys, "bytes", tmp_path / "cut")
    assert call("train", corpus, "--out", tmp_path / "cut", "--steps", 6, *TINY) == 0
    assert weights(tmp_path / "cut") == weights(reader.folder)


@pytest.mark.parametrize("kind", ["transformer-xl", "memorizing", "block-recurrent", "windowed"])
def test_every_kind_trains_and_reads(kind, corpus, tmp_path, book, capsys):
    own = {"memorizing": {"memory": 32, "memory_layer": 0}, "block-recurrent": {"states": 4, "recurrent_layer": 0}}.get(kind, {})
    own |= {} if kind == "windowed" else {"cache": 16}
    assert call("train", corpus, "--out", tmp_path / "it", "--steps", 1, "--model", kind, *settings(**BODY, **own)) == 0
    assert call("bytes", tmp_path / "it") == 0
    assert call("stream", tmp_path / "it", book) == 0
    assert "nan" not in capsys.readouterr().out
    model = load_context_model(tmp_path / "it")
    assert model.config.cache == own.get("cache", 0)


def test_without_a_corpus_the_sources_of_python_are_read(tmp_path, capsys, monkeypatch, corpus):
    from remanence.streams import text_folder

    monkeypatch.setattr(_context_train, "python_sources", lambda: text_folder(corpus))
    assert call("train", "--out", tmp_path / "it", "--steps", 1, *TINY) == 0
    assert "documents of 'corpus0'" in capsys.readouterr().out


def test_the_seed_changes_weights_and_order(reader, corpus, tmp_path):
    assert call("train", corpus, "--out", tmp_path / "other", "--steps", 6, "--seed", 1, *TINY) == 0
    assert weights(tmp_path / "other") != weights(reader.folder)


# --- perplexity ----------------------------------------------------------------------------------------------------


def test_perplexity_by_position_is_that_of_the_losses(reader, book, tmp_path, capsys):
    (tmp_path / "short.txt").write_bytes(text("short", n=300))
    assert call("perplexity", reader.folder, book, tmp_path / "short.txt", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    documents = [torch.tensor(list(path.read_bytes())) for path in (book, tmp_path / "short.txt")]
    losses = document_losses(load_context_model(reader.folder), documents, 256)
    ranges = [(row["from"], row["to"], row["n_bytes"]) for row in found["by_position"]]
    assert ranges == [(0, 1024, 1324), (1024, 4096, 3072), (4096, 5000, 904)]
    expected = [torch.cat([losses[0][:1024], losses[1]]), losses[0][1024:4096], losses[0][4096:]]
    for row, part in zip([*found["by_position"], found["all"]], [*expected, torch.cat(losses)], strict=True):
        assert row["bits_per_byte"] == pytest.approx(part.mean().item() / math.log(2), rel=1e-4)
        assert row["perplexity_per_byte"] == pytest.approx(part.mean().exp().item(), rel=1e-4)
    assert found["documents"] == 2
    assert found["all"]["n_bytes"] == 5300


def test_perplexity_as_a_table_has_a_row_for_each_range(reader, book, capsys):
    assert call("perplexity", reader.folder, book) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["position", "in", "document", "bytes", "bits", "per", "byte", "perplexity", "per", "byte"]
    starts = ["0 to 1,023 1,024", "1,024 to 4,095 3,072", "4,096 to 4,999 904"]
    assert [" ".join(line.split()[:4]) for line in lines[1:4]] == starts
    assert lines[4].split()[:2] == ["all", "5,000"]


# --- bytes ---------------------------------------------------------------------------------------------------------


def test_bytes_of_the_papers_configuration_are_an_eighth(capsys):
    body = {"hidden_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 13, "window": 512}
    melodi = settings(**body, short=128, long_per_window=64, long_windows=128, long_layers="[6]")
    assert call("bytes", *melodi) == 0
    printed = capsys.readouterr().out
    assert re.search(r"short +n S d +13 x 128 x 1024 +6,815,744 +6,815,744\n", printed)
    ours = int(re.search(r"all +[\d,]+ +([\d,]+)", printed).group(1).replace(",", ""))
    assert ours == (13 * 128 + 2 * 64 * 128) * 1024 * 4
    assert "n = 13, d = 1024, S = 128, Q = 128, L = 64, M = 1; 4 bytes a float" in printed
    memorizing = settings(**body, cache=512, memory=65536, memory_layer=6)
    assert call("bytes", "--model", "memorizing", *memorizing) == 0
    theirs = int(re.search(r"all +([\d,]+)", capsys.readouterr().out).group(1).replace(",", ""))
    assert theirs / ours == pytest.approx(7.94, abs=0.01)  # no cache in the memory layer


def test_bytes_of_a_folder_beside_full_caches(reader, capsys):
    assert call("bytes", reader.folder) == 0
    printed = capsys.readouterr().out
    assert re.search(r"all +896 +1,408\n", printed)
    per_token = 2 * 2 * 16 * 4
    for length, name in ((4096, "4k"), (65536, "64k"), (1_000_000, "1M")):
        assert re.search(rf"T = {name} tokens +{per_token * length:,} bytes +{per_token * length / 896:,.1f} ", printed)


def test_bytes_of_a_model_that_carries_nothing(capsys):
    assert call("bytes", "--model", "windowed") == 0
    assert re.search(r"T = 4k tokens +16,777,216 bytes +- +-\n", capsys.readouterr().out)


# --- stream --------------------------------------------------------------------------------------------------------


def test_a_stream_gives_the_bits_of_the_whole_document(reader, book, capsys):
    assert call("stream", reader.folder, book, "--segment", 100) == 0
    printed = capsys.readouterr().out
    losses = document_losses(load_context_model(reader.folder), [torch.tensor(list(book.read_bytes()))], 256)
    found = float(re.search(r"^5,000 bytes: ([\d.]+) bits per byte, [\d,]+ tokens/s$", printed, re.M).group(1))
    assert found == pytest.approx(losses[0].mean().item() / math.log(2), abs=1e-4)
    assert printed.startswith("a remanence-melodi reads with a memory of 896 bytes stored, 1,408 with keys and values counted\n")


def remembered(path, folder):
    reading, _ = load_reading(path, load_context_model(folder))
    return reading


def assert_alike(one, other, exact=False):
    assert (one.last, one.n_tokens) == (other.last, other.n_tokens)
    assert one.nats == pytest.approx(other.nats, rel=0 if exact else 1e-5)
    for name, value in one.state.state_dict().items():
        torch.testing.assert_close(value, other.state.state_dict()[name], rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


def test_a_document_in_parts_equals_the_document_in_one(reader, book, tmp_path, capsys):
    content = book.read_bytes()
    assert call("stream", reader.folder, book, "--state", tmp_path / "whole.safetensors") == 0
    for number, part in enumerate((content[:1], content[1:1777], content[1777:])):
        (tmp_path / f"{number}.txt").write_bytes(part)
        assert call("stream", reader.folder, tmp_path / f"{number}.txt", "--state", tmp_path / "parts.safetensors") == 0
    assert "read before: 1,777 bytes; this is the document's next part" in capsys.readouterr().out
    assert_alike(remembered(tmp_path / "parts.safetensors", reader.folder), remembered(tmp_path / "whole.safetensors", reader.folder))


def test_a_file_that_grew_is_read_on_from_where_it_ended(reader, book, tmp_path, capsys):
    content = book.read_bytes()
    log = tmp_path / "log.txt"
    for stop in (2000, 3333, 5000):
        log.write_bytes(content[:stop])
        assert call("stream", reader.folder, log, "--state", tmp_path / "log.safetensors") == 0
    printed = capsys.readouterr().out
    assert "the file's first 3,333 bytes were read before; goes on behind them" in printed
    assert call("stream", reader.folder, book, "--state", tmp_path / "whole.safetensors") == 0
    assert_alike(remembered(tmp_path / "log.safetensors", reader.folder), remembered(tmp_path / "whole.safetensors", reader.folder))
    capsys.readouterr()
    assert call("stream", reader.folder, log, "--state", tmp_path / "log.safetensors") == 0
    assert "nothing new in it" in capsys.readouterr().out


def test_an_interrupted_stream_goes_on_and_ends_bit_for_bit_alike(reader, book, tmp_path, capsys, monkeypatch):
    options = ("--segment", 512, "--state")
    assert call("stream", reader.folder, book, *options, tmp_path / "whole.safetensors") == 0
    n_calls = []

    def interrupted(*arguments):
        n_calls.append(1)
        if len(n_calls) == 5:
            raise KeyboardInterrupt
        return read_on(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_context_stream, "read_on", interrupted)
        assert call("stream", reader.folder, book, *options, tmp_path / "cut.safetensors") == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert call("stream", reader.folder, book, *options, tmp_path / "cut.safetensors") == 0
    assert "the file's first 2,048 bytes were read before" in capsys.readouterr().out
    assert_alike(*(remembered(tmp_path / f"{name}.safetensors", reader.folder) for name in ("cut", "whole")), exact=True)


def test_what_is_remembered_is_saved_on_the_way_and_lines_are_printed(reader, book, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_context_stream, "_SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(_context_stream, "_SECONDS_BETWEEN_LINES", 0.0)
    saved = []

    def save(path, reading, *rest):
        saved.append(reading.n_tokens)
        save_reading(path, reading, *rest)

    monkeypatch.setattr(_context_stream, "save_reading", save)
    assert call("stream", reader.folder, book, "--segment", 2048, "--state", tmp_path / "it.safetensors") == 0
    assert saved == [2048, 4096, 5000, 5000]
    assert len(re.findall(r"bytes: [\d.]+ bits per byte, [\d,]+ tokens/s, \d+ MB resident\n", capsys.readouterr().out)) == 3


def test_standard_input_is_read(reader, book, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(book.read_bytes())))
    assert call("stream", reader.folder, "-") == 0
    assert "\n5,000 bytes: " in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    assert "standard input is empty" in refused(capsys, "stream", reader.folder, "-")


def test_a_million_bytes_in_memory_that_is_flat_within_one_percent(tmp_path):
    """In a process of its own, whose memory nothing else fills."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not tell the resident memory of a process")
    sizes = {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1, "window": 256}
    with keyed_rng("million"), no_progress_bar():
        MelodiLM(MelodiConfig(short=4, long_per_window=2, long_windows=16, long_layers=(0,), **sizes)).save_pretrained(tmp_path / "model")
    million = tmp_path / "million.txt"
    million.write_bytes(text("million", n=1_000_000))
    command = [sys.executable, "-m", "remanence", "context", "stream", str(tmp_path / "model"), str(million)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "\n1,000,000 bytes: " in done.stdout
    end, warm, most = (int(number.replace(",", "")) for number in RESIDENT.search(done.stdout).groups())
    assert most / warm < 1.01, done.stdout
    assert 0.99 < end / warm < 1.01, done.stdout


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "windo=3"], "--set windo=3: a melodi model has no setting 'windo'. Did you mean 'window'?"),
        (["--set", "window"], "write it as KEY=VALUE"),
        (["--set", "window=wide"], "--set window=wide: must be int, got 'wide'."),
        (["--set", "long_layers=[1"], "--set long_layers=[1: while parsing"),
        (["--set", "window=0"], "window=0 must be 1 or more"),
        (["--set", "vocab_size=300"], "--set vocab_size=300: vocab_size is 257 here"),
        (["--model", "windowed", "--set", "cache=64"], "--set cache=64: cache is 0 here"),
        (["--model", "transformer-xl", "--set", "short=3"], "a transformer-xl model has no setting 'short'"),
        (["--steps", "0"], "--steps 0 must be above 0"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(arguments, message, corpus, tmp_path, capsys):
    assert message in refused(capsys, "train", corpus, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_wrong_folders_to_train_in_are_refused(reader, corpus, tmp_path, capsys):
    again = ("train", corpus, "--out", reader.folder)
    error = refused(capsys, *again, "--steps", 7, *TINY)
    assert "holds another training (steps: 6 there, 7 here). Name a new folder" in error
    assert re.search(r"\(.* there, .* here; .* here; .* here; and \d+ more\)", refused(capsys, *again, "--model", "transformer-xl"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    mine = ("train", corpus, "--out", tmp_path / "mine", *TINY)
    assert "exists and holds no training; nothing is ever overwritten" in refused(capsys, *mine)
    (tmp_path / "mine" / "training.json").write_text("{}")
    assert "is no report of a training" in refused(capsys, *mine)
    assert "there is no folder" in refused(capsys, "train", tmp_path / "absent", "--out", tmp_path / "out", *TINY)


def test_a_training_that_diverges_ends_with_code_1(corpus, tmp_path, capsys, monkeypatch):
    def diverge(self):
        raise NonFiniteLoss("ContextTrainer: the loss is nan at step 0 with lr=0.002; no checkpoint was kept. Lower lr.")

    monkeypatch.setattr(ContextTrainer, "_train_step", diverge)
    assert call("train", corpus, "--out", tmp_path / "out", *TINY) == 1
    assert "the loss is nan" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["perplexity", "bytes", "stream"])
def test_wrong_models_are_refused(command, reader, book, tmp_path, capsys):
    def error(folder):
        return refused(capsys, command, folder, *([] if command == "bytes" else [book]))

    assert "holds no config.json" in error(tmp_path / "absent")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    assert "holds a 'gpt2' model; the context models are remanence-" in error(tmp_path / "gpt2")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text((reader.folder / "config.json").read_text())
    (tmp_path / "broken" / "model.safetensors").write_bytes(weights(reader.folder)[:1000])
    assert "broken cannot be read (" in error(tmp_path / "broken")
    TransformerXL(TransformerXLConfig(cache=16, vocab_size=300, **BODY)).save_pretrained(tmp_path / "tokens")
    assert "holds a model with {'vocab_size': 300, 'bos_token_id': 299}; this command reads bytes" in error(tmp_path / "tokens")


def test_wrong_files_are_refused(reader, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    for command in ("perplexity", "stream"):
        assert "empty.txt is empty; there is nothing to read" in refused(capsys, command, reader.folder, tmp_path / "empty.txt")
        assert "absent.txt is not there; give a file" in refused(capsys, command, reader.folder, tmp_path / "absent.txt")
        assert "is a folder; give a file" in refused(capsys, command, reader.folder, tmp_path)
    assert "has settings of its own" in refused(capsys, "bytes", reader.folder, "--set", "window=3")
    assert "--segment 0 must be above 0" in refused(capsys, "stream", reader.folder, tmp_path / "empty.txt", "--segment", 0)


def test_wrong_states_are_refused_and_left_alone(reader, book, corpus, tmp_path, capsys):
    model = load_context_model(reader.folder)
    path = tmp_path / "it.safetensors"

    def error(folder=reader.folder):
        before = path.read_bytes() if path.is_file() else None
        found = refused(capsys, "stream", folder, book, "--state", path)
        assert before is None or path.read_bytes() == before
        return found

    save_reading(path, begin_reading(model), model)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    model.save_pretrained(tmp_path / "other weights")
    assert "a model of the same sizes with other weights" in error(tmp_path / "other weights")
    TransformerXL(TransformerXLConfig(cache=16, **BODY)).save_pretrained(tmp_path / "other kind")
    assert "belongs to a 'remanence-melodi' with the fingerprint" in error(tmp_path / "other kind")
    save_context_state(path, model.init_state(1), model)
    assert "but not how far a document was read" in error()
    path.write_bytes(b"words")
    assert "is not a whole remanence state" in error()
    path.unlink()
    path.mkdir()
    assert "is a folder; give a file" in error()


def test_an_empty_file_leaves_what_is_remembered_alone(reader, book, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    path = tmp_path / "it.safetensors"
    assert call("stream", reader.folder, book, "--state", path) == 0
    before = path.read_bytes()
    assert "is empty" in refused(capsys, "stream", reader.folder, tmp_path / "empty.txt", "--state", path)
    assert path.read_bytes() == before


def test_every_sub_command_has_help_with_an_example(capsys):
    for command in ("train", "perplexity", "bytes", "stream"):
        assert call(command, "--help") == 0
        assert f"remanence context {command}" in capsys.readouterr().out.split("example:")[1]
    assert call("--help") == 0
    assert "remanence context stream" in capsys.readouterr().out.split("example:")[1]


# --- reading in Python ---------------------------------------------------------------------------------------------


def test_reading_leaves_what_it_was_given_and_its_cut_does_not_matter(reader):
    model = load_context_model(reader.folder).train()
    ids = torch.tensor(list(text("cut", n=333)), dtype=torch.uint8)
    whole = read_on(model, begin_reading(model), ids, segment=64)
    reading = begin_reading(model)
    for piece in ids.split([0, 1, 15, 16, 17, 200, 84]):
        before = {name: value.clone() for name, value in reading.state.state_dict().items()}
        after = read_on(model, reading, piece, segment=48)
        assert states_equal(reading.state.state_dict(), before)
        reading = after
    assert_alike(reading, whole)
    assert model.training
    assert math.isnan(begin_reading(model).bits_per_token)
    assert whole.bits_per_token == pytest.approx(whole.nats / 333 / math.log(2))


def test_a_reading_goes_on_from_its_file(reader, tmp_path):
    model = load_context_model(reader.folder)
    ids = torch.tensor(list(text("file", n=100)))
    save_reading(tmp_path / "it.safetensors", read_on(model, begin_reading(model), ids[:37]), model, {"name": "notes"})
    reading, about = load_reading(tmp_path / "it.safetensors", model)
    assert about == {"name": "notes"}
    assert_alike(read_on(model, reading, ids[37:]), read_on(model, read_on(model, begin_reading(model), ids[:37]), ids[37:]), exact=True)
    assert load_context_state(tmp_path / "it.safetensors", model).batch == 1


def test_reading_refuses_segments_of_nothing_and_losses_that_are_no_numbers(reader):
    model = load_context_model(reader.folder)
    with pytest.raises(SettingError, match="segment=0 must be 1 or more"):
        read_on(model, begin_reading(model), torch.tensor([1]), segment=0)
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match="the loss of tokens 0 to 1 is nan"):
        read_on(model, begin_reading(model), torch.tensor([1, 2]))


def test_another_states_file_is_no_reading(reader, tmp_path):
    model = load_context_model(reader.folder)
    save_context_state(tmp_path / "it.safetensors", model.init_state(1), model)
    with pytest.raises(StateMismatchError, match="not how far a document was read"):
        load_reading(tmp_path / "it.safetensors", model)
