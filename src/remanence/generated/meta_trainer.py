"""The outer loop of meta-training: one optimizer and one schedule for every model that learns from episodes.

    trainer = MetaTrainer(model.parameters(), n_steps=1200)
    while trainer.step < trainer.n_steps:
        episode = sampler.sample(trainer.step)
        loss = trainer.update(episode_loss(model(episode), episode))
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import NonFiniteLoss, SettingError
from remanence.generated.episode import Episode
from remanence.parts.optimizer_state import load_moments, moments
from remanence.state import State

WARM_UP, FLOOR, CLIP = 100, 0.05, 1.0


class MetaTrainer:
    """Adam; the rate warms up over 100 steps and falls along a cosine to 5 %; the gradient's norm is clipped at 1.

    Args:
        parameters: what is trained.
        n_steps: length of the schedule.
        lr: peak rate.
        fast: those of them that take `fast_lr`: see `HyperTransformer.cnn_parameters`.
        fast_lr: peak rate of these: a small CNN by itself learns best far above a transformer's rates.

    Attributes:
        step: how many steps are done.

    Raises:
        SettingError: a number is not above 0.

    Source: ours; the paper takes four million steps of plain SGD on one task each.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], n_steps: int, lr: float = 2e-3, fast: Iterable[nn.Parameter] = (), fast_lr: float = 1.6e-2
    ) -> None:
        if n_steps < 1 or lr <= 0 or fast_lr <= 0:
            raise SettingError(f"MetaTrainer: n_steps={n_steps}, lr={lr} and fast_lr={fast_lr} must be above 0.")
        self.parameters, self.n_steps, self.lr, self.step = list(parameters), n_steps, lr, 0
        chosen = list(fast)
        is_fast = {id(parameter) for parameter in chosen}
        slow = [parameter for parameter in self.parameters if id(parameter) not in is_fast]
        groups = [{"params": params, "peak": peak} for params, peak in ((slow, lr), (chosen, fast_lr)) if params]
        self._optimizer = torch.optim.Adam(groups, lr=lr, fused=True)

    def share(self, step: int) -> float:
        """Part of the peak rates at a step, counted from 0."""
        warm = min(1.0, (step + 1) / WARM_UP)
        return warm * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / self.n_steps)))

    def update(self, loss: Tensor) -> Tensor:
        """Take one step down a loss; returns the loss, detached.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite; nothing was changed.
        """
        if not loss.isfinite():
            raise NonFiniteLoss(
                f"the meta-training loss became {loss.item()} at step {self.step}; lower lr={self.lr}, or look at the data."
            )
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * self.share(self.step)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self._optimizer.step()
        self.step += 1
        return loss.detach()

    def state_dict(self) -> State:
        """The moments and the step; the parameters are the model's."""
        return {"step": self.step, "moments": moments(self._optimizer)}

    def load_state_dict(self, state: State) -> None:
        """Go on from where `state` was taken; copies."""
        self.step = state["step"]
        load_moments(self._optimizer, state["moments"])


def warm_up_share(step: int, n_steps: int) -> float:
    """Weight of the class means' loss beside that of a generated head: 1 at the start, 0 from the middle of the training on.

    Source: ours, after the auxiliary heads of Zhmoginov et al. 2022, whose weight slides to the output.
    """
    return max(0.0, 1 - 2 * step / n_steps)


def episode_loss(logits: Tensor, episode: Episode) -> Tensor:
    """Cross-entropy of query logits (B, Q, n)."""
    assert episode.query_y is not None
    return F.cross_entropy(logits.flatten(0, 1), episode.query_y.flatten())
