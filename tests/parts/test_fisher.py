"""The vectorised Fisher estimate against a plain loop over examples."""

import torch
from torch.nn import functional as F

from remanence.keys import generator
from remanence.parts import diagonal_fisher


def model(values, inputs):
    return F.linear(torch.tanh(F.linear(inputs, values["hidden"])), values["out"], values["bias"]).log_softmax(-1)


def setting(n, seed=0):
    draws = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (5, 3), "out": (4, 5), "bias": (4,)}
    return {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}, torch.randn(n, 3, generator=draws)


def plain_fisher(values, inputs, draws, chunk):
    values = {name: value.clone().requires_grad_(True) for name, value in values.items()}
    total = {name: torch.zeros_like(value) for name, value in values.items()}
    for batch in torch.split(inputs, chunk):
        labels = torch.multinomial(model(values, batch).exp().detach(), 1, generator=draws)[:, 0]
        for example, label in zip(batch, labels, strict=True):
            gradients = torch.autograd.grad(model(values, example[None])[0, label], list(values.values()))
            for name, gradient in zip(values, gradients, strict=True):
                total[name] += gradient**2
    return {name: value / len(inputs) for name, value in total.items()}


def test_equal_to_a_loop_over_examples():
    for n, chunk in ((1, 32), (7, 3), (40, 32), (6, 6)):
        values, inputs = setting(n)
        fast = diagonal_fisher(model, values, inputs, generator("f"), chunk)
        slow = plain_fisher(values, inputs, generator("f"), chunk)
        for name in values:
            torch.testing.assert_close(fast[name], slow[name], rtol=1e-5, atol=1e-7)


def test_it_is_the_true_fisher_not_the_empirical_one():
    # of a softmax over biases alone, F = p (1 - p), whatever the data's labels
    values = {"bias": torch.tensor([0.0, 1.0, -1.0])}
    log_probabilities = lambda v, x: (x[:, :1] * 0 + v["bias"]).log_softmax(-1)  # noqa: E731
    fisher = diagonal_fisher(log_probabilities, values, torch.zeros(20_000, 1), generator("t"), chunk=5000)["bias"]
    share = values["bias"].softmax(0)
    torch.testing.assert_close(fisher, share * (1 - share), rtol=0.05, atol=0.005)


def test_nothing_is_left_behind():
    values, inputs = setting(4)
    values = {name: value.requires_grad_(True) for name, value in values.items()}
    before = torch.default_generator.get_state()
    fisher = diagonal_fisher(model, values, inputs, generator("f"))
    assert all(value.grad is None for value in values.values())
    assert not any(value.requires_grad for value in fisher.values())
    assert torch.equal(before, torch.default_generator.get_state())
