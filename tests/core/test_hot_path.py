"""What runs at every step was made cheap; here it stands beside its plain definition."""

import hashlib
import json

import pytest
import torch

from remanence.errors import SettingError
from remanence.keys import generator, key_seed
from remanence.parts import ClassHead
from remanence.task import Data


@pytest.mark.parametrize("key", [(), (0,), (0, "learn", "a", 1), (True, None, 1.5, -3), ('quote " and ü\n', 10**30)])
def test_key_seed_is_the_hash_of_the_keys_json(key):
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    assert key_seed(*key) == int.from_bytes(digest, "big") >> 1


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5, 7, 32])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_rows_are_the_passes_cut_into_batches(n, size, ordered):
    data = Data(torch.zeros(n, 1), torch.zeros(n, dtype=torch.int64), torch.arange(n), ordered)
    passes = [torch.arange(n) if ordered else torch.randperm(n, generator=generator(3, "k", "epoch", epoch)) for epoch in range(40)]
    whole, size = torch.cat(passes), min(size, n)
    for step in reversed(range(len(whole) // size)):
        assert torch.equal(data.rows(step, size, 3, "k"), whole[step * size : (step + 1) * size])


def test_one_pass_ends_with_a_short_batch_and_refuses_a_second():
    data = Data(torch.zeros(7, 1), torch.zeros(7, dtype=torch.int64), torch.arange(7), one_pass=True)
    batches = [data.rows(step, 3, 0) for step in range(3)]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(7))
    with pytest.raises(SettingError, match="second pass"):
        data.rows(3, 3, 0)


def test_head_columns_follow_growth_drop_load_and_copies():
    head = ClassHead(2, seed=0)
    head.grow([7, 3])
    head.grow([5, 7])
    assert head.columns(torch.tensor([3, 5, 7, 7])).tolist() == [1, 2, 0, 0]
    twin = ClassHead(2, seed=1)
    twin.load(head.state())
    head.drop([3])
    assert head.columns(torch.tensor([5, 7])).tolist() == [1, 0]
    assert twin.columns(torch.tensor([3, 5, 7])).tolist() == [1, 2, 0]
    assert not {"_sorted", "_column"} & set(head.state_dict())
