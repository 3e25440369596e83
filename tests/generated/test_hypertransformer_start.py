"""How a HyperTransformer begins: shares of the base, tokens that attend to their likes, two learning rates."""

import pytest
import torch

from remanence.errors import SettingError
from remanence.generated import EpisodeSampler, HyperTransformer, TargetNet
from remanence.generated.meta_trainer import MetaTrainer, episode_loss
from remanence.keys import keyed_rng
from remanence.streams import digits

TARGET = TargetNet(channels=4, image_size=8, n_layers=3)


@pytest.mark.parametrize("allocation", ["output", "spatial"])
def test_at_the_start_what_is_written_is_a_share_of_the_base(allocation):
    with keyed_rng("share"):
        model = HyperTransformer(TARGET, max_ways=5, allocation=allocation)
    given = EpisodeSampler(digits(), 3, 2, 4, tasks=2).sample(0)
    support = model.read(given.support_x, given.support_y, None, 3, None)
    held = model.trunk(given.support_x, support)[2]
    for name, slices in held.items():
        moved = (slices - model.base[name]).norm(dim=-1) / model.base[name].norm(dim=-1)
        assert 0.5 < moved.mean() / model.written_share < 2


def test_tokens_begin_by_attending_to_their_likes():
    with keyed_rng("likes"):
        model = HyperTransformer(TARGET, head="generated", max_ways=5)
    head = model.generators["logits"]
    assert torch.equal(head.slice_codes, head.label_codes[:5])
    assert not head.label_codes[5].any()
    for block in head.blocks:
        assert torch.equal(block.keys_values.weight[: len(block.queries.weight)], block.queries.weight)


def test_what_stands_in_the_small_cnn_takes_its_own_rate():
    with keyed_rng("rates"):
        model = HyperTransformer(TARGET, max_ways=5, width=16, heads=2)
    fast = {id(parameter) for parameter in model.cnn_parameters()}
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = MetaTrainer(model.parameters(), 200, lr=1e-5, fast=model.cnn_parameters(), fast_lr=1e-1)
    given = EpisodeSampler(digits(), 3, 2, 4, tasks=2).sample(0)
    trainer.update(episode_loss(model(given), given))
    for name, value in model.named_parameters():
        moved = (value - before[name]).abs().max()
        # the first step has a hundredth of the rate; beta of the last layer and log_scale need not move in one step
        assert (moved < 1e-6) if id(value) not in fast else (moved > 1e-4 or name in ("beta.conv3", "log_scale")), name
    with pytest.raises(SettingError, match=r"fast_lr=0 must be above 0"):
        MetaTrainer(model.parameters(), 5, fast_lr=0)
