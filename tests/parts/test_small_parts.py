"""The learning rate as a function of the step, and the book of what was learned."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remanence.errors import DataError
from remanence.parts import TaskBook
from remanence.parts.learning_rate import warm_cosine
from remanence.parts.task_book import columns_of
from remanence.task import Data, Task


@given(st.integers(1, 200), st.floats(0, 0.99))
def test_the_rate_rises_to_one_and_falls_towards_zero(n_steps, warm_share):
    rates = [warm_cosine(step, n_steps, warm_share) for step in range(n_steps)]
    top = rates.index(max(rates))
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_the_rate_by_hand():
    assert [warm_cosine(step, 4) for step in range(4)] == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert [warm_cosine(step, 4, 0.5) for step in range(4)] == pytest.approx([0.5, 1, 1, 0.5])
    assert warm_cosine(0, 1) == 1


def task(name, labels, first=0):
    ids = torch.arange(first, first + len(labels))
    table = Data(torch.zeros(len(labels), 1), torch.tensor(labels), ids)
    return Task(name, table, Data(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)))


def book_of(*tasks):
    book = TaskBook()
    for one in tasks:
        book.add(one.name, one.train)
    return book


def test_only_classes_of_which_nothing_is_left_go():
    a, b = task("a", [1, 1, 2]), task("b", [2, 3])
    book = book_of(a, b)
    assert book.remove(a) == [1]
    assert (book.names(), book.all_classes()) == (["b"], {2, 3})
    assert book.remove(task("b", [3])) == [3]
    assert book.classes("b") == [2]
    assert book.remove(b) == [2]
    assert book.names() == []


def test_a_part_is_struck_from_the_joint_task():
    joint, part = task("joint", [1, 1, 2, 2]), task("part", [2, 2])
    book = book_of(joint)
    assert book.owner(part) == "joint"
    book.require(part)
    assert book.remove(part) == [2]
    assert (book.classes("joint"), book.n_examples("joint")) == ([1], 2)
    with pytest.raises(DataError, match="'part' was never learned, so it cannot be forgotten; learned: joint"):
        book.require(part)


def test_a_task_that_comes_again_adds_up_and_the_state_is_a_copy():
    book = book_of(task("a", [1, 2]), task("a", [2]))
    assert book.n_examples("a") == 3
    twin = TaskBook()
    twin.load(book.state())
    twin.add("b", task("b", [9]).train)
    assert ("b" in book, "b" in twin) == (False, True)
    assert book.state() == {"a": {"1": 1, "2": 2}}


def test_columns():
    assert columns_of([5, 3, 9], [9, 5]) == [0, 2]
