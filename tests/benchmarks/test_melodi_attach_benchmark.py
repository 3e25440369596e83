"""The parts of the benchmark of attached memory, with a host of a few thousand numbers: fair arms, cells that resume, gates that fail."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmark_files import load

from remanence.keys import generator

IN_ORDER = ("continual_cases", "hypertransformer_cells", "melodi_arms", "melodi_cells", "melodi_sizes")
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "see", "it")


def text(*key):
    return " ".join(WORDS[index] for index in torch.randint(len(WORDS), (400,), generator=generator("text", *key)).tolist())


@pytest.fixture(scope="module")
def files():
    for name in IN_ORDER:
        load(name)
    return SimpleNamespace(cells=load("melodi_attach_cells"), main=load("melodi_attach"))


@pytest.fixture
def bench(files, tmp_path, monkeypatch):
    """A folder with a tiny host and its documents."""
    monkeypatch.setenv("REMANENCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files.cells, "parts", lambda corpus: tuple(tuple(text(side, n) for n in range(2)) for side in range(3)))
    monkeypatch.setattr(files.cells, "HOST", files.cells.HOST | {"vocab_size": 280, "width": 16, "depth": 2, "heads": 2, "batch_size": 2})
    small = {"hidden_size": 8, "num_attention_heads": 2, "short": 3, "lora_rank": 2}
    monkeypatch.setattr(files.cells, "MEMORY", files.cells.MEMORY | small)
    monkeypatch.setattr(files.cells, "SEGMENT", 128)
    monkeypatch.setattr(files.cells, "ROWS", 2)
    folder = tmp_path / "runs"
    folder.mkdir()
    host = files.cells.prepare(folder, "books", 2, 2000, 256)
    size = files.main.Size("books", (0, 1), 2, 2, 1, 2000, 256)
    cells = files.main.Cells(size, host, folder)
    return SimpleNamespace(bench=files.cells.Bench(folder, 1), host=host, size=size, cells=cells, folder=folder)


def run_here(bench, files):
    """In this process, in place of a pool."""
    def run(cells, run_cell):
        for cell in cells:
            if not (bench.folder / f"{cell.key}.json").exists():
                files.cells.run_cell(cell, bench.folder)
    return run


def test_a_whole_run(files, bench, monkeypatch):
    monkeypatch.setattr(bench.bench, "run", run_here(bench, files))
    figures, gates = files.main.run(bench.size, bench.bench, bench.host)
    assert [gate.passed for gate in gates[:2]] == [True, True], [gate.seen for gate in gates]
    assert figures["arms"]["adapters"]["kv_bytes"] == 0
    assert figures["arms"]["melodi"]["kv_bytes"] == 4 * 8 * (2 * 3 + 2 * 8 * 32)
    assert figures["arms"]["memory off"]["kv_bytes"] == 0
    assert figures["arms"]["memory off"]["parameters"] < figures["arms"]["melodi"]["parameters"]
    assert set(figures["tuning"]) == set(files.main.ARMS)
    assert all(len(found) == len(files.main.RATES) for found in figures["tuning"].values())
    assert not list(bench.folder.glob("*.training"))
    assert json.loads(json.dumps(figures, allow_nan=False))


def test_a_killed_cell_ends_as_one_that_was_not(files, bench, monkeypatch):
    monkeypatch.setattr(files.cells, "_CHECKPOINT_STEPS", 1)
    cell = bench.cells.judged("melodi", 1e-2)[0]
    files.cells.run_cell(cell, bench.folder)
    wanted = bench.bench.result(cell)
    (bench.folder / f"{cell.key}.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(files.cells, "measured", lambda model, documents: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            files.cells.run_cell(cell, bench.folder)
    assert (bench.folder / f"{cell.key}.training").is_dir()
    files.cells.run_cell(cell, bench.folder)
    assert bench.bench.result(cell)["nats"] == wanted["nats"]


def test_memory_that_is_emptied_before_every_window_is_no_memory(files, bench):
    attached = files.cells.attach(files.cells.load_language_model(bench.host), "melodi", 0)
    with torch.no_grad():
        for layer in attached.layers:
            layer.up.weight.normal_(generator=generator("up"))
        tokens = torch.randint(280, (2, 128), generator=generator("tokens"))
        forgetful, _ = files.cells.Forgetful(attached)(tokens)
        torch.testing.assert_close(forgetful, attached.host(tokens.view(-1, 32)).logits.view_as(forgetful), atol=1e-5, rtol=1e-5)
        assert (attached(tokens)[0] - forgetful).abs().max() > 0.01


def test_arms_of_full_size_have_equally_many_parameters(files):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 1024}
    sizes = [files.cells._n_trained(files.cells.attach(LlamaForCausalLM(LlamaConfig(**shape)), arm, 0)) for arm in ("melodi", "adapters")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_a_gate_fails_where_the_bound_does_not_lie_below(files):
    sure, unsure = np.full((3, 8), -0.01), np.tile([-0.02, 0.019], (3, 4))
    assert files.main.below("melodi - adapters: below 0", sure).passed
    assert not files.main.below("melodi - adapters: below 0", unsure).passed
    assert not files.main.below("melodi - adapters: below 0", np.zeros((3, 8))).passed


def test_the_best_rate_is_the_one_of_the_lowest_mean(files):
    cells = [SimpleNamespace(settings={"rate": rate}) for rate in (0.1, 0.2)]
    bench = SimpleNamespace(result=lambda cell: {"nats": [3.0, 4.0] if cell.settings["rate"] == 0.1 else [3.5, 3.0]})
    assert files.main.best_rate(bench, cells) == (0.2, {"0.1": 3.5, "0.2": 3.25})
