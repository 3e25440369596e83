"""Masks: against a plain sort, with ties, zeros, extremes, bands; refusals."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remanence.erasure import sparse_mask
from remanence.erasure._selection import Rule, layer_of, select_kept
from remanence.errors import DataError, SettingError
from remanence.keys import generator

few_values = st.sampled_from([-2.0, -1.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 1.0, 2.0, 2.0000002])
deltas = st.lists(few_values | st.floats(-1024, 1024, width=32), max_size=40).map(torch.tensor)
shares = st.sampled_from([0.0, 0.04, 0.08, 0.25, 1 / 3, 0.5, 0.99, 1.0]) | st.floats(0, 1)


def plain_top(values, fraction, signed=False):
    """The definition: sort by size, then by index; no zeros."""
    moved = [index for index, value in enumerate(values) if value != 0]
    order = sorted(moved, key=lambda index: (-(values[index] if signed else abs(values[index])), index))
    top = set(order[: int(fraction * len(values))])
    return torch.tensor([index in top for index in range(len(values))], dtype=torch.bool)


@given(deltas, shares, st.booleans())
def test_masks_equal_a_plain_sort(delta, fraction, signed):
    top = plain_top(delta.tolist(), fraction, signed)
    assert torch.equal(sparse_mask(delta, "keep_top", fraction, signed), top)
    assert torch.equal(sparse_mask(delta, "ignore_top", fraction, signed), ~top)


@given(deltas, st.lists(shares, max_size=4))
def test_bands_cover_everything_once(delta, edges):
    edges = [0.0, *sorted(edges), 1.0]
    bands = [sparse_mask(delta, ("band", low, high)) for low, high in pairwise(edges)]
    assert torch.equal(sum(band.int() for band in bands), torch.ones(len(delta), dtype=torch.int32))


@given(deltas, shares, shares)
def test_a_band_is_a_slice_of_the_ranks(delta, first, second):
    low, high = sorted((first, second))
    n = len(delta)
    order = sorted(range(n), key=lambda index: (-abs(delta[index].item()), index))[::-1]
    kept = set(order[int(low * n) : int(high * n)])
    assert sparse_mask(delta, ("band", low, high)).tolist() == [index in kept for index in range(n)]


def test_a_large_random_tensor_equals_a_stable_sort():
    delta = torch.randn(50, 401, generator=generator("large")).round(decimals=2)
    top = delta.abs().flatten().sort(descending=True, stable=True).indices[: int(0.08 * delta.numel())]
    expected = torch.zeros(delta.numel(), dtype=torch.bool).index_fill_(0, top, True).view(delta.shape)
    assert torch.equal(sparse_mask(delta, "keep_top"), expected)


def test_a_constant_tensor_loses_exactly_the_first_entries():
    mask = sparse_mask(torch.full((10, 10), -3.0), fraction=0.08)
    assert mask.flatten().tolist() == [False] * 8 + [True] * 92


def test_zeros_are_never_top():
    delta = torch.zeros(100)
    delta[[7, 50]] = torch.tensor([1.0, -2.0])
    assert sparse_mask(delta, "keep_top", 0.5).nonzero().flatten().tolist() == [7, 50]
    assert sparse_mask(delta, "keep_top", 1.0).sum() == 2
    assert sparse_mask(-delta.abs(), "keep_top", 0.5, signed=True).sum() == 2
    assert not sparse_mask(torch.zeros(5), "keep_top", 1.0).any()


def test_signed_and_unsigned_differ():
    delta = torch.tensor([-5.0, 1.0, 2.0, -1.0])
    assert sparse_mask(delta, "keep_top", 0.25).tolist() == [True, False, False, False]
    assert sparse_mask(delta, "keep_top", 0.25, signed=True).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_ranked_in_float32(dtype):
    delta = torch.tensor([0.25, -4.0, 1.0, 0.0], dtype=dtype)
    assert sparse_mask(delta, "keep_top", 0.5).tolist() == [False, True, True, False]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (), (1,), (2, 3, 4)])
def test_odd_shapes(shape):
    assert sparse_mask(torch.ones(shape)).shape == shape


def pairs(n_layers=3):
    rng = generator("layers")
    names = [f"h.{index}.{part}" for index in range(n_layers) for part in ("a", "b")] + ["score.weight"]
    return {name: (torch.zeros(6, 5), torch.randn(6, 5, generator=rng).round(decimals=1) * (1 + len(name))) for name in names}


@pytest.mark.parametrize("select", ["ignore_top", "keep_top", ("band", 0.2, 0.7)])
@pytest.mark.parametrize("granularity", ["layer", "global"])
def test_a_group_is_ranked_as_one_tensor(granularity, select):
    tensors = pairs()
    found = {kept.name: kept.mask for kept in select_kept(Rule(select, 0.15, granularity=granularity), tensors, tensors.__getitem__)}
    layers = {name: layer_of(name) if granularity == "layer" else "all" for name in tensors}
    for layer in set(layers.values()):
        names = sorted(name for name in tensors if layers[name] == layer)
        joined = torch.cat([tensors[name][1].flatten() for name in names])
        assert torch.equal(torch.cat([found[name].flatten() for name in names]), sparse_mask(joined, select, 0.15))


def test_layers_are_told_by_the_first_number():
    assert layer_of("model.layers.11.mlp.experts.3.up.weight") == "model.layers.11"
    assert layer_of("lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "ignore_tops"}, "no selection.*'ignore_top'"),
        ({"fraction": 1.5}, r"fraction=1\.5 lies outside"),
        ({"fraction": float("nan")}, "fraction=nan lies outside"),
        ({"select": ("band", 0.5, 0.2)}, "is no band"),
        ({"select": ("band", 0.5)}, "is no band"),
        ({"select": ("slice", 0.1, 0.2)}, "is no band"),
        ({"select": ("band", 0.1, 0.2), "signed": True}, "leave one of the two out"),
        ({"granularity": "row"}, "granularity='row' is unknown"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        Rule(**settings)


def test_a_band_read_from_json_is_a_band():
    assert Rule(["band", 0.1, 0.2]) == Rule(("band", 0.1, 0.2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("signed", [False, True])
def test_a_change_that_is_not_finite_is_refused(bad, signed):
    with pytest.raises(DataError, match="1 of 3 entries of the change are NaN or infinite"):
        sparse_mask(torch.tensor([1.0, bad, 2.0]), signed=signed)
