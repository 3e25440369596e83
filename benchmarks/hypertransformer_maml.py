"""MAML with learned rates: the rival that writes the CNN by a few gradient steps on the support.

    rival = MAML(TargetNet(8), ways=5)
    tensors = rival.adapt(support_x, support_y)           # (B, S, C, H, W), (B, S): B tasks at once

A plain reference through autograd. Each task has its own copy of the start as a view with a leading task axis, so the gradient of the
sum of all tasks' losses with respect to that view is the gradient of each task.

Source: Finn, Abbeel and Levine 2017 (arXiv 1703.03400); a learned rate for every step and tensor as in Antoniou, Edwards and Storkey 2019
    (arXiv 1810.09502), without their multi-step loss and annealing.

Axes: B tasks, S support, Q queries, n ways, D embedding width, K inner steps.
"""

from typing import Literal

import torch
from hypertransformer_baselines import Tensors, TinyCNN, per_task, recorded
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import DataError, SettingError
from remanence.generated.episode import Episode
from remanence.generated.target import TargetNet


class MAML(TinyCNN):
    """All kernels, gamma, beta and the linear layer take `steps` steps down the support's cross-entropy.

    Args:
        target: the CNN.
        ways: classes of every task.
        steps: K, inner steps.
        second_order: train through the inner gradients; False takes them as constants.
        inner_lr: what the learned rates start from.
        bn_stats: of a "batch" norm. The inner steps normalise the support by itself; queries by themselves ("query") or by the
            adapted net's statistics on the support.

    Attributes:
        rates: (K, tensors), learned.

    Raises:
        SettingError: no step, fewer than two ways, or a rate that is not above 0.
    """

    def __init__(
        self, target: TargetNet, ways: int, steps: int = 5, second_order: bool = True, inner_lr: float = 0.1,
        bn_stats: Literal["query", "support"] = "query",
    ) -> None:  # fmt: skip
        if steps < 1 or ways < 2 or inner_lr <= 0:
            raise SettingError(f"MAML: steps={steps}, ways={ways}, inner_lr={inner_lr}; give a step, two ways and a rate above 0.")
        super().__init__(target, bn_stats)
        self.ways, self.steps, self.second_order = ways, steps, second_order
        self.weight = nn.Parameter(torch.zeros(ways, target.embedding_width))
        self.bias = nn.Parameter(torch.zeros(ways))
        self.rates = nn.Parameter(torch.full((steps, 3 * target.n_layers + 2), inner_lr))

    def adapt(self, support_x: Tensor, support_y: Tensor, second_order: bool = False) -> Tensors:
        """Images (B, S, C, H, W) and slots (B, S) -> tensors of the CNN for each task, each (B, ...).

        Statistics of the support are among them with bn_stats="support". Works with gradients switched off, too.

        Args:
            second_order: keep the graph of the inner gradients.

        Raises:
            DataError: a label is no slot of the head.
        """
        require_slots("MAML", support_y, self.ways)
        with torch.enable_grad():
            tensors = self._initial(len(support_x))
            for rates in self.rates:
                tensors = self._stepped(tensors, support_x, support_y, rates, second_order)
        if not torch.is_grad_enabled():
            tensors = {name: value.detach() for name, value in tensors.items()}
        return recorded(self.target, support_x, tensors)[1] if self.bn_stats == "support" else tensors

    def forward(self, episode: Episode) -> Tensor:
        """Logits (B, Q, n) of an episode's queries.

        Raises:
            DataError: a support sample is masked or unlabelled.
        """
        if episode.support_mask is not None and not episode.support_mask.all():
            raise DataError("MAML: the episode has masked support samples; give tasks of equal size.")
        tensors = self.adapt(episode.support_x, episode.support_y, self.second_order and torch.is_grad_enabled())
        return self.target.functional(episode.query_x, tensors, self.bn_stats)

    def start(self, n_tasks: int, n_ways: int) -> Tensors:
        """What fine-tuning starts from: the meta-learned start of each task, detached.

        Raises:
            SettingError: other ways than the head has.
        """
        if n_ways != self.ways:
            raise SettingError(f"MAML: its last layer has {self.ways} ways, not {n_ways}.")
        return {name: value.detach() for name, value in self._initial(n_tasks).items()}

    def _initial(self, n_tasks: int) -> Tensors:
        head = {"logits.weight": self.weight.expand(n_tasks, -1, -1), "logits.bias": self.bias.expand(n_tasks, -1)}
        return per_task(self.body(n_tasks), n_tasks) | head

    def _stepped(self, tensors: Tensors, x: Tensor, y: Tensor, rates: Tensor, second_order: bool) -> Tensors:
        loss = task_losses(self.target.functional(x, tensors), y).sum()
        gradients = torch.autograd.grad(loss, list(tensors.values()), create_graph=second_order)
        return {name: value - rate * step for (name, value), rate, step in zip(tensors.items(), rates, gradients, strict=True)}


def task_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy (B,) of each task's logits (B, N, n) against slots (B, N)."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y).mean(1)


def require_slots(who: str, y: Tensor, n_ways: int) -> None:
    """Refuse labels that are no row of a linear layer, unlabelled samples among them.

    Raises:
        DataError: naming the labels seen.
    """
    if y.min() < 0 or y.max() >= n_ways:
        raise DataError(f"{who}: labels {int(y.min())}..{int(y.max())}; every support sample needs one of the slots 0..{n_ways - 1}.")
