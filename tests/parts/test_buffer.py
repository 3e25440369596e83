"""The reservoir: a uniform sample within a byte budget."""

import pytest
import torch

from remanence.errors import SettingError
from remanence.parts import ReservoirBuffer
from remanence.state import copy_state, states_equal
from remanence.task import Data

BYTES = 4 * 4 + 8 + 8  # four float32 pixels, target, id


def table(first, n):
    ids = torch.arange(first, first + n)
    return Data(ids[:, None].repeat(1, 4).float(), ids % 3, ids)


def filled(capacity, *sizes, seed=0):
    buffer, first = ReservoirBuffer(capacity * BYTES + BYTES - 1, seed), 0
    for size in sizes:
        buffer.offer(table(first, size))
        first += size
    return buffer


def test_every_example_is_kept_with_equal_probability():
    n, capacity, n_draws = 30, 6, 3000
    for sizes in ((30,), (10, 10, 10), (1, 29), (3, 20, 7)):
        kept = torch.zeros(n)
        for seed in range(n_draws // 4):
            kept[filled(capacity, *sizes, seed=seed).ids] += 1
        expected = n_draws // 4 * capacity / n
        chi_square = ((kept - expected) ** 2 / (expected * (1 - capacity / n))).sum().item()
        assert chi_square < 60  # 29 degrees of freedom: above 58 once in a thousand


def test_the_budget_is_a_bound_in_bytes():
    for capacity in (1, 5, 100):
        buffer = filled(capacity, 7, 40, 3)
        assert len(buffer) == min(capacity, 50)
        held = sum(part.numel() * part.element_size() for part in (buffer.inputs, buffer.targets, buffer.ids))
        assert held <= buffer.budget_bytes
        assert torch.equal(buffer.inputs[:, 0].long(), buffer.ids)
        assert torch.equal(buffer.targets, buffer.ids % 3)
        assert len(buffer.ids.unique()) == len(buffer)


def test_what_was_dropped_is_gone_and_its_place_is_filled_again():
    buffer = filled(10, 10)
    assert buffer.drop(torch.tensor([2, 3, 99])) == 2
    assert sorted(buffer.ids.tolist()) == [0, 1, 4, 5, 6, 7, 8, 9]
    buffer.offer(table(100, 5))
    assert len(buffer) == 10
    assert {100, 101} <= set(buffer.ids.tolist())
    assert buffer.drop(buffer.ids.clone()) == 10
    assert len(buffer) == 0
    buffer.offer(table(200, 2))
    assert buffer.ids.tolist() == [200, 201]


def test_state_is_copied_and_the_draws_go_on_as_if_nothing_happened():
    buffer, twin = filled(4, 9), ReservoirBuffer(4 * BYTES + BYTES - 1, 0)
    twin.load(buffer.state())
    before = copy_state(buffer.state())
    twin.offer(table(50, 9))
    assert states_equal(before, buffer.state())
    buffer.offer(table(50, 9))
    assert states_equal(buffer.state(), twin.state())


def test_rows_are_drawn_without_repetition_from_the_key():
    buffer = filled(8, 20)
    rows = buffer.rows(5, 0, "a")
    assert len(rows.unique()) == 5
    assert torch.equal(rows, buffer.rows(5, 0, "a"))
    assert len(buffer.rows(99, 0)) == 8


def test_errors_and_nothing_at_all():
    with pytest.raises(SettingError, match="budget_bytes=0 holds no example"):
        ReservoirBuffer(0, 0)
    buffer = ReservoirBuffer(BYTES - 1, 0)
    buffer.offer(table(0, 0))
    assert (len(buffer), buffer.capacity(table(0, 0))) == (0, 0)
    with pytest.raises(SettingError, match=r"below the size of one example of shape \(4,\)"):
        buffer.offer(table(0, 1))
