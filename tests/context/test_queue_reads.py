"""Which windows a text reads from the queue: against a softmax written out, and what forgetting changes."""

import pytest
import torch
from context_models import close, ids, shared, start

from remanence.errors import DataError


def read(name, n_windows, batch=2):
    model = shared(name)
    return model, model(ids(batch, 4 * n_windows, "past"), start(model, batch))[1]


@pytest.mark.parametrize("n_windows", [1, 2, 5])
@pytest.mark.parametrize(("name", "layers"), [("melodi", [1]), ("melodi token gate, two queues", [0, 2]), ("melodi empty zero", [1])])
def test_shares_are_those_of_the_softmax_over_the_queue(name, layers, n_windows):
    """Of the first token, whose input to the long layers is caught on its way: a loop over rows, heads and slots."""
    model, state = read(name, n_windows)
    caught = []
    handles = [model.layers[layer].gate.register_forward_pre_hook(lambda gate, given: caught.append(given[2])) for layer in layers]
    found = model.trace(ids(2, 1), state)
    for handle in handles:
        handle.remove()
    for which, (layer, x) in enumerate(zip(layers, caught, strict=True)):
        own = model.layers[layer].attention
        for row in range(2):
            total = torch.zeros(3, dtype=x.dtype)
            for head in range(2):
                query = own(x)[0][row, head, 0]
                keys = own.memory(state.long[row, which].flatten(0, 1)[None])[0][0, head].view(3, 2, -1)
                e = (keys @ query).exp() * (state.long_window[row] >= 0)[:, None]
                n_zero = (state.long_window[row] < 0).sum() * 2 if name == "melodi empty zero" else 0
                total += e.sum(1) / (e.sum() + n_zero) / 2
            # what empty slots weigh is the logarithm of their number, in single precision
            close(found.share[row, 0, which], total, 1e-6 if name == "melodi empty zero" else 1e-10)
            near = model.layers[layer].gate.weight(x)
            close(1 - found.weight[row, 0, which], near[row if near.dim() == 4 else ...].mean())
    assert torch.equal(found.window, state.long_window)


def test_a_forgotten_window_is_not_read_and_an_empty_queue_has_no_shares():
    model, state = read("melodi", 3)
    found = model.trace(ids(2, 3), state.forget([1]))
    assert found.window.tolist() == [[0, -1, 2]] * 2
    assert not found.share[..., 1].any()
    torch.testing.assert_close(found.share.sum(-1), torch.ones(2, 3, 1, dtype=torch.float64))
    assert not model.trace(ids(2, 3), start(model, 2)).share.any()
    assert model.trace(ids(0, 3), start(model, 0)).share.shape == (0, 3, 1, 3)


def test_tracing_in_an_open_window_is_tracing_all_of_it():
    model, state = read("melodi", 3)
    tokens = ids(2, 3)
    whole = model.trace(tokens, state)
    _, later = model(tokens[:, :1], state)
    rest = model.trace(tokens[:, 1:], later)
    torch.testing.assert_close(rest.share, whole.share[:, 1:])
    torch.testing.assert_close(rest.weight, whole.weight[:, 1:])


def test_without_a_queue_nothing_is_read_from_it():
    model, state = read("melodi without long", 2)
    found = model.trace(ids(2, 3), state)
    assert (tuple(found.window.shape), tuple(found.share.shape), tuple(found.weight.shape)) == ((2, 0), (2, 3, 0, 0), (2, 3, 0))


def test_texts_that_do_not_fit_into_the_open_window_are_refused():
    model, state = read("melodi", 1)
    _, state = model(ids(2, 1), state)
    for length in (0, 4):
        with pytest.raises(DataError, match=rf"trace: {length} tokens; the open window has room for 3\. Give 1 to 3"):
            model.trace(ids(2, length), state)
