"""One attention head, set by hand, writes what a step of gradient descent writes.

Axes: S examples, D width of their features, n classes, k shots.
"""

import pytest
import torch
from torch.nn import functional as F

from remanence.errors import DataError
from remanence.generated.attention import Block, attend_to
from remanence.parts.gd_step import gd_step_reference

N, D = 5, 12


def support(shots):
    """Features (S, D) in float64 and labels (S,), `shots[i]` of class i, in a random order."""
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(N).repeat_interleave(torch.tensor(shots))
    labels = labels[torch.randperm(len(labels), generator=draw)]
    return torch.randn(len(labels), D, generator=draw, dtype=torch.float64), labels


def queries():
    return torch.randn(7, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def centred(logits):
    """Logits up to what the softmax does not see."""
    return logits - logits.mean(-1, keepdim=True)


def hand_set_head(temperature):
    """Tokens are [class code (n); features (D)]: asks by code, is found by code, and answers with the features."""
    width = N + D
    code = torch.diag(torch.tensor([1.0] * N + [0.0] * D))
    block = Block(width, 1, 1).double().requires_grad_(False)
    for layer in (block.queries, block.keys_values, block.out):
        layer.bias.zero_()
    block.queries.weight.copy_(temperature * width**0.5 * code)  # attention divides by the root of the width
    block.keys_values.weight.copy_(torch.cat([code, torch.eye(width) - code]))
    block.out.weight.copy_(torch.eye(width))
    return block


def attention_weights(features, labels, temperature, with_weight_tokens=False):
    """Rows (n, D) of the linear layer that the head writes at the weight tokens."""
    slices = torch.cat([torch.eye(N), torch.zeros(N, D)], 1)[None].double()
    samples = torch.cat([F.one_hot(labels, N), features], 1)[None]
    known = torch.cat([slices, samples], 1) if with_weight_tokens else samples
    return hand_set_head(temperature)._attend(slices, known, None)[0, :, N:]


@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_the_reference_is_one_step_of_sgd_on_the_summed_loss(lr):
    features, labels = support([3, 1, 2, 2, 4])
    weight = torch.zeros(N, D, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(features @ weight.T, labels, reduction="sum").backward()
    torch.testing.assert_close(gd_step_reference(features, labels, N, lr), -lr * weight.grad, rtol=0, atol=1e-14)


def test_leading_axes_are_tasks():
    features, labels = support([2] * N)
    both = gd_step_reference(torch.stack([features, 2 * features]), torch.stack([labels, labels]), N)
    torch.testing.assert_close(both[1], 2 * gd_step_reference(features, labels, N))


@pytest.mark.parametrize(("temperature", "low", "high"), [(50, 0, 1e-10), (10, 1e-4, 2e-2)])
def test_balanced_attention_is_the_gradient_step_divided_by_the_shots(temperature, low, high):
    k = 4
    features, labels = support([k] * N)
    wanted = centred(queries() @ gd_step_reference(features, labels, N).T)
    error = (centred(k * queries() @ attention_weights(features, labels, temperature).T) - wanted).abs().max()
    assert low <= error < high


def test_with_weight_tokens_among_the_keys_the_factor_is_one_more():
    k = 4
    features, labels = support([k] * N)
    wanted = centred(queries() @ gd_step_reference(features, labels, N).T)
    written = queries() @ attention_weights(features, labels, 50, with_weight_tokens=True).T
    assert (centred((k + 1) * written) - wanted).abs().max() < 1e-10
    assert (centred(k * written) - wanted).abs().max() > 0.5


def test_with_unequal_shots_attention_writes_means_and_the_gradient_step_sums():
    shots = [1, 5, 2, 3, 1]
    features, labels = support(shots)
    means = torch.stack([features[labels == c].mean(0) for c in range(N)])
    written = attention_weights(features, labels, 50)
    torch.testing.assert_close(written, means, rtol=0, atol=1e-10)
    step = gd_step_reference(features, labels, N)
    sums = torch.tensor(shots, dtype=torch.float64)[:, None] * means
    torch.testing.assert_close(centred(queries() @ step.T), centred(queries() @ sums.T), rtol=0, atol=1e-10)
    # no single factor turns one into the other
    ratios = [(step[c] + features.sum(0) / N).norm() / written[c].norm() for c in range(N)]
    torch.testing.assert_close(torch.stack(ratios), torch.tensor(shots, dtype=torch.float64))


def test_a_masked_sample_is_no_key_and_weight_tokens_always_are():
    features, labels = support([2] * N)
    present = torch.ones(1, len(labels), dtype=torch.bool)
    present[0, 3] = False
    mask = attend_to(present, N)
    assert mask.shape == (1, 1, 1, N + len(labels))
    assert mask[..., :N].all()
    slices = torch.cat([torch.eye(N), torch.zeros(N, D)], 1)[None].double()
    samples = torch.cat([F.one_hot(labels, N), features], 1)[None]
    head = hand_set_head(50)
    masked = head._attend(slices, torch.cat([slices, samples], 1), mask)
    removed = head._attend(slices, torch.cat([slices, samples[:, present[0]]], 1), None)
    torch.testing.assert_close(masked, removed, rtol=0, atol=1e-14)


def test_features_and_labels_must_fit():
    with pytest.raises(DataError, match=r"features .* are \(3, 2\) and labels .* \(4,\)"):
        gd_step_reference(torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64), 2)
    with pytest.raises(DataError, match=r"labels run from 0 to 2; classes 0..1 are needed"):
        gd_step_reference(torch.zeros(3, 2), torch.tensor([0, 1, 2]), 2)
