"""Windows in memory: equal to sparse_delta, counted by the optimizer, resumable bit for bit, one copy of the weights."""

import pytest
import torch
from tiny_models import drift, tiny_gpt2, tiny_llama
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from remanence.erasure import SparseUpdate, sparse_delta
from remanence.errors import DataError, SettingError, StateMismatchError
from remanence.keys import generator
from remanence.state import copy_state, load_state, save_state, states_equal


def state_of(model):
    return copy_state(dict(model.state_dict()))


def batch(step):
    return torch.randint(0, 13, (4, 8), generator=generator("batch", step))


def train(model, optimizer, steps):
    for step in steps:
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model):
    return torch.optim.AdamW(model.named_parameters(), lr=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["tensor", "layer", "global"])
@pytest.mark.parametrize("select", ["ignore_top", "keep_top", ("band", 0.5, 0.9)])
def test_apply_equals_sparse_delta(select, granularity, dtype):
    model = tiny_gpt2().to(dtype)
    before = state_of(model)
    with SparseUpdate(model, select, 0.1, granularity=granularity) as window:
        drift(model)
        after = state_of(model)
        window.apply()
    assert states_equal(state_of(model), sparse_delta(before, after, select, 0.1, granularity))
    assert not states_equal(state_of(model), after)


def test_apply_after_the_block_and_a_second_window():
    model = tiny_llama()
    with SparseUpdate(model, fraction=0.1) as window:
        drift(model, 1)
    unmasked = state_of(model)
    window.apply()
    first = state_of(model)
    assert not states_equal(first, unmasked)
    drift(model, 2)
    second = state_of(model)
    window.apply()
    assert states_equal(state_of(model), sparse_delta(first, second, fraction=0.1))


def test_fraction_one_restores_the_scope_alone():
    model = tiny_gpt2()
    before = state_of(model)
    with SparseUpdate(model, fraction=1) as window:
        after = state_of(drift(model))
        window.apply()
    assert states_equal(state_of(model), sparse_delta(before, after, fraction=1, others="after"))


def test_tied_embeddings_are_masked_once():
    model = tiny_gpt2()
    with SparseUpdate(model, fraction=0.5, include_embeddings=True) as window:
        drift(model)
        window.apply()
    names = set(window.state_dict()["start"])
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("named", [True, False])
def test_wrap_masks_every_third_step(named):
    model, plain = tiny_gpt2(), tiny_gpt2()
    optimizer = adamw(model)
    window = SparseUpdate.wrap(optimizer, None if named else model, every=3, fraction=0.04)
    train(model, window, range(7))  # the window stands in for the optimizer
    by_hand = adamw(plain)
    for steps in (range(3), range(3, 6)):
        before = state_of(plain)
        train(plain, by_hand, steps)
        plain.load_state_dict(sparse_delta(before, state_of(plain), fraction=0.04))
    train(plain, by_hand, range(6, 7))
    assert states_equal(state_of(model), state_of(plain))
    assert window.n_steps == 7
    window.remove()
    train(model, optimizer, range(7, 10))
    train(plain, by_hand, range(7, 10))
    assert states_equal(state_of(model), state_of(plain))


def test_the_block_counts_steps_until_it_ends():
    model = tiny_gpt2()
    optimizer = adamw(model)
    with SparseUpdate(model, fraction=0.5, every=2, optimizer=optimizer) as window:
        train(model, optimizer, range(3))
    train(model, optimizer, range(3, 6))
    assert window.n_steps == 3


def test_moments_are_left_alone_or_zeroed_where_the_old_value_returns():
    kept, masks = {}, {}
    for reset in (False, True):
        model = tiny_gpt2()
        optimizer = adamw(model)
        window = SparseUpdate(model, fraction=0.25, optimizer=optimizer, reset_moments=reset).open()
        before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
        train(model, optimizer, range(2))
        window.apply()
        weight = model.transformer.h[0].mlp.c_fc.weight
        masks[reset] = weight.detach() == before
        kept[reset] = copy_state(dict(optimizer.state[weight]))
    assert torch.equal(masks[False], masks[True])
    assert masks[True].sum() == 64
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(kept[True][name], kept[False][name].masked_fill(masks[True], 0))
        assert kept[False][name][masks[True]].abs().min() > 0
    assert kept[True]["step"] == 2


@pytest.mark.parametrize("reset", [False, True])
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, reset):
    settings = {"every": 4, "fraction": 0.1, "select": ("band", 0.0, 0.9), "reset_moments": reset}
    whole = tiny_gpt2()
    optimizer = adamw(whole)
    SparseUpdate.wrap(optimizer, **settings)
    train(whole, optimizer, range(10))

    first = tiny_gpt2()
    optimizer = adamw(first)
    window = SparseUpdate.wrap(optimizer, **settings)
    train(first, optimizer, range(6))  # amid the second window
    save_state(tmp_path / "window.safetensors", window.state_dict())
    weights, moments = state_of(first), optimizer.state_dict()

    second = tiny_gpt2(seed=9)
    optimizer = adamw(second)
    window = SparseUpdate.wrap(optimizer, **settings)
    second.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    window.load_state_dict(load_state(tmp_path / "window.safetensors"))
    train(second, optimizer, range(6, 10))
    assert states_equal(state_of(second), state_of(whole))


class LiveBytes(TorchDispatchMode):
    """The most memory that tensors made under this mode held at one time."""

    def __init__(self):
        super().__init__()
        self.made, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                self.made[tensor.untyped_storage()._cdata] = (StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes())
        self.made = {key: held for key, held in self.made.items() if not held[0].expired()}
        self.most = max(self.most, sum(n_bytes for _, n_bytes in self.made.values()))
        return result


@pytest.mark.parametrize("granularity", ["tensor", "global"])
def test_a_window_holds_one_copy_and_a_few_tensors_more(granularity):
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(40)])
    one = 256 * 256 * 4
    with LiveBytes() as live:
        window = SparseUpdate(model, granularity=granularity).open()
    assert 40 * one <= live.most < 41 * one
    drift(model)
    bins = 4 * (1 << 16) * 8  # counting tables, whatever the size of the tensor
    with LiveBytes() as live:
        window.apply()
    assert live.most < 8 * one + bins < 40 * one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every=0 must be at least 1 step"),
        ({"every": 3}, "no optimizer was handed in, but every=3 counts its steps"),
        ({"reset_moments": True}, "but reset_moments=True zeroes its moments"),
        ({"scope": lambda name, tensor: False}, "none of 29 tensors is in scope"),
        ({"fraction": 2}, "fraction=2 lies outside"),
    ],
)
def test_settings_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        SparseUpdate(tiny_gpt2(), **settings)


def test_windows_that_are_not_open_or_open_twice():
    window = SparseUpdate(tiny_gpt2())
    for call in (window.apply, window.state_dict, lambda: window.load_state_dict({})):
        with pytest.raises(SettingError, match="no window is open"):
            call()
    with pytest.raises(SettingError, match="no optimizer to step"):
        window.step()
    with window, pytest.raises(SettingError, match="open already"):
        window.open()


def test_wrap_needs_names():
    optimizer = torch.optim.SGD(tiny_gpt2().parameters(), lr=0.1)
    with pytest.raises(SettingError, match="does not know its parameters' names"):
        SparseUpdate.wrap(optimizer, every=2)


def test_a_window_of_another_run_is_refused():
    saved = SparseUpdate(tiny_gpt2(), fraction=0.1).open().state_dict()
    with pytest.raises(StateMismatchError, match=r"other settings \(fraction: saved 0\.1, here 0\.2\)"):
        SparseUpdate(tiny_gpt2(), fraction=0.2).open().load_state_dict(saved)
    with pytest.raises(StateMismatchError, match=r"other weights: 8 names, .*'transformer\.h\.0\.attn\.c_attn\.weight', saved \(\(8, 24"):
        SparseUpdate(tiny_gpt2(n_embd=16), fraction=0.1).open().load_state_dict(saved)


def test_a_broken_run_is_not_masked():
    model = tiny_gpt2()
    window = SparseUpdate(model).open()
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"1 of 256 entries of the change of 'transformer\.h\.1\.mlp\.c_fc\.weight' are NaN"):
        window.apply()
