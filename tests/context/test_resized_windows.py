"""A MELODI model cropped to shorter windows: what it keeps, and that it says what it lost."""

import pytest
import torch
from context_models import WINDOW, close, fresh, ids, start

from remanence.errors import SettingError


@pytest.mark.parametrize("name", ["melodi", "melodi token gate, two queues", "melodi summary 3", "melodi without branching"])
def test_the_first_window_is_read_alike_and_what_memory_made_of_its_last_tokens_is_kept(name):
    model = fresh(name)
    model.embedding.weight.requires_grad_(False)
    with torch.no_grad():
        for layer in model.layers:
            for part in (layer.mix_short, layer.mix_long):
                if part is not None:
                    part.weight[:, : WINDOW - 3] = 0.0  # of a window's first token nothing is remembered
    with pytest.warns(UserWarning, match="mixers trained for windows of 4 are cropped to 3; train them again"):
        short = model.resize_window(3)
    assert (short.config.window, model.config.window, short.training) == (3, 4, model.training)
    assert not short.embedding.weight.requires_grad
    tokens = ids(2, 3)
    logits, state = short(tokens, start(short, 2))
    close(logits, model(tokens, start(model, 2))[0])
    padded = torch.cat([ids(2, 1, "first"), tokens], 1)
    assert state.short.shape == model(padded, start(model, 2))[1].short.shape
    for mine, theirs in zip(short.layers, model.layers, strict=True):
        y = torch.randn(2, WINDOW + model.config.summary, model.config.hidden_size, dtype=torch.float64)
        close(mine.mix_short(y[:, 1:]), theirs.mix_short(y))


@pytest.mark.parametrize("window", [0, 2.0, WINDOW, WINDOW + 1])
def test_windows_that_are_not_shorter_are_refused(window):
    with pytest.raises(SettingError, match=rf"resize_window: window={window} must be 1 to 3"):
        fresh("melodi").resize_window(window)
