"""Deltas: apply and remove are each other's inverse to the bit, on disk too; refusals write nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import drift, tiny_gpt2, tiny_llama

from remanence.erasure import Delta, apply_delta, remove_delta, sparse_delta
from remanence.errors import StateMismatchError
from remanence.state import copy_state, save_state, states_equal

NAME = "transformer.h.0.mlp.c_fc.weight"


def bits(state):
    return {name: value.contiguous().view(torch.uint8).clone() for name, value in state.items()}


def state_of(model):
    return copy_state(dict(model.state_dict()))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def world(request):
    """A trained model's state, its erased state, and the delta between."""
    model = tiny_gpt2().to(request.param)
    start = state_of(model)
    trained = state_of(drift(model))
    erased = sparse_delta(start, trained, fraction=0.08)
    return trained, erased, Delta.between(trained, erased)


def load(state):
    model = tiny_gpt2().to(state[NAME].dtype)
    model.load_state_dict(state)
    return model


def test_apply_then_remove_is_bit_exact(world, tmp_path):
    trained, erased, delta = world
    delta.save(tmp_path / "delta.safetensors")
    model = load(trained)
    for form in (delta, Delta.load(tmp_path / "delta.safetensors")):
        apply_delta(model, form)
        assert states_equal(bits(model.state_dict()), bits(erased))
        remove_delta(model, form)
        assert states_equal(bits(model.state_dict()), bits(trained))


numbers = st.floats(width=32, allow_nan=True) | st.sampled_from([0.0, -0.0])
rows = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12)


@given(rows)
def test_any_two_states_are_joined_to_the_bit(pairs):
    before, after = ({"w": torch.tensor(values)} for values in zip(*pairs, strict=True))
    delta, state = Delta.between(before, after), copy_state(before)
    apply_delta(state, delta)
    assert states_equal(bits(state), bits(after))
    remove_delta(state, delta)
    assert states_equal(bits(state), bits(before))


@given(st.lists(st.floats(-2, 2, width=32), min_size=9, max_size=9), st.sampled_from(["ignore_top", "keep_top"]), st.floats(0, 1))
def test_erase_then_revert_is_the_identity(values, select, fraction):
    before, after = {"w": torch.full((3, 3), 0.3)}, {"w": torch.tensor(values).view(3, 3)}
    erased = sparse_delta(before, after, select, fraction)
    delta = Delta.between(after, erased)
    remove_delta(erased, delta)
    assert states_equal(bits(erased), bits(after))


def test_only_changed_entries_are_stored(world, tmp_path):
    trained, erased, delta = world
    n_changed = sum(int((trained[name] != erased[name]).sum()) for name in trained)
    assert delta.n_entries == n_changed > 100
    assert delta.size_bytes == n_changed * (4 + 2 * trained[NAME].element_size())
    assert set(delta.tensors) == {name for name in trained if not torch.equal(trained[name], erased[name])}
    assert Delta.between(trained, trained).tensors == {}


def test_other_kinds_of_tensors_and_strides():
    before = {"mask": torch.tensor([True, False]), "n": torch.tensor(3), "t": torch.arange(6.0).view(2, 3)}
    after = {"mask": torch.tensor([True, True]), "n": torch.tensor(4), "t": torch.arange(6.0).view(2, 3) * 2}
    state = {**copy_state(before), "t": torch.arange(6.0).view(2, 3).t().contiguous().t()}
    assert not state["t"].is_contiguous()
    apply_delta(state, Delta.between(before, after))
    assert states_equal(state, after)


def test_tied_weights_are_stored_once():
    model = tiny_gpt2()
    before = state_of(model)
    delta = Delta.between(before, dict(drift(model).state_dict()))
    assert delta.tied == {"lm_head.weight": "transformer.wte.weight"}
    remove_delta(model, delta)
    assert states_equal(state_of(model), before)


def test_another_model_is_refused_and_nothing_is_written(world):
    trained, _, delta = world
    other = {name: value.clone() for name, value in trained.items()}
    last = sorted(delta.tensors)[-1]
    other[last] += 1
    held = copy_state(other)
    n = len(delta.tensors[last].places)
    with pytest.raises(StateMismatchError, match=rf"{n} of {n} entries of '{last}' are not .*the model is another, or was trained since"):
        apply_delta(other, delta)
    assert states_equal(other, held)


def test_applying_or_removing_twice_is_refused(world):
    trained, _, delta = world
    model = load(trained)
    with pytest.raises(StateMismatchError, match=r"removed already\. Nothing was written"):
        remove_delta(model, delta)
    apply_delta(model, delta)
    with pytest.raises(StateMismatchError, match=r"applied already\. Nothing was written"):
        apply_delta(model, delta)


def test_models_of_another_kind_are_refused(world):
    trained, _, delta = world
    with pytest.raises(StateMismatchError, match="8 of 8 tensors of the delta are absent from the model"):
        apply_delta(tiny_llama(), delta)
    with pytest.raises(StateMismatchError, match="the delta is for"):
        apply_delta(load(trained).double(), delta)
    with pytest.raises(StateMismatchError, match="different tensors"):
        Delta.between(trained, {})
    with pytest.raises(StateMismatchError, match=r"'w' is torch\.float32 \(2,\) before and torch\.float64 \(2,\) after"):
        Delta.between({"w": torch.zeros(2)}, {"w": torch.zeros(2).double()})


def test_files_that_are_no_delta_are_refused(tmp_path):
    save_state(tmp_path / "state", {"w": torch.zeros(2)})
    with pytest.raises(StateMismatchError, match="but no delta"):
        Delta.load(tmp_path / "state")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(StateMismatchError, match="not a whole remanence state"):
        Delta.load(tmp_path / "text")
