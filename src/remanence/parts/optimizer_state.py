"""Optimizer moments as a state: string keys, aligned with the parameters, never aliased."""

from typing import Any

import torch
from torch import Tensor

from remanence.errors import StateMismatchError
from remanence.state import copy_state


def moments(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Per-parameter state in the order of the parameters; an empty dict where there is none yet."""
    return [dict(optimizer.state.get(parameter, {})) for group in optimizer.param_groups for parameter in group["params"]]


def load_moments(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    """Give an optimizer the moments of another run.

    `Optimizer.load_state_dict` keeps the tensors it is handed, so that a fork would write into the original's moments;
    here every tensor is copied.

    Raises:
        StateMismatchError: the optimizer trains another number of parameters.
    """
    parameters: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(parameters) != len(saved):
        raise StateMismatchError(f"the state has moments for {len(saved)} parameters, the optimizer trains {len(parameters)}.")
    is_fused = [bool(group.get("fused")) for group in optimizer.param_groups for _ in group["params"]]
    for parameter, state, fused in zip(parameters, saved, is_fused, strict=True):
        if state:
            # a count of steps is a scalar that stays on the CPU, except that a fused kernel reads it on the device
            optimizer.state[parameter] = {
                name: value.to(parameter.device) if isinstance(value, Tensor) and (fused or value.dim()) else value
                for name, value in copy_state(state).items()
            }
