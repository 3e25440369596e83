"""What holds for every model that carries a state: C1 to C11, and a module that reading leaves as it was."""

import pytest
import torch
from context_models import (
    BOS,
    CARRY_NOTHING,
    RARE,
    VOCAB,
    WINDOW,
    Call,
    close,
    documents_of,
    every,
    every_kind,
    fresh,
    ids,
    in_pieces,
    same_memory,
    shared,
    start,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from remanence.state import states_equal

# --- C1: causality ---------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("place", [0, 5, 8, 15, 21])
def test_c1_a_token_changes_nothing_before_it(name, place):
    model, tokens = shared(name), ids(2, 22, "causal")
    changed = tokens.clone()
    changed[0, place] = RARE
    (one, _), (two, _) = model(tokens), model(changed)
    assert torch.equal(one[:, :place], two[:, :place])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0, place], two[0, place])
    if name not in CARRY_NOTHING and place < 16:
        assert not torch.equal(one[0, place // WINDOW * WINDOW + WINDOW :], two[0, place // WINDOW * WINDOW + WINDOW :])


@every_kind
def test_c1_holds_with_gradients_too(name):
    model, tokens = fresh(name), ids(1, 14, "causal")
    changed = tokens.clone()
    changed[0, 9] = RARE
    assert torch.equal(model(tokens)[0][:, :9], model(changed)[0][:, :9])


@pytest.mark.parametrize("name", CARRY_NOTHING)
def test_without_memory_a_window_sees_itself_alone(name):
    model, tokens = shared(name), ids(1, 12, "alone")
    assert model(tokens)[1].nbytes("stored") == model(tokens)[1].nbytes("kv") == 0
    close(model(tokens)[0][:, 8:], model(tokens[:, 8:])[0])


# --- C2, C3, C4, C11: however documents are cut, batched and begun ----------------------------------------------------


@every
@pytest.mark.parametrize("cuts", [(4, 8, 12), (1, 2, 3), (3, 3, 9), (6, 13, 14), (0, 8, 19)])
def test_c2_cuts_change_nothing(name, cuts):
    model, tokens = shared(name), ids(2, 19, "cuts")
    whole, after = model(tokens, start(model, 2))
    logits, state = in_pieces(model, tokens, start(model, 2), cuts)
    close(logits, whole)
    same_memory(state, after)


@every
@pytest.mark.parametrize("cuts", [range(1, 19), (2, 5, 6, 13), (3, 4, 8, 11)])
def test_c2_c11_steps_read_as_one_call_does(name, cuts):
    model, tokens = shared(name), ids(2, 19, "steps")
    whole, after = model(tokens, start(model, 2))
    logits, state = in_pieces(model.step, tokens, start(model, 2), cuts)
    close(logits, whole)
    same_memory(state, after)


@every
def test_c2_c11_in_single_precision(name):
    model, tokens = shared(name, torch.float32), ids(2, 30, "single")
    whole, after = model(tokens)
    for read, cuts in ((model, (5, 8, 16, 17)), (model.step, range(1, 30))):
        logits, state = in_pieces(read, tokens, None, cuts)
        close(logits, whole, 1e-5)
        same_memory(state, after, 1e-5)
        assert (logits - whole).norm() <= 1e-4 * whole.norm()


@st.composite
def plans(draw):
    """Calls of any length, with rows of any length, and documents that begin anywhere."""
    batch, source = draw(st.integers(1, 3)), draw(st.integers(0, 1000))
    calls = []
    for number in range(draw(st.integers(1, 3))):
        length = draw(st.integers(0, 13))
        lengths = draw(st.none() | st.lists(st.integers(0, length), min_size=batch, max_size=batch))
        places = st.tuples(st.integers(0, batch - 1), st.integers(0, max(length - 1, 0)))
        reset = torch.zeros(batch, length, dtype=torch.bool)
        for row, place in draw(st.lists(places, max_size=4)) if length else []:
            reset[row, place] = True
        has_reset = bool(reset.any()) or draw(st.booleans())
        lengths = None if lengths is None else torch.tensor(lengths)
        calls.append(Call(ids(batch, length, source, number), lengths, reset if has_reset else None))
    return calls


def agrees_with_rows_alone(model, calls):
    """Every document of a plan reads as it does alone, in one call, from a fresh state; so does the state that is left."""
    state, found = start(model, len(calls[0].tokens)), []
    for call in calls:
        logits, state = model(call.tokens, state, call.lengths, call.reset)
        found.append(logits)
    for row, documents in enumerate(documents_of(calls)):
        assert int(state.document[row]) == len(documents) - 1
        for document in documents:
            tokens = torch.tensor([[token for *_, token in document]], dtype=torch.int64)
            alone, after = model(tokens, start(model, 1))
            for place, (number, where, _) in enumerate(document):
                close(found[number][row, where], alone[0, place])
        same_memory(state.index_select(torch.tensor([row])), after)


@every
@given(calls=plans())
@settings(max_examples=6, deadline=None, derandomize=True)
def test_c2_c3_c4_rows_of_any_length_and_documents_that_begin_anywhere(name, calls):
    agrees_with_rows_alone(shared(name), calls)


def _resets(length, *places):
    reset = torch.zeros(1, length, dtype=torch.bool)
    reset[0, list(places)] = True
    return reset


@every
@pytest.mark.parametrize(
    ("before", "length", "resets", "after"),
    [
        (6, 7, (0,), 9),  # at the first token, with a partial window open
        (8, 12, (0,), 9),  # whole windows on either side
        (7, 3, (1, 2), 9),  # twice in a window
        (2, 6, (0, 1, 2, 3, 4, 5), 9),  # at every token
        (5, 10, (3, 8), 0),
    ],
)
def test_c4_a_document_that_begins_inside_a_call_sees_nothing_from_before(name, before, length, resets, after):
    calls = [
        Call(ids(1, before, "before"), None, None), Call(ids(1, length, "begins"), None, _resets(length, *resets)),
        Call(ids(1, after, "after"), None, None),
    ]  # fmt: skip
    agrees_with_rows_alone(shared(name), calls)


@every_kind
def test_c3_rows_that_have_ended_keep_their_state(name):
    model = shared(name)
    _, state = model(ids(3, 10, "ended"), start(model, 3))
    lengths = torch.tensor([0, 9, 0])
    _, after = model(ids(3, 9, "goes on"), state, lengths)
    for row in (0, 2):
        assert states_equal(*(each.index_select(torch.tensor([row])).memory() for each in (state, after)))
        same_memory(*(each.index_select(torch.tensor([row])) for each in (state, after)), 0.0)


@every_kind
def test_c3_what_stands_in_the_padding_is_not_read(name):
    model, lengths = shared(name), torch.tensor([3, 7])
    tokens = ids(2, 9, "padded")
    garbage = tokens.clone()
    garbage[0, 3:], garbage[1, 7:] = RARE, BOS
    (one, first), (two, second) = (model(each, start(model, 2), lengths) for each in (tokens, garbage))
    assert torch.equal(one[0, :3], two[0, :3])
    assert torch.equal(one[1, :7], two[1, :7])
    same_memory(first, second, 0.0)


@every_kind
def test_c3_a_reset_in_the_padding_begins_nothing(name):
    model, reset = shared(name), torch.zeros(2, 5, dtype=torch.bool)
    reset[0, 0] = reset[1, 3] = True
    _, state = model(ids(2, 6, "pad"), start(model, 2))
    lengths = torch.tensor([0, 3])
    (_, plain), (_, marked) = (model(ids(2, 5, "pad on"), state, lengths, each) for each in (None, reset))
    assert marked.document.tolist() == [0, 0]
    same_memory(plain, marked, 0.0)


# --- C5: gradients -----------------------------------------------------------------------------------------------------


def gradient_of_the_first_window(model, detached):
    """How the logits of the third window depend on a token that stands in the first alone."""
    tokens = ids(1, 3 * WINDOW, "far")
    tokens[0, 1] = RARE
    _, state = model(tokens[:, :WINDOW], start(model, 1))
    logits, _ = model(tokens[:, WINDOW:], state.detach() if detached else state)
    logits[:, -1].square().sum().backward()
    return model.embedding.weight.grad[RARE].abs().max().item()


@every
def test_c5_gradients_reach_back_through_memory_and_stop_at_detach(name):
    inside = gradient_of_the_first_window(fresh(name), detached=False)
    assert inside == 0.0 if name in CARRY_NOTHING else inside > 1e-6
    assert gradient_of_the_first_window(fresh(name), detached=True) == 0.0


@every
def test_c5_gradients_are_the_same_however_a_document_is_cut(name):
    tokens = ids(2, 15, "gradient")
    targets = ids(2, 15, "targets")
    found = []
    for cuts in ((), (3, 4, 9)):
        model = fresh(name)
        logits, _ = in_pieces(model, tokens, start(model, 2), cuts)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        found.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        close(found[0][key], found[1][key])


@every_kind
def test_c5_a_document_that_begins_gets_no_gradient_from_before(name):
    model, tokens = fresh(name), ids(1, 14, "begins")
    tokens[0, 2] = RARE
    logits, state = model(tokens, start(model, 1), reset=_resets(14, 6))
    (logits[:, 6:].sum() + sum(value.sum() for value in state.memory().values() if value.requires_grad)).backward()
    assert model.embedding.weight.grad[RARE].abs().max() == 0.0


@every
def test_no_gradient_is_nan_where_a_row_sees_nothing(name):
    """The first token of a document sees no key at all; its neighbours in the batch may see all."""
    model = fresh(name, torch.float32)
    _, state = model(ids(2, 9, "nan"))
    logits, _ = model(ids(2, 9, "nan on"), state.reset(torch.tensor([True, False])), lengths=torch.tensor([1, 9]))
    logits[0, 0].sum().backward()
    assert logits.isfinite().all()
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


# --- C6: bytes ---------------------------------------------------------------------------------------------------------

_D, _N = 8, 3
BYTES = {  # floats of one row, (stored, kv)
    "melodi": (_N * 2 * _D + 2 * 3 * _D, _N * 2 * _D + 2 * 2 * 3 * _D),
    "melodi token gate, two queues": (_N * 2 * _D + 2 * 2 * 3 * _D, _N * 2 * _D + 2 * 2 * 2 * 3 * _D),
    "melodi summary 3": (_N * 2 * _D + 2 * 3 * _D, _N * 2 * _D + 2 * 2 * 3 * _D),
    "melodi without short": (2 * 3 * _D, 2 * 2 * 3 * _D),
    "melodi without long": (_N * 2 * _D,) * 2,
    "melodi without memory": (0, 0),
    "windowed": (0, 0),
    "transformer-xl": (_N * WINDOW * 2 * _D,) * 2,
    "transformer-xl, two windows": (_N * 2 * WINDOW * 2 * _D,) * 2,
    "memorizing": (3 * WINDOW * 2 * _D + (_N - 1) * WINDOW * 2 * _D,) * 2,
    "memorizing without cache": (2 * WINDOW * 2 * _D,) * 2,
    "block-recurrent": (3 * _D + _N * WINDOW * 2 * _D,) * 2,
    "block-recurrent without cache": (5 * _D,) * 2,
}


@pytest.mark.parametrize(("name", "floats"), BYTES.items())
def test_c6_bytes_are_those_of_the_formula(name, floats):
    model = shared(name, torch.float32)
    _, full = model(ids(2, 40, "bytes"))
    for state in (model.init_state(2), full):
        assert (state.nbytes(), state.nbytes("kv")) == tuple(2 * 4 * n for n in floats)
        assert state.to(dtype=torch.bfloat16).nbytes("kv") == 2 * 2 * floats[1]


# --- C8: odd sizes -------------------------------------------------------------------------------------------------------


@every
def test_c8_nothing_to_read(name):
    model = shared(name)
    state = start(model, 2)
    for read in (model, model.step):
        logits, after = read(torch.zeros(2, 0, dtype=torch.int64), state)
        assert logits.shape == (2, 0, VOCAB)
        assert after is state
    _, state = model(ids(2, 6, "none"), state)
    assert model(torch.zeros(2, 0, dtype=torch.int64), state)[1] is state


@every
@pytest.mark.parametrize("length", [0, 3, 4, 9])
def test_c8_no_rows(name, length):
    model = shared(name)
    for read in (model, model.step):
        logits, state = read(torch.zeros(0, length, dtype=torch.int64), start(model, 0))
        assert logits.shape == (0, length, VOCAB)
        assert (state.batch, state.nbytes("all")) == (0, 0)


@every
@pytest.mark.parametrize("length", [1, 3])
def test_c8_less_than_a_window_is_held_and_writes_nothing(name, length):
    model = shared(name)
    tokens = ids(1, length, "held")
    _, state = model(tokens, start(model, 1))
    assert states_equal(state.memory(), start(model, 1).memory())
    assert (int(state.n_tokens), int(state.n_windows), int(state.n_tail)) == (length, 0, length)
    assert torch.equal(state.tail[:, :length], tokens)


# --- C9: flat memory -------------------------------------------------------------------------------------------------------


WIDE = {
    "windowed": {}, "melodi": {}, "transformer-xl": {"cache": 100}, "memorizing": {"cache": 100, "memory": 200},
    "block-recurrent": {"cache": 100},
}  # fmt: skip


@pytest.mark.parametrize(("name", "sizes"), WIDE.items())
def test_c9_the_state_does_not_grow_over_a_hundred_thousand_tokens(name, sizes):
    model, tokens = fresh(name, torch.float32, window=100, num_hidden_layers=2, **sizes).requires_grad_(False), ids(1, 4990, "long")
    state, found = model.init_state(1), set()
    for _ in range(21):
        _, state = model(tokens, state)
        found.add(state.nbytes("all"))
    assert len(found) == 1
    assert state.n_tokens.tolist() == [21 * 4990]
    assert all(value.untyped_storage().nbytes() <= 2 * value.nbytes for value in state.memory().values())  # no view of something larger


# --- C10: gradients against differences --------------------------------------------------------------------------------------


@every
def test_c10_gradients_agree_with_differences_and_with_single_precision(name):
    model, tokens = fresh(name), ids(1, 14, "gradcheck")
    shapes = {key: value.shape for key, value in model.named_parameters()}
    flat = torch.cat([value.detach().flatten() for value in model.parameters()]).requires_grad_()

    def loss(numbers):
        parts = numbers.split([shape.numel() for shape in shapes.values()])
        weights = {key: part.view(shape) for part, (key, shape) in zip(parts, shapes.items(), strict=True)}
        return functional_call(model, weights, (tokens, start(model, 1)))[0].square().mean()

    torch.autograd.gradcheck(loss, flat, fast_mode=True, atol=1e-6, rtol=1e-4)
    found = []
    for dtype in (torch.float64, torch.float32):
        copy = fresh(name, spread=0.05).to(dtype)
        copy(tokens, start(copy, 1))[0].square().mean().backward()
        found.append(copy.embedding.weight.grad.double())
    close(*found, 1e-4)
