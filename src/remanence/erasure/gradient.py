"""Gradient erasers: what each of them minimises. The loop that runs them is `remanence.erasure.erase`.

    outcome = finish(erase(model, facts, tokenizer, GradientDifference(), retain, lr=1e-4))

None of them needs to have watched the model learn; a sparse update does, and is the better tool where the earlier weights
were kept. What an eraser of this page leaves behind must be measured: see `remanence.erasure.certify`.

An eraser of your own is any object with the three members of `Eraser`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from remanence.errors import SettingError


class Eraser(Protocol):
    """What a gradient step minimises; frozen dataclasses make their fields part of the certificate.

    Attributes:
        name: stands in the certificate.
        needs_retain: whether `retain` is called.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs_retain(self) -> bool: ...

    def loss(self, forget: Callable[[], Tensor], retain: Callable[[], Tensor]) -> Tensor:
        """The scalar to minimise.

        Args:
            forget: computes the nats per keyword token of a batch of facts, given the words before; each fact counts once.
            retain: computes the nats per token of a batch that must stay known. Neither runs unless it is called.
        """


@dataclass(frozen=True)
class GradientAscent:
    """Raise the loss of the keywords, and look at nothing else.

    Unbounded: the loss has no minimum, so without an early stop it destroys the model. Neighbouring knowledge goes first,
    while the loss on general text still looks fine. It is here as the yardstick that others should beat.

    Source: Jang et al. 2023 (arXiv 2210.01504). ours: the keyword's tokens alone, not the whole text.

    Example:
        >>> import torch
        >>> GradientAscent().loss(lambda: torch.tensor(2.0), lambda: torch.tensor(3.0))
        tensor(-2.)
    """

    name: ClassVar[str] = "gradient ascent"
    needs_retain: ClassVar[bool] = False

    def loss(self, forget: Callable[[], Tensor], retain: Callable[[], Tensor]) -> Tensor:
        return -forget()


@dataclass(frozen=True)
class GradientDifference:
    """Ascent on the facts, descent on what must stay.

    What is retained has to hold sentences of the facts' own themes: general text alone does not protect their neighbours.

    Args:
        alpha: weight of the retain loss, above 0.

    Raises:
        SettingError: `alpha` is not above 0.

    Source: Liu et al. 2022 (arXiv 2203.12817); Maini et al. 2024 (TOFU, arXiv 2401.06121), where both weights are 1.
    """

    alpha: float = 1.0
    name: ClassVar[str] = "gradient difference"
    needs_retain: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise SettingError(f"GradientDifference: alpha={self.alpha} must be above 0; for ascent alone there is GradientAscent.")

    def loss(self, forget: Callable[[], Tensor], retain: Callable[[], Tensor]) -> Tensor:
        return self.alpha * retain() - forget()


@dataclass(frozen=True)
class CleanFineTuning:
    """Train on clean text only and let the facts fade: the passive baseline."""

    name: ClassVar[str] = "clean fine-tuning"
    needs_retain: ClassVar[bool] = True

    def loss(self, forget: Callable[[], Tensor], retain: Callable[[], Tensor]) -> Tensor:
        return retain()
