"""Which weights an erasure moved, and by how much."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from remanence.errors import StateMismatchError


class ModuleChange(NamedTuple):
    """The weights of one module."""

    n: int
    n_changed: int
    norm: float
    """Euclidean norm of the change."""


class WeightChange(NamedTuple):
    """All weights of a model; tied ones once, under their first name."""

    n: int
    n_changed: int
    norm: float
    n_below_bfloat16: int
    """Changed weights whose change is below half a unit in the last place of the old weight in bfloat16."""
    by_module: dict[str, ModuleChange]

    @property
    def share(self) -> float:
        """Of weights that changed, in [0, 1]."""
        return self.n_changed / max(1, self.n)


@torch.no_grad()
def weight_change(before: nn.Module, after: nn.Module) -> WeightChange:
    """Compare two models of one architecture weight by weight; differences are taken in float32 (float64 for float64).

    Raises:
        StateMismatchError: their parameters differ in names or shapes.

    Example:
        >>> first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> _ = second.load_state_dict(first.state_dict())
        >>> weight_change(first, second).n_changed
        0
    """
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    differing = sorted(name for name in old.keys() | new.keys() if name not in old or name not in new or old[name].shape != new[name].shape)
    if differing:
        raise StateMismatchError(
            f"{len(differing)} parameters differ in name or shape between the two models (first three: {differing[:3]}). "
            f"Compare models of one architecture; merge adapters into their weights first."
        )
    parts: dict[str, list[ModuleChange]] = {}
    n_below = 0
    for name, weight in old.items():
        delta, start = _difference(weight, new[name])
        parts.setdefault(name.rpartition(".")[0], []).append(ModuleChange(delta.numel(), int((delta != 0).sum()), float(delta.norm())))
        n_below += int((_below_bfloat16(delta, start)).sum())
    by_module = {name: _united(changes) for name, changes in parts.items()}
    whole = _united(list(by_module.values()))
    return WeightChange(whole.n, whole.n_changed, whole.norm, n_below, by_module)


def _difference(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if old.dtype == torch.float64 else torch.float32
    start = old.detach().to(dtype)
    return new.detach().to(start.device, dtype) - start, start


def _below_bfloat16(delta: Tensor, start: Tensor) -> Tensor:
    # start = m * 2**e with 0.5 <= |m| < 1; bfloat16 keeps 8 bits of m, so half its last place is 2**(e - 9)
    _, exponent = torch.frexp(start)
    return (delta != 0) & (start != 0) & (delta.abs() < torch.ldexp(torch.ones_like(delta), exponent - 9))


def _united(changes: list[ModuleChange]) -> ModuleChange:
    norm = sum(change.norm**2 for change in changes) ** 0.5
    return ModuleChange(sum(change.n for change in changes), sum(change.n_changed for change in changes), norm)
