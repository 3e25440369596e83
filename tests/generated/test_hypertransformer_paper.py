"""HyperTransformer: the paper's form in numbers, and the claim in small.

Axes: B tasks, S support samples, n ways.
"""

import pytest
import torch

from remanence.generated import Episode, EpisodeSampler
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.meta_trainer import MetaTrainer, episode_loss
from remanence.generated.target import TargetNet
from remanence.keys import keyed_rng
from remanence.streams import digits


@pytest.mark.parametrize(("ways", "n_written", "n_generator"), [(20, 1980, 0.84e6), (5, 1845, 0.84e6)])
def test_the_papers_form_has_its_published_size(ways, n_written, n_generator):
    with keyed_rng("paper"):
        model = HyperTransformer(TargetNet(channels=8), preset="paper", max_ways=ways)
    tensors = model.generate(torch.rand(1, ways, 1, 28, 28), torch.arange(ways)[None]).tensors
    assert sum(value.numel() for name, value in tensors.items() if name.endswith(("weight", "bias"))) == n_written
    assert sum(value.numel() for name, value in tensors.items() if name.endswith(("gamma", "beta"))) == 64
    assert abs(sum(value.numel() for value in model.parameters()) - n_generator) < 0.005e6
    assert not model.base
    assert model.head == "generated"
    # max(e + b, e + d_l + d_s), with e = d_s = 32
    assert {name: part.width for name, part in model.generators.items()} == {
        "conv1": 32 + 16 + 32, "conv2": 32 + 72, "conv3": 32 + 72, "conv4": 32 + 72, "logits": 32 + 8 + 32
    }  # fmt: skip
    assert {len(part.blocks) for part in model.generators.values()} == {3}
    assert {block.heads for part in model.generators.values() for block in part.blocks} == {2}


def test_the_papers_tokens_leave_with_unit_variance_and_the_weights_with_nearly_as_much():
    with keyed_rng("paper"):
        model = HyperTransformer(TargetNet(channels=8), preset="paper", max_ways=5)
    seen = []
    for part in model.generators.values():
        part.blocks[-1].register_forward_hook(lambda *given: seen.append(given[2]))
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(4, 5, 1, 28, 28, generator=draw)
    tensors = model.generate(images, torch.arange(5).expand(4, 5)).tensors
    for tokens in seen:
        torch.testing.assert_close(tokens.var(-1, correction=0), torch.ones(tokens.shape[:2]), rtol=0, atol=1e-4)
    variances = [tensors[f"{name}.weight"].var().item() for name in ("conv1", "conv2", "conv3", "conv4", "logits")]
    assert all(0.4 < value < 1.6 for value in variances)


def test_sixty_steps_on_digits_learn_to_write_networks_for_other_digits():
    source = digits()
    train = EpisodeSampler(source.select(source.labels < 7), ways=3, shots=1, queries=5, tasks=6)
    test = EpisodeSampler(source.select(source.labels >= 7), ways=3, shots=1, queries=10, tasks=60, seed=1)
    with keyed_rng("claim"):
        model = HyperTransformer(TargetNet(channels=8, image_size=8, n_layers=3), max_ways=3, width=32)
    trainer = MetaTrainer(model.parameters(), 60, lr=5e-3)
    for step in range(60):
        given = train.sample(step)
        trainer.update(episode_loss(model(given), given))
    given = test.sample(0)

    def accuracy(given):
        with torch.no_grad():
            return (model(given).argmax(-1) == given.query_y).float().mean().item()

    turns = torch.arange(60)[:, None] % 3
    shuffled = Episode(given.support_x, (given.support_y + turns) % 3, given.query_x, given.query_y)  # right in a third of the tasks
    assert accuracy(given) > 1 / 3 + 0.2
    assert abs(accuracy(shuffled) - 1 / 3) < 0.05
    variation = model.episode_variation(given).values()
    assert min(variation) > 1e-5
    assert max(variation) > 1e-3
