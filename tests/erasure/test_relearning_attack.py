"""Relearning tells hiding from removal, leaves the model alone, and gives up at its cap."""

from copy import deepcopy

import pytest
import torch
from erased_world import FORGET, World

from remanence.erasure import GradientAscent, erase, finish, median_log_p, relearning_steps
from remanence.errors import DataError, NonFiniteLoss, SettingError
from remanence.state import copy_state, states_equal

LR = 2e-3


@pytest.fixture(scope="module")
def world():
    return World()


def test_hidden_facts_come_back_sooner_than_they_are_learned_anew(world):
    erased = deepcopy(world.tuned)
    target = median_log_p(world.base, FORGET, world.tokenizer)
    finish(erase(erased, FORGET, world.tokenizer, GradientAscent(), target_log_p=target, lr=1e-3))
    hidden, anew = (relearning_steps(model, FORGET, world.tokenizer, lr=LR) for model in (erased, world.base))
    assert 0 < hidden < 0.6 * anew


def test_known_facts_take_no_step(world):
    assert relearning_steps(world.tuned, FORGET, world.tokenizer, cap=0) == 0


def test_it_is_deterministic_and_touches_nothing(world):
    model = deepcopy(world.base).train().requires_grad_(False)
    before, state = copy_state(model.state_dict()), torch.get_rng_state()
    assert len({relearning_steps(model, FORGET, world.tokenizer, lr=LR) for _ in range(2)}) == 1
    assert states_equal(before, copy_state(model.state_dict()))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not any(weight.requires_grad for weight in model.parameters())


def test_beyond_the_cap_there_is_no_number(world):
    assert relearning_steps(world.base, FORGET, world.tokenizer, lr=LR, cap=3) is None


def test_a_model_in_bfloat16_is_attacked_in_float32(world):
    steps = relearning_steps(deepcopy(world.base).bfloat16(), FORGET, world.tokenizer, lr=LR)
    assert steps == pytest.approx(relearning_steps(world.base, FORGET, world.tokenizer, lr=LR), abs=3)


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"target": 1.0}, {"target": 0.0}, {"cap": -1}])
def test_settings_out_of_range(world, settings):
    with pytest.raises(SettingError, match=r"relearning: lr=.* must be above 0, target=.* between 0 and 1, cap=.* not below 0"):
        relearning_steps(world.base, FORGET, world.tokenizer, **settings)


def test_what_cannot_be_attacked(world):
    with pytest.raises(DataError, match="there are no facts"):
        relearning_steps(world.base, [], world.tokenizer)
    with pytest.raises(NonFiniteLoss, match="NaN"):
        relearning_steps(world.base, FORGET, world.tokenizer, lr=1e30)
    quantised = deepcopy(world.base)
    quantised.is_quantized = True
    with pytest.raises(SettingError, match="those of a quantised model cannot be trained; load it in a float dtype"):
        relearning_steps(quantised, FORGET, world.tokenizer)
