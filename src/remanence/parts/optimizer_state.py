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
    for parameter, state in zip(parameters, saved, strict=True):
        if state:
            copied = copy_state(state)
            optimizer.state[parameter] = {
                name: value.to(parameter.device) if isinstance(value, Tensor) and value.dim() else value for name, value in copied.items()
            }
