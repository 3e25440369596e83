"""MELODI at the edges of its specification; and the released code's faults, each shown to be absent."""

import pytest
import torch
from context_models import SIZES, WINDOW, close, fresh, ids, in_pieces, shared, start

from remanence.context.body import _matrix
from remanence.context.configuration import MelodiConfig
from remanence.context.melodi import MelodiLM

# --- edge cases of the specification -----------------------------------------------------------------------------------------


def test_forgotten_windows_are_not_read_and_what_remains_is_as_it_was():
    model, on = shared("melodi"), ids(1, 6, "forget on")
    _, state = model(ids(1, 5 * WINDOW + 1, "forget"), start(model, 1))
    assert sorted(state.long_window[0].tolist()) == [2, 3, 4]
    less = state.forget([3, 77])
    assert sorted(less.long_window[0].tolist()) == [-1, 2, 4]
    assert less.long[:, :, 0].abs().max() == 0.0
    assert torch.equal(less.short, state.short)
    assert sorted(state.long_window[0].tolist()) == [2, 3, 4]
    assert not torch.equal(model(on, less)[0], model(on, state)[0])
    close(in_pieces(model.step, on, less, range(1, 6))[0], model(on, less)[0])
    _, stepped = model.step(on[:, :1], state)  # a cache that was made before forgetting is not used after it
    close(model.step(on[:, 1:2], stepped.forget([3]))[0], model(on[:, :2], less)[0][:, 1:])


@pytest.mark.parametrize("nothing", [{"long_per_window": 0}, {"long_windows": 0}, {"long_layers": []}])
def test_without_a_queue_a_long_layer_is_a_short_one(nothing):
    model = fresh("melodi", **nothing)
    tokens = ids(1, 14, "no queue")
    logits, state = model(tokens, start(model, 1))
    assert all(layer.gate is None and layer.mix_long is None for layer in model.layers)
    assert state.long.numel() == 0
    close(in_pieces(model.step, tokens, start(model, 1), range(1, 14))[0], logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_may_be_of_another_dtype_than_the_weights(dtype):
    model, tokens = shared("melodi"), ids(1, 30, "dtype")
    state = model.init_state(1, dtype=dtype)
    logits, after = in_pieces(model, tokens, state, (5, 13, 20))
    assert {value.dtype for value in after.memory().values() if value.is_floating_point()} == {dtype}
    assert logits.dtype == torch.float64
    stepped, _ = in_pieces(model.step, tokens[:, 20:23], in_pieces(model, tokens[:, :20], state, (5, 13))[1], (1, 2))
    close(stepped, logits[:, 20:23], 1e-8)


# --- 'Reference code': each fault of the released code is absent ----------------------------------------------------------------


@pytest.mark.parametrize("n_windows", [0, 1, 2])
def test_released_code_a_segment_may_be_one_window_or_none(n_windows):
    """There, a line that logs the second window raises IndexError."""
    model = fresh("melodi", torch.float32)
    logits, state = model(ids(1, n_windows * WINDOW, "one"))
    assert logits.shape[1] == n_windows * WINDOW
    assert state.n_windows.tolist() == [n_windows]
    assert all(layer.attention.out.weight.shape == (8, 8) for layer in model.layers)


def test_released_code_layers_without_memory_can_be_built_and_trained():
    """There, an option names such layers and builds none."""
    model = fresh("melodi without memory", torch.float32)
    assert not [name for name, _ in model.named_parameters() if "mix" in name or "gate" in name]
    loss, _ = model.loss(ids(2, 10, "none"), ids(2, 10, "none targets"))
    loss.backward()
    assert all(value.grad is not None for value in model.parameters() if value.numel())


@pytest.mark.parametrize("length", [1, 3, 5, 11])
def test_released_code_a_length_need_be_no_multiple_of_the_window(length):
    model, tokens = shared("melodi"), ids(1, 12, "multiple")
    close(model(tokens[:, :length], start(model, 1))[0], model(tokens, start(model, 1))[0][:, :length])


def test_released_code_empty_slots_take_no_share_of_attention():
    """There, each empty slot of the queue takes the weight of a logit of 0; as an option here, for comparison with that code."""
    ours, theirs = (shared(name) for name in ("melodi", "melodi empty zero"))
    theirs.load_state_dict(ours.state_dict())
    tokens = ids(1, 4 * WINDOW, "empty")
    (one, _), (two, _) = (model(tokens, start(model, 1)) for model in (ours, theirs))
    assert (one - two)[:, 2 * WINDOW : 3 * WINDOW].abs().max() > 1e-4  # the queue holds two windows of three
    longer = MelodiLM(MelodiConfig(**ours.config.to_diff_dict() | {"long_windows": 3000})).double().eval()
    longer.load_state_dict(ours.state_dict())
    with torch.no_grad():
        close(longer(tokens, start(longer, 1))[0][:, : 3 * WINDOW], one[:, : 3 * WINDOW])  # emptiness costs nothing


def test_released_code_nothing_is_compiled_for_each_number_of_windows():
    """There, the loop over windows is unrolled by the compiler; here nothing is made anew when a call has more of them."""
    model = shared("melodi")
    model(ids(1, 2 * WINDOW, "compile"), start(model, 1))
    before = _matrix.cache_info().misses
    for n_windows in (1, 3, 8, 40):
        model(ids(1, n_windows * WINDOW, "compile"), start(model, 1))
    assert _matrix.cache_info().misses == before


def test_released_code_two_documents_may_share_a_segment():
    """There, documents begin at segment starts only."""
    model, tokens = shared("melodi"), ids(1, 13, "share")
    reset = torch.zeros(1, 13, dtype=torch.bool)
    reset[0, 7] = True
    logits, _ = model(tokens, start(model, 1), None, reset)
    close(logits[:, 7:], model(tokens[:, 7:], start(model, 1))[0])


def test_released_code_can_be_reproduced():
    config = MelodiConfig.meliad(**SIZES, short=2, long_layers=[1])
    assert (config.empty, config.initial_temperature, config.attend_self, config.short) == ("zero", 1.0, False, 2)
    assert MelodiConfig.meliad(long_layers=[0], attend_self=True).attend_self
