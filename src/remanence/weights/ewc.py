"""Elastic weight consolidation, the online variant.

Axes: P parameters.

Source: Kirkpatrick et al. 2017 (PNAS 114(13), eq. 3); one running Fisher and the latest anchor instead of one pair per
task: Schwarz et al. 2018, Progress and Compress (arXiv 1805.06370, eqs. 8-9).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from remanence.errors import SettingError
from remanence.keys import generator
from remanence.parts import GradientLearner, diagonal_fisher
from remanence.state import State
from remanence.task import Data, Task


class EWC(GradientLearner):
    """Fine-tuning that pays for moving weights which earlier tasks needed: + strength/2 * sum_i F_i (theta_i - anchor_i)^2.

    After each task F <- decay * F + F_task (diagonal, true Fisher on labels drawn from the model) and the anchor
    becomes the present weights. New head rows have F = 0. In class-incremental streams the head's bias towards the
    latest classes is untouched by the penalty; expect little there.

    `forget` unlearns as `GradientLearner` does (approximate), and takes the task's Fisher, estimated anew at the
    present weights and decayed by its age, out of F, floored at 0 (approximate). Head rows of F and anchor go with theirs.

    Args:
        strength: lambda of the penalty.
        decay: gamma in (0, 1]; 1 keeps all tasks alike.
        Others: see `GradientLearner`.
    """

    def __init__(
        self,
        backbone: str | Path | nn.Module,
        strength: float = 1000.0,
        decay: float = 1.0,
        epochs: int = 15,
        batch_size: int = 32,
        lr: float = 1e-3,
        forget_epochs: int = 3,
        local: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if strength < 0 or not 0 < decay <= 1:
            raise SettingError(f"EWC: strength={strength} must be at least 0 and decay={decay} in (0, 1].")
        self.strength, self.decay = strength, decay
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        super().__init__(backbone, epochs, batch_size, lr, forget_epochs, local, seed, device)

    def _reset(self) -> None:
        super()._reset()
        self.fisher, self.anchor = {}, {}

    def _parameters(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {f"vit.{name}": value for name, value in self.host.vit.named_parameters()}
        return named | {"head.weight": self.head.weight, "head.bias": self.head.bias}

    def _loss(self, task: Task, data: Data, step: int) -> tuple[Tensor, int]:
        loss, n_examples = super()._loss(task, data, step)
        return loss + self.penalty(), n_examples

    def penalty(self) -> Tensor:
        """strength/2 * sum F (theta - anchor)^2; zero before the first task is done."""
        if not self.fisher:
            return self.head.weight.new_zeros(())
        names = list(self.fisher)
        parameters = self._parameters()
        moved = torch._foreach_sub([parameters[name] for name in names], [self.anchor[name] for name in names])
        weighted = torch._foreach_mul(torch._foreach_mul(moved, moved), [self.fisher[name] for name in names])
        return 0.5 * self.strength * torch.stack([value.sum() for value in weighted]).sum()

    def _grow(self, classes: tuple[int, ...]) -> None:
        super()._grow(classes)
        for name, parameter in (("head.weight", self.head.weight), ("head.bias", self.head.bias)):
            if name in self.fisher:
                new = parameter.detach()[len(self.fisher[name]) :]
                self.fisher[name] = torch.cat([self.fisher[name], torch.zeros_like(new)])
                self.anchor[name] = torch.cat([self.anchor[name], new])

    def _consolidate(self, task: Task, data: Data) -> None:
        fisher = self._fisher_of(task, data)
        self.fisher = {name: self.decay * self.fisher[name] + value if self.fisher else value for name, value in fisher.items()}
        self.anchor = {name: value.detach().clone() for name, value in self._parameters().items()}

    def _fisher_of(self, task: Task, data: Data) -> dict[str, Tensor]:
        def log_probabilities(values: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
            vit = {name.removeprefix("vit."): value for name, value in values.items() if name.startswith("vit.")}
            pixels = (inputs - self.host.mean) / self.host.std
            hidden = functional_call(self.host.vit, vit, (), {"pixel_values": pixels}).last_hidden_state[:, 0]
            return F.linear(hidden, values["head.weight"], values["head.bias"]).log_softmax(-1)

        # the fused attention kernels have no rule for vmap and would fall back to a loop over examples
        with sdpa_kernel(SDPBackend.MATH):
            draws = generator(self.seed, "fisher", task.name)
            return diagonal_fisher(log_probabilities, self._parameters(), data.inputs.to(self.device), draws)

    def _drop(self, task: Task, data: Data) -> None:
        if self.fisher and len(data):
            names = self.book.names()
            age = len(names) - 1 - names.index(task.name) if task.name in names else 0
            gone = self._fisher_of(task, data)
            self.fisher = {name: (value - self.decay**age * gone[name]).clamp_min(0.0) for name, value in self.fisher.items()}
            self.anchor = {name: value.detach().clone() for name, value in self._parameters().items()}
        kept = self.head.drop(self.book.remove(task))
        for name in ("head.weight", "head.bias"):
            if name in self.fisher:
                self.fisher[name], self.anchor[name] = self.fisher[name][kept], self.anchor[name][kept]

    def state_dict(self) -> State:
        return super().state_dict() | {"fisher": dict(self.fisher), "anchor": dict(self.anchor)}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        for name in ("fisher", "anchor"):
            setattr(self, name, {key: value.to(self.device).clone() for key, value in state[name].items()})
