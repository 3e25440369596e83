"""What the peers of models that carry a state get wrong (sections 3 and 6 of the catalogue), each shown to be absent; and the loss."""

import math

import pytest
import torch
from context_models import VOCAB, ZOO, close, every, every_kind, fresh, ids, same_memory, shared, start

from remanence.errors import DataError
from remanence.state import states_equal


@every
def test_peers_nothing_is_hidden_in_the_module(name):
    """transformers 7584, flax variables per mode, memories on disk: reading leaves a model as it was."""
    model = shared(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert not list(model.buffers())
    keys = {module: set(vars(module)) for module in model.modules()}
    first, _ = model(ids(2, 9, "hidden"))
    model.step(ids(3, 1, "hidden"), start(model, 3))
    assert {module: set(vars(module)) for module in model.modules()} == keys
    assert states_equal(model.state_dict(), before)
    assert torch.equal(model(ids(2, 9, "hidden"))[0], first)


@every_kind
def test_peers_evaluation_in_between_leaves_training_memory_alone(name):
    """transformers 7584: memories kept across train and evaluation, or across batch sizes."""
    model = fresh(name)
    _, state = model.train()(ids(2, 10, "train"), start(model, 2))
    kept = state.fork()
    model.eval()(ids(5, 10, "evaluate"), start(model, 5))
    assert states_equal(state.state_dict(), kept.state_dict())
    with pytest.raises(DataError, match=r"\(2 rows, .* tail 4\) for 5 rows .* init_state\(5\)"):
        model(ids(5, 10, "evaluate"), state)


@every_kind
def test_peers_a_call_never_writes_into_the_state_it_was_given(name):
    model = shared(name)
    _, state = model(ids(2, 10, "given"), start(model, 2))
    kept = state.fork()
    for read in (model, model.step):
        for length in (1, 2, 5):
            read(ids(2, length, "given on"), state)
    assert states_equal(state.state_dict(), kept.state_dict())
    _, stepped = model.step(ids(2, 1, "given step"), state)
    cache = {key: value.clone() for key, value in stepped.cache.items()}
    model.step(ids(2, 1, "given step"), stepped)
    assert states_equal(stepped.cache, cache)


@pytest.mark.parametrize("name", [name for name in ZOO if name != "melodi empty zero"])
def test_peers_slots_that_were_never_written_are_not_read(name):
    """Both released codes fill empty slots with zeros and attend to them; here garbage in them changes no logit."""
    model = shared(name)
    for length in (0, 3, 6):
        _, state = model(ids(1, length, "slots"), start(model, 1))
        _, full = model(ids(1, 40, "others"), start(model, 1))
        spoilt = {}
        for key, value in state.memory().items():
            is_unwritten = value == 0
            spoilt[key] = torch.where(is_unwritten, getattr(full, key), value) if value.is_floating_point() else value
        garbage = type(state)(**state.state_dict() | spoilt, cache=None)
        for read in (model, model.step):
            close(read(ids(1, 3, "slots on"), garbage)[0], read(ids(1, 3, "slots on"), state)[0])


@every
def test_peers_memory_can_be_cleared(name):
    """lucidrains' `clear_memory` raises; here a cleared row is a fresh one, and its neighbour stays."""
    model, on = shared(name), ids(2, 9, "cleared on")
    _, state = model(ids(2, 14, "cleared"), start(model, 2))
    _, state = model.step(ids(2, 1, "cleared"), state)
    cleared = state.reset(torch.tensor([True, False]))
    assert cleared.document.tolist() == [1, 0]
    assert states_equal(state.index_select(torch.tensor([1])).memory(), cleared.index_select(torch.tensor([1])).memory())
    logits, _ = model(on, cleared)
    close(logits[:1], model(on[:1], start(model, 1))[0])
    close(logits[1:], model(on, state)[0][1:])


@every_kind
def test_peers_the_first_batch_sizes_do_not_bind_later_ones(name):
    model = shared(name)
    for batch in (3, 1, 2):
        logits, state = model(ids(batch, 6, "sizes", batch))
        assert (logits.shape, state.batch) == ((batch, 6, VOCAB), batch)


@every
def test_loss_is_the_mean_over_counted_targets(name):
    model, tokens, targets = shared(name), ids(2, 9, "loss"), ids(2, 9, "loss targets")
    targets[0, :4] = -1
    loss, state = model.loss(tokens, targets, start(model, 2))
    logits, after = model(tokens, start(model, 2))
    chances = logits.log_softmax(-1)
    plain = [-chances[row, place, targets[row, place]].item() for row in range(2) for place in range(9) if targets[row, place] >= 0]
    assert math.isclose(loss.item(), math.fsum(plain) / 14, rel_tol=1e-6)
    same_memory(state, after, 0.0)
