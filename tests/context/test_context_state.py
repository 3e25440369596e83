"""States as values: copies, rows, bytes, files."""

from dataclasses import replace

import pytest
import torch
from context_models import WINDOW, close, every, every_kind, fresh, ids, in_pieces, same_memory, shared, start

from remanence.context.state import ContextState, load_context_state, save_context_state
from remanence.errors import DataError, StateMismatchError
from remanence.state import all_finite, save_state, states_equal


def after_reading(name, batch=3, length=18, dtype=torch.float64):
    """A model, and a state with full memory, a partial window, and a cache."""
    model = shared(name, dtype)
    _, state = model(ids(batch, length - 1, "state"), start(model, batch))
    return model, model.step(ids(batch, 1, "state step"), state)[1]


# --- copies and rows ---------------------------------------------------------------------------------------------------


@every
def test_rows_are_split_joined_and_chosen(name):
    model, state = after_reading(name)
    rows = state.split()
    assert [row.batch for row in rows] == [1, 1, 1]
    same_memory(ContextState.join(rows), state, 0.0)
    assert ContextState.join(rows).cache is None
    on = ids(3, 3, "rows on")
    logits, _ = model.step(on, state)
    for number, row in enumerate(rows):
        close(model.step(on[number : number + 1], row)[0], logits[number : number + 1])
    for chosen in (torch.tensor([2, 0, 0]), torch.tensor([True, False, True]), torch.tensor([], dtype=torch.int64)):
        picked = state.index_select(chosen)
        assert torch.equal(picked.tail, state.tail[chosen])
        close(model(on[chosen], picked)[0], model(on, state)[0][chosen])
    turned = ContextState.join(rows[::-1])
    close(model(on.flip(0), turned)[0].flip(0), model(on, state)[0])


@every_kind
def test_rows_read_apart_may_go_on_together(name):
    """Rows with windows of their own: one in a document's middle, one new, one that was reset."""
    model, on = shared(name), ids(3, 6, "apart on")
    states = [model(ids(1, length, "apart"), start(model, 1))[1] for length in (13, 0, 7)]
    states[2] = states[2].reset(torch.tensor([True]))
    logits, _ = model(on, ContextState.join(states))
    for row, state in enumerate(states):
        close(logits[row : row + 1], model(on[row : row + 1], state)[0])


@every_kind
def test_a_fork_shares_no_memory(name):
    _, state = after_reading(name)
    fork = state.fork()
    assert states_equal(fork.state_dict(), state.state_dict())
    assert states_equal(fork.cache, state.cache)
    own = {value.data_ptr() for value in state._tensors().values() if value.numel()}
    assert not own & {value.data_ptr() for value in fork._tensors().values() if value.numel()}


@every_kind
def test_reset_takes_masks_and_numbers_and_leaves_the_original(name):
    _, state = after_reading(name)
    kept = state.fork()
    by_mask, by_number = state.reset(torch.tensor([False, True, True])), state.reset(torch.tensor([1, 2]))
    assert states_equal(by_mask.state_dict(), by_number.state_dict())
    assert states_equal(state.state_dict(), kept.state_dict())
    assert (by_mask.n_tokens.tolist(), by_mask.document.tolist()) == ([18, 0, 0], [0, 1, 1])
    empty = start(shared(name), 2)
    assert states_equal(by_mask.index_select(torch.tensor([1, 2])).memory(), empty.memory())
    assert states_equal(state.reset(torch.tensor([], dtype=torch.int64)).state_dict(), state.state_dict())


@every_kind
def test_detach_keeps_the_numbers(name):
    model = fresh(name)
    _, state = model(ids(1, 10, "detach"), start(model, 1))
    detached = state.detach()
    assert states_equal(detached.state_dict(), state.state_dict())
    assert not any(value.requires_grad for value in detached.memory().values())
    assert any(value.requires_grad for value in state.memory().values() if value.numel()) or name == "windowed"


@every_kind
def test_many_calls_without_a_detach_teach_as_one_does(name):
    found = []
    for cuts in ((), range(1, 16)):
        model, tokens = fresh(name, spread=0.05), ids(1, 16, "many")
        logits, _ = in_pieces(model, tokens, start(model, 1), cuts)
        logits.square().mean().backward()
        found.append(model.embedding.weight.grad)
    close(*found)


@every_kind
def test_what_was_read_in_inference_mode_can_be_trained_on(name):
    tokens, found = ids(2, 13, "inference"), []
    for is_inference in (True, False):
        model = fresh(name, torch.float32)
        with torch.inference_mode(is_inference):
            _, state = model(ids(2, 22, "before"))
        loss, _ = model.loss(tokens, tokens, state.fork())
        loss.backward()
        found.append(model.embedding.weight.grad)
    close(*found, 1e-5)


@every_kind
def test_bfloat16_products_change_no_shape_or_dtype(name):
    model, tokens = shared(name, torch.float32), ids(2, 11, "autocast")
    _, state = model(ids(2, 18, "autocast before"))
    plain, after = model(tokens, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, found = model(tokens, state)
        stepped, step_found = in_pieces(model.step, tokens, state, range(1, 11))
        new = list(model.generate(tokens, state, max_new_tokens=6, temperature=0))
    for one, two in ((found, after), (step_found, after)):
        assert {key: (value.shape, value.dtype) for key, value in one.state_dict().items()} == {
            key: (value.shape, value.dtype) for key, value in two.state_dict().items()
        }
    assert logits.shape == stepped.shape == plain.shape
    assert ((logits - plain).abs().mean(), (stepped - plain).abs().mean()) < (0.1, 0.1)
    assert len(new) == 6


@every_kind
def test_steps_go_on_outside_autocast_and_inside_it_again(name):
    model, tokens = shared(name, torch.float32), ids(1, 3, "in and out")
    _, state = model(ids(1, 4 * WINDOW, "in and out before"))
    whole, _ = model(tokens, state)
    found = []
    for place, is_short in enumerate((True, False, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_short):
            logits, state = model.step(tokens[:, place : place + 1], state)
        found.append(logits.float())
    assert (torch.cat(found, dim=1) - whole).abs().mean() < 0.1


@every_kind
def test_training_under_autocast_gives_finite_gradients(name):
    model, tokens = fresh(name, torch.float32), ids(2, 19, "autocast train")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, state = model.loss(tokens, tokens)
        again, _ = model.loss(tokens, tokens, state)
    (loss + again).backward()
    assert loss.dtype == torch.float32
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


@every_kind
def test_memory_in_bfloat16(name):
    model, tokens = shared(name, torch.float32), ids(1, 22, "half")
    state = model.init_state(1, dtype=torch.bfloat16)
    logits, after = in_pieces(model, tokens, state, (5, 12))
    assert after.nbytes() == model.init_state(1).nbytes() // 2
    assert all(value.dtype == torch.bfloat16 for value in after.memory().values() if value.is_floating_point())
    assert all_finite(logits)
    _, stepped = model.step(tokens[:, 5:6], model(tokens[:, :5], model.init_state(1))[1])
    assert stepped.cache is not None
    shorter = stepped.to(dtype=torch.bfloat16)
    assert (model.step(tokens[:, 6:7], shorter)[0] - logits[:, 6:7]).abs().mean() < 0.2


@every
def test_to_moves_every_tensor_and_changes_floats_alone(name):
    model, state = after_reading(name)
    on_meta = state.to("meta")
    assert all(value.is_meta for value in on_meta._tensors().values())
    assert (on_meta.nbytes(), on_meta.nbytes("kv"), on_meta.nbytes("all")) == (state.nbytes(), state.nbytes("kv"), state.nbytes("all"))
    with pytest.raises(DataError, match=r"state: it lies on meta, the tokens on cpu; move it"):  # never read as if it were here
        model(ids(3, 4, "moved"), on_meta)
    single = state.to(dtype=torch.float32)
    assert single.n_tokens.dtype == torch.int64
    assert single.nbytes() * 2 == state.nbytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")
@every_kind
def test_a_state_moves_to_the_accelerator_and_back(name):
    model, tokens = fresh(name, torch.float32), ids(2, 40, "gpu")
    expected, after = in_pieces(model, tokens, None, (6, 17))
    expected.square().mean().backward()
    gradient, model.embedding.weight.grad = model.embedding.weight.grad, None
    _, state = model(tokens[:, :6])
    model, state = model.to("cuda"), state.to("cuda")
    logits, found = in_pieces(model, tokens[:, 6:].cuda(), state, (11,))
    close(logits.cpu(), expected[:, 6:], 1e-3)
    same_memory(found.to("cpu"), after, 1e-3)
    in_pieces(model, tokens.cuda(), None, (6, 17))[0].square().mean().backward()
    close(model.embedding.weight.grad.cpu(), gradient, 1e-3)
    assert len(list(model.generate(tokens[:, :1].cuda(), found, max_new_tokens=9, temperature=0))) == 9


# --- bytes and files ------------------------------------------------------------------------------------------------------


@every_kind
def test_kinds_of_bytes(name):
    model, state = after_reading(name)
    assert state.nbytes() == state.nbytes("stored") == sum(v.nbytes for v in state.memory().values() if v.is_floating_point())
    assert state.nbytes("all") > state.nbytes() + state.tail.nbytes
    assert replace(state, cache=None).nbytes("all") < state.nbytes("all")
    with pytest.raises(DataError, match="kind 'disk' is unknown; choose one of stored, kv, all"):
        state.nbytes("disk")
    assert model.init_state(0).nbytes("all") == 0


@every
def test_c7_a_loaded_state_goes_on_as_if_it_had_never_left(name, tmp_path):
    model, state = after_reading(name)
    save_context_state(tmp_path / "deep/folder/state", state, model)
    loaded = load_context_state(tmp_path / "deep/folder/state", model)
    assert type(loaded) is type(state)
    assert states_equal(loaded.state_dict(), state.state_dict())
    on = ids(3, 11, "file on")
    (one, first), (two, second) = (model(on, each) for each in (state, loaded))
    assert torch.equal(one, two)
    assert states_equal(first.state_dict(), second.state_dict())
    close(model.step(on[:, :2], loaded)[0], one[:, :2])


def test_c7_states_evicted_one_by_one_equal_those_that_stayed(tmp_path):
    model, state = after_reading("melodi")
    for number, row in enumerate(state.split()):
        save_context_state(tmp_path / f"{number}", row, model)
    back = ContextState.join([load_context_state(tmp_path / f"{number}", model) for number in range(3)])
    assert states_equal(back.state_dict(), state.state_dict())


def test_no_rows_can_be_saved(tmp_path):
    model = shared("memorizing")
    save_context_state(tmp_path / "state", start(model, 0), model)
    assert load_context_state(tmp_path / "state", model).batch == 0


def test_files_that_are_refused(tmp_path):
    model, state = after_reading("melodi")
    path = tmp_path / "state"
    with pytest.raises(DataError, match=r"there is no file .*state; give a file that save_context_state wrote"):
        load_context_state(path, model)
    save_context_state(path, state, model)
    for other in (fresh("melodi", long_windows=4), fresh("melodi", window=8), fresh("melodi", vocab_size=12), shared("transformer-xl")):
        with pytest.raises(StateMismatchError, match=r"belongs to a 'remanence-melodi' with the fingerprint \w{16}, this model is a"):
            load_context_state(path, other)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not a state"):
        path.write_bytes(broken)
        with pytest.raises(StateMismatchError, match=r"state is not a whole remanence state .*Delete it"):
            load_context_state(path, model)
    save_state(path, {"something": 1, "else": 2})
    with pytest.raises(StateMismatchError, match=r"is no context state; it holds \['else', 'something'\]"):
        load_context_state(path, model)


def test_fields_that_are_missing_are_refused():
    model, state = after_reading("melodi")
    fields = state.state_dict()
    del fields["short"]
    with pytest.raises(StateMismatchError, match=r"MelodiState has the fields \['document', .*'short'.* got \['document'.* own model"):
        model.restore_state(fields)
    restored = model.restore_state(state.state_dict())
    assert states_equal(restored.state_dict(), state.state_dict())
    assert restored.short.data_ptr() != state.short.data_ptr()


def test_states_that_cannot_be_joined():
    with pytest.raises(DataError, match="no states were given; give at least one"):
        ContextState.join([])
    with pytest.raises(DataError, match=r"different models \(MelodiState, TransformerXLState\)"):
        ContextState.join([start(shared("melodi"), 1), start(shared("transformer-xl"), 1)])
    with pytest.raises(DataError, match=r"different models \(TransformerXLState\) have different shapes"):
        ContextState.join([start(shared("transformer-xl"), 1), start(shared("windowed"), 1)])
