from types import SimpleNamespace

import pytest
import torch

from remanence.errors import StateMismatchError
from remanence.parts.optimizer_state import load_moments, moments

SAVED = [{"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}]


@pytest.mark.parametrize(("fused", "expected"), [(True, {"meta"}), (None, {"meta", "cpu"})])
def test_moments_follow_the_parameter_and_a_fused_kernel_takes_the_step_too(fused, expected):
    parameter = torch.zeros(2, device="meta")
    optimizer = SimpleNamespace(param_groups=[{"params": [parameter], "fused": fused}], state={})
    load_moments(optimizer, SAVED)
    assert {value.device.type for value in optimizer.state[parameter].values()} == expected


def test_moments_are_copied():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    load_moments(optimizer, SAVED)
    parameter.grad = torch.ones(2)
    optimizer.state[parameter]["exp_avg_sq"] = torch.ones(2)
    optimizer.step()
    assert SAVED[0]["step"] == 3
    assert moments(optimizer)[0]["step"] == 4
    assert SAVED[0]["exp_avg"].tolist() == [1, 1]


def test_moments_of_another_model_are_refused():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(StateMismatchError, match="moments for 0 parameters, the optimizer trains 1"):
        load_moments(optimizer, [])
