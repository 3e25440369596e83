"""The two sides of the overhead benchmark train alike, and its gate can fail."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_files import load

from remanence.streams import digits, joint, part, split_classes

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def overhead():
    return load("harness_overhead")


@pytest.fixture
def common(overhead, tiny_vit, monkeypatch):
    monkeypatch.setattr(overhead, "BATCH", 8)
    stream = overhead.OneTask(joint(split_classes(part(digits(), "pretrain"))))
    return overhead.Race(tiny_vit, stream, block=3, n_pairs=4)


def test_both_sides_end_with_the_same_weights(overhead, common):
    turns, is_equal, checkpoint = overhead.race(common, [])
    assert is_equal
    assert [len(seconds) for seconds in turns.counted()] == [4, 4]
    assert checkpoint > 0


def test_another_batch_order_would_be_noticed(overhead, common, monkeypatch):
    plain = overhead.Race.plain
    monkeypatch.setattr(overhead.Race, "plain", lambda self: _reversed(plain(self)))
    assert not overhead.race(common, [])[1]


def _reversed(loop):
    loop.batches = loop.batches[::-1]
    return loop


def test_bootstrap_brackets_the_median(overhead):
    median, low, high = overhead.bootstrap(np.array([1.0, 1.01, 1.02, 1.03, 1.5]))
    assert low <= median == 1.02 <= high
    assert high <= 1.5


@pytest.mark.parametrize(("bound", "same", "code"), [(1.01, True, 0), (1.04, True, 1), (1.01, False, 1)])
def test_exit_code_follows_bound_and_weights(overhead, monkeypatch, tmp_path, capsys, bound, same, code):
    row = dict.fromkeys(("plain_ms_per_step", "harness_ms_per_step", "ratio", "ratio_low", "ratio_high"), 1.0)
    monkeypatch.setattr(overhead, "common_ground", lambda *sizes: None)
    monkeypatch.setattr(overhead, "measure", lambda *race: row | {"bound": bound, "same_weights": same})
    assert overhead.main(["--out", str(tmp_path / "result.json")]) == code
    assert json.loads((tmp_path / "result.json").read_text())["passed"] == (code == 0)
    assert ("holds" in capsys.readouterr().out) == (code == 0)


def test_threads_are_put_back(overhead):
    before = torch.get_num_threads()
    with overhead.one_thread():
        pass
    assert torch.get_num_threads() == before
