"""A continual HyperTransformer of four channels, and what its tests feed it."""

import torch

from remanence.generated.continual import ContinualHyperTransformer, ContinualState
from remanence.generated.target import TargetNet
from remanence.keys import generator, keyed_rng


def model_of(norm: str = "group", **settings: object) -> ContinualHyperTransformer:
    with keyed_rng("continual model"):
        target = TargetNet(channels=4, image_size=8, n_layers=2, norm=norm)
        made = ContinualHyperTransformer(target, max_ways=4, width=16, depth=1, code_width=8, shared_features=8, **settings)
        for layer in made.generators.values():  # so that what is written matters
            layer.write.weight.data.mul_(0.7)
    return made.eval()


def support(step: int, n: int = 2, shots: int = 2, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(batch, n * shots, 1, 8, 8, generator=generator("support", step))
    return x, torch.arange(n).repeat_interleave(shots).expand(batch, -1)


def queries(batch: int = 1, n: int = 5) -> torch.Tensor:
    return torch.rand(batch, n, 1, 8, 8, generator=generator("queries"))


def after(model: ContinualHyperTransformer, n_tasks: int, **named: object) -> ContinualState:
    state = model.init_state()
    with torch.no_grad():
        for step in range(n_tasks):
            state = model.step(state, *support(step), **named)
    return state


def writes_nothing(model: ContinualHyperTransformer) -> ContinualHyperTransformer:
    for layer in model.generators.values():
        layer.write.weight.data.zero_()
        layer.write.bias.data.zero_()
    return model
