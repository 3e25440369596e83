"""State on disk: whole or not at all, and equal to what was saved."""

import json
import math
import os

import pytest
import torch

from remanence.errors import StateMismatchError
from remanence.state import all_finite, copy_state, load_state, load_values, save_state, state_bytes, states_equal, write_whole


def rich_state():
    shared = torch.arange(6.0).reshape(2, 3)
    return {
        "none": None,
        "nested": [1, 2.5, "text", True, [torch.tensor([True, False]), {"deep": torch.arange(3)}]],
        "empty": torch.empty(0, 4),
        "nothing": {},
        "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "f64": torch.tensor(math.pi, dtype=torch.float64),
        "shared": shared,
        "again": shared,
        "row": shared[1],
        "turned": shared.T,
        "strided": torch.arange(10)[::3],
        "grown": torch.zeros(1, 3).expand(4, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "a/b": {"c": torch.zeros(1)},
        "a": {"b/c": torch.ones(1), "b": {"c": torch.full((1,), 2.0)}},
        "": {"": torch.tensor([7])},
    }


def test_round_trip_of_everything_a_state_may_hold(tmp_path):
    state = rich_state()
    save_state(tmp_path / "new" / "s", state)
    loaded = load_state(tmp_path / "new" / "s")
    assert states_equal(state, loaded)
    assert list(loaded) == list(state)
    assert not loaded["parameter"].requires_grad
    assert loaded["bf16"].dtype == torch.bfloat16


def test_round_trip_of_a_state_without_tensors(tmp_path):
    for state in ({}, {"a": [1, None, {"b": "c"}]}):
        save_state(tmp_path / "s", state)
        assert load_state(tmp_path / "s") == state


def test_values_are_read_without_the_tensors(tmp_path):
    save_state(tmp_path / "s", {"a": torch.ones(2), "b": [1, torch.ones(1), {"c": "d"}]})
    assert load_values(tmp_path / "s") == {"a": None, "b": [1, None, {"c": "d"}]}


def test_a_copy_shares_no_memory():
    state = rich_state()
    copied = copy_state(state)
    assert states_equal(state, copied)
    copied["shared"].add_(1)
    copied["nested"][4][1]["deep"].add_(1)
    assert states_equal(state, rich_state())
    assert copied["turned"].is_contiguous()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.tensor([math.nan]), torch.tensor([0.0])),
        (torch.tensor([math.inf]), torch.tensor([torch.finfo(torch.float32).max])),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)),
        (torch.tensor([1.0]), torch.tensor(1.0)),
        (torch.tensor([1]), [1]),
        ({"a": 1}, {"a": 1, "b": 2}),
        ([1], [1, 2]),
        ([], {}),
        (1, 2),
    ],
)
def test_what_differs_is_not_equal(first, second):
    assert not states_equal({"x": first}, {"x": second})
    assert not states_equal({"x": second}, {"x": first})


def test_nan_equals_nan():
    nan = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert states_equal([nan, math.nan], [nan.clone(), math.nan])


def test_bytes_and_finiteness():
    state = {"a": torch.zeros(3, dtype=torch.float64), "b": [torch.zeros(2, dtype=torch.bool), {"c": torch.zeros(0)}], "d": 5}
    assert state_bytes(state) == 26
    assert all_finite(state)
    assert all_finite({"i": torch.tensor([1]), "n": math.nan})
    assert not all_finite({"a": [state, {"b": torch.tensor([1.0, math.nan])}]})
    assert not all_finite([torch.tensor(-math.inf)])


@pytest.mark.parametrize("where", ["replace", "fsync"])
def test_a_failing_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, where):
    save_state(tmp_path / "s", {"a": torch.ones(2)})

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(*(("pathlib.Path.replace", fail) if where == "replace" else ("os.fsync", fail)))
    with pytest.raises(OSError, match="disk full"):
        save_state(tmp_path / "s", {"a": torch.zeros(2)})
    monkeypatch.undo()
    assert load_state(tmp_path / "s")["a"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_the_content_is_synced_before_the_rename(tmp_path, monkeypatch):
    seen = []
    sync, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr("os.fsync", lambda handle: (seen.append("sync"), sync(handle))[1])
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: (seen.append("rename"), replace(self, target))[1])
    write_whole(tmp_path / "f", "text")
    assert seen == ["sync", "rename", "sync"]
    assert (tmp_path / "f").read_text() == "text"


def test_what_is_no_state_is_refused(tmp_path):
    with pytest.raises(TypeError, match="key 1 under '/a' is not a string"):
        save_state(tmp_path / "s", {"a": {1: 2}})
    with pytest.raises(TypeError, match="'/a/0' holds a set"):
        save_state(tmp_path / "s", {"a": [{1}]})
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_whole_state_is_refused(tmp_path):
    save_state(tmp_path / "s", {"a": torch.ones(100)})
    whole = (tmp_path / "s").read_bytes()
    from safetensors.torch import save

    header = save({"a": torch.ones(1)}, metadata={"state": json.dumps({"a": {"__tensor__": "/b"}})})
    for content in (b"", b"nonsense", whole[:-5], whole[:20], save({"a": torch.ones(1)}), header):
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(StateMismatchError, match="broken is not a whole remanence state"):
            load_state(tmp_path / "broken")
        with pytest.raises(StateMismatchError, match="broken is not a whole remanence state"):
            load_values(tmp_path / "broken")
