"""States: bit-exact ends, scope, ties, dtypes, the drift table; refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import drift, tiny_gpt2, tiny_llama
from torch import nn

from remanence.erasure import default_scope, drift_table, sparse_delta, sparse_mask
from remanence.errors import DataError, SettingError, StateMismatchError
from remanence.state import copy_state, states_equal


def everything(name, tensor):
    return tensor.is_floating_point()


def same_bits(first, second):
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))
        for name in first
    )


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def states(request):
    before = tiny_gpt2().to(request.param)
    start = copy_state(dict(before.state_dict()))
    # ties, zeros of either sign and untouched entries
    after = dict(drift(before).state_dict())
    with torch.no_grad():
        after["transformer.h.0.mlp.c_fc.weight"][0] = start["transformer.h.0.mlp.c_fc.weight"][0]
        start["transformer.h.0.mlp.c_fc.weight"][1, 0], after["transformer.h.0.mlp.c_fc.weight"][1, 0] = 0.0, -0.0
    return start, after


@pytest.mark.parametrize("granularity", ["tensor", "layer", "global"])
@pytest.mark.parametrize(
    ("select", "fraction", "end"), [("ignore_top", 0, 1), ("ignore_top", 1, 0), ("keep_top", 0, 0), ("keep_top", 1, 1)]
)
def test_both_ends_are_bit_exact_for_the_whole_state(states, select, fraction, end, granularity):
    assert same_bits(sparse_delta(*states, select, fraction, granularity), states[end])


@pytest.mark.parametrize(("band", "end"), [((0, 1), 1), ((0.3, 0.3), 0)])
def test_full_and_empty_bands_are_bit_exact(states, band, end):
    assert same_bits(sparse_delta(*states, ("band", *band)), states[end])


def test_entries_are_copied_from_one_of_the_two_states(states):
    before, after = states
    erased = sparse_delta(before, after, fraction=0.3)
    name = "transformer.h.1.attn.c_attn.weight"
    mask = sparse_mask(after[name].float() - before[name].float(), fraction=0.3)
    assert (~mask).sum() == int(0.3 * mask.numel())
    assert same_bits({"w": erased[name]}, {"w": torch.where(mask, after[name], before[name])})


def test_inputs_stay_as_they_are_and_share_no_memory(states):
    copies = copy_state(list(states))
    erased = sparse_delta(*states)
    for value in erased.values():
        value.fill_(7)
    assert states_equal(copies, list(states))


def test_erasing_twice_from_the_same_window_start_removes_no_less(states):
    before, after = states
    erased = sparse_delta(before, after, fraction=0.5)
    again = sparse_delta(before, erased, fraction=0.5)
    assert drift_table(before, again).n_changed.sum() < drift_table(before, erased).n_changed.sum()


@given(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4), st.floats(0, 1))
def test_keep_and_ignore_split_the_change(values, fraction):
    before, after = {"w": torch.full((2, 2), 0.1)}, {"w": torch.tensor(values).view(2, 2)}
    ignored, kept = (sparse_delta(before, after, select, fraction)["w"] for select in ("ignore_top", "keep_top"))
    moved = after["w"] != before["w"]
    assert torch.equal((ignored == after["w"]) ^ (kept == after["w"]), moved)


def test_outside_the_scope_the_new_value_stays_unless_told(states):
    before, after = states
    bias, embedding = "transformer.h.0.mlp.c_fc.bias", "transformer.wte.weight"
    erased, returned = sparse_delta(before, after), sparse_delta(before, after, others="before")
    for name in (bias, embedding, "lm_head.weight"):
        assert torch.equal(erased[name], after[name])
        assert torch.equal(returned[name], before[name])
    assert torch.equal(sparse_delta(before, after, fraction=1, others="after")[bias], after[bias])
    assert not torch.equal(sparse_delta(before, after, include_embeddings=True)[embedding], after[embedding])


def test_tied_tensors_are_masked_once_and_stay_tied():
    model = tiny_gpt2()
    before = copy_state(dict(model.state_dict()))  # the copy has lost the tie
    after = dict(drift(model).state_dict())
    erased = sparse_delta(before, after, "ignore_top", 0.2, "global", include_embeddings=True)
    head, embedding = "lm_head.weight", "transformer.wte.weight"
    assert erased[head].data_ptr() == erased[embedding].data_ptr()
    assert not torch.equal(erased[head], after[head])
    del before[head], after[head]
    alone = sparse_delta(before, after, "ignore_top", 0.2, "global", include_embeddings=True, scope=default_scope(include_embeddings=True))
    assert torch.equal(erased[embedding], alone[embedding])
    assert drift_table(before, after).name.is_unique


def test_a_narrower_start_is_widened():
    before, after = {"w": torch.ones(2, 2, dtype=torch.bfloat16)}, {"w": torch.full((2, 2), 3.0)}
    assert torch.equal(sparse_delta(before, after, fraction=1)["w"], torch.ones(2, 2))


@pytest.mark.parametrize("make", [tiny_gpt2, lambda: tiny_llama(tie_word_embeddings=False), lambda: tiny_llama(tie_word_embeddings=True)])
def test_names_and_modules_agree_on_the_scope(make):
    model = make()
    state = dict(model.state_dict())
    chosen = {name for name in state if default_scope()(name, state[name])}
    assert chosen == {name for name in state if default_scope(model)(name, state[name])}
    assert len(chosen) == (8 if "gpt2" in type(model).__name__.lower() else 14)
    assert not any("embed" in name or "wte" in name or "wpe" in name or "head" in name for name in chosen)
    with_embeddings = {name for name in state if default_scope(model, include_embeddings=True)(name, state[name])}
    assert {"lm_head.weight"} <= with_embeddings - chosen


def test_the_model_knows_embeddings_that_names_do_not_show():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix = nn.Embedding(4, 4), nn.Linear(4, 4)

    inside = default_scope(Words())
    assert not inside("table.weight", torch.zeros(4, 4))
    assert inside("mix.weight", torch.zeros(4, 4))
    assert default_scope()("table.weight", torch.zeros(4, 4))


def test_drift_table_shares_add_up(states):
    before, after = states
    table = drift_table(before, after, sparse_delta(before, after, fraction=0.1)).set_index("name")
    assert table.share_of_change.sum() == pytest.approx(1)
    assert table.share_of_removed.sum() == pytest.approx(1)
    row = table.loc["transformer.h.1.mlp.c_fc.weight"]
    assert (row.module, row.n_entries, row.n_removed) == ("transformer.h.1.mlp.c_fc", 256, 25)
    assert 0.1 < row.change_removed < 0.8  # the largest tenth carries more than its share
    name = "transformer.h.1.mlp.c_fc.weight"
    squares = {key: float((after[key].double() - before[key].double()).square().sum()) for key in before if key != "lm_head.weight"}
    assert row.share_of_change == pytest.approx(squares[name] / sum(squares.values()), rel=1e-5)
    assert table.loc["transformer.wte.weight"].n_removed == 0


def test_drift_of_equal_states_is_zero():
    state = {"w": torch.ones(2, 2)}
    assert drift_table(state, state, state).iloc[0].drop(["name", "module"]).tolist() == [4, 0, 0, 0, 0, 0]


W = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("before", "after", "error", "message"),
    [
        ({"w": W}, {"v": W}, StateMismatchError, r"1 only before \(first three: \['w'\]\), 1 only after"),
        ({"w": W}, {"w": torch.zeros(3, 2)}, StateMismatchError, r"'w' has shape \(2, 2\) before and \(3, 2\) after"),
        ({"w": W}, {"w": W.bfloat16()}, StateMismatchError, "old values would be rounded"),
        ({"b": W[0]}, {"b": W[0]}, SettingError, "none of 1 tensors is in scope"),
        ({"a.weight": W.to(torch.int8)}, {"a.weight": W.to(torch.int8)}, SettingError, "1 tensors are quantised"),
        ({"a.qweight": W.int()}, {"a.qweight": W.int()}, SettingError, "1 tensors are quantised"),
        ({"a.weight": W, "a.weight.absmax": W}, {"a.weight": W, "a.weight.absmax": W}, SettingError, "Load both models without"),
        ({"q.lora_A.weight": W}, {"q.lora_A.weight": W}, SettingError, "unmerged LoRA adapter"),
        ({"w": W}, {"w": W + torch.nan}, DataError, "4 of 4 entries of the change of 'w' are NaN"),
    ],
)
def test_states_that_do_not_fit_are_refused(before, after, error, message):
    with pytest.raises(error, match=message):
        sparse_delta(before, after)


def test_a_scope_of_integers_and_unknown_others_are_refused():
    state = {"steps": torch.zeros(2, 2, dtype=torch.int64)}
    with pytest.raises(SettingError, match="only floating-point tensors"):
        sparse_delta(state, state, scope=lambda name, tensor: True)
    with pytest.raises(SettingError, match=r"others='bfore' is unknown\. Did you mean 'before'"):
        sparse_delta({"w": W}, {"w": W}, others="bfore")


def test_integer_buffers_follow_the_rest():
    before, after = {"w": W, "n": torch.tensor(1)}, {"w": W + 1, "n": torch.tensor(5)}
    assert sparse_delta(before, after)["n"] == 5
    assert sparse_delta(before, after, fraction=1, scope=everything)["n"] == 1
