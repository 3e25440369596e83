"""Data, tasks and streams: batches are pure functions, leaks are refused, lazy streams end."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from list_stream import ListStream

from remanence.errors import DataError, SettingError
from remanence.task import Data, Event, Stream, Task, concatenate, example_ids, origins


def table(n, first=0, **settings):
    ids = torch.arange(first, first + n)
    return Data(ids[:, None].float(), ids % 2, ids, **settings)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 3), st.booleans())
def test_every_pass_visits_every_row_once(n, size, epochs, ordered):
    data = table(n, ordered=ordered)
    batches = [data.rows(step, size, 3, "key") for step in range(data.steps(epochs, size))]
    assert {len(batch) for batch in batches} == {min(size, n)}
    visited = torch.cat(batches)
    assert len(visited) - n * epochs < min(size, n)
    for epoch in range(epochs):
        one_pass = visited[epoch * n : (epoch + 1) * n]
        assert sorted(one_pass.tolist()) == list(range(n))
        assert not ordered or one_pass.tolist() == list(range(n))


@given(st.integers(1, 40), st.integers(1, 50))
def test_one_pass_shows_every_row_once_and_then_refuses(n, size):
    data = table(n, one_pass=True)
    steps = data.steps(1, size)
    assert sorted(torch.cat([data.rows(step, size, 0) for step in range(steps)]).tolist()) == list(range(n))
    with pytest.raises(SettingError, match=f"begins a second pass over {n} rows"):
        data.rows(steps, size, 0)


def test_rows_are_a_pure_function_of_step_size_and_key():
    data = table(20)
    first = data.rows(3, 4, 0, "a").clone()
    data.rows(1, 7, 0, "a").zero_()
    data.rows(3, 4, 0, "a").zero_()  # a caller may do what he likes with the rows
    assert torch.equal(data.rows(3, 4, 0, "a"), first)
    assert torch.equal(table(20, first=50).rows(3, 4, 0, "a"), first)
    assert not torch.equal(data.rows(3, 4, 1, "a"), first)
    assert not torch.equal(data.rows(8, 4, 0, "a"), first)  # the second pass has an order of its own
    assert torch.equal(table(5).rows(1, 1, 1), table(5).rows(1, 1, 1))


def test_the_order_of_a_document_is_content_also_in_its_second_pass():
    assert table(5, ordered=True).rows(1, 3, "any").tolist() == [3, 4, 0]


def test_an_empty_table():
    empty = table(0)
    assert (len(empty), empty.steps(5, 8)) == (0, 0)
    with pytest.raises(DataError, match="an empty table has no batches"):
        empty.rows(0, 4)
    assert Task("empty", empty, table(2)).classes == ()


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"of one length; got 2, 3 and 3"):
        Data(torch.zeros(2, 1), torch.zeros(3), torch.arange(3))
    with pytest.raises(DataError, match="1 of 3 ids occur twice"):
        Data(torch.zeros(3, 1), torch.zeros(3), torch.tensor([0, 1, 1]))
    with pytest.raises(DataError, match="nothing to concatenate"):
        concatenate([])
    with pytest.raises(DataError, match="different shapes"):
        concatenate([table(2), Data(torch.zeros(1, 5), torch.zeros(1), torch.tensor([9]))])
    with pytest.raises(DataError, match="occur twice"):
        concatenate([table(2), table(2, first=1)])


def test_a_leak_is_refused_also_through_a_transformed_copy():
    rows = torch.arange(4)
    train = Data(torch.zeros(4, 1), torch.zeros(4), example_ids("digits", rows))
    turned = Data(torch.zeros(4, 1), torch.zeros(4), example_ids("digits", rows + 3, variant=2))
    other = Data(torch.zeros(4, 1), torch.zeros(4), example_ids("letters", rows))
    Task("fine", train, other)
    for place in ({"test": turned}, {"test": other, "valid": turned}):
        with pytest.raises(DataError, match=r"task 't': 1 examples of (test|valid) stand in train too; split by id"):
            Task("t", train, **place)
    with pytest.raises(DataError, match="4 examples of test stand in valid too"):
        Task("t", other, train, valid=train)


@given(st.text(max_size=6), st.integers(0, 2**31 - 1), st.integers(0, 255))
def test_origins_forget_the_variant_only(source, row, variant):
    rows = torch.tensor([row])
    assert torch.equal(origins(example_ids(source, rows, variant)), example_ids(source, rows))
    assert (example_ids(source, rows, variant) >= 0).all()
    assert (example_ids(source, rows, variant) == example_ids(source, rows)).item() == (variant == 0)


def test_variants_have_a_range():
    for variant in (-1, 256):
        with pytest.raises(SettingError, match=r"outside 0..255"):
            example_ids("s", torch.arange(1), variant)


def test_a_selection_keeps_the_name_and_the_tests_of_its_classes():
    task = Task("t", table(6), table(4, first=10), valid=table(4, first=20))
    chosen = task.select(task.train.targets == 1)
    assert (chosen.name, chosen.classes) == ("t", (1,))
    assert [len(part) for part in (chosen.train, chosen.test, chosen.valid)] == [3, 2, 2]
    assert task.select(torch.tensor([4, 0])).train.ids.tolist() == [4, 0]
    with pytest.raises(DataError, match="no train set to select from"):
        Task("t", None, table(2)).select(torch.tensor([0]))


class Lazy(Stream):
    name = "lazy"

    def __len__(self):
        return 3

    def event(self, index):
        return Event("learn", Task(f"task {index}", table(2), table(2, first=10)))


def test_a_lazy_stream_ends_and_is_indexed_like_a_list():
    stream = Lazy()
    assert [event.task.name for event in stream] == ["task 0", "task 1", "task 2"]
    assert [stream[-1].task.name, stream[0].task.name] == ["task 2", "task 0"]
    assert [event.task.name for event in stream[1:]] == ["task 1", "task 2"]
    assert [event.task.name for event in reversed(stream)] == ["task 2", "task 1", "task 0"]
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"stream 'lazy' has 3 events, no event {index}"):
            stream[index]


def test_subjects_are_the_learned_leaves_once_each():
    a, b = (Task(name, table(2), table(2, first=10)) for name in "ab")
    both = Task("both", table(2), table(2, first=10), parts=(a, b))
    stream = ListStream(("learn", a), ("forget", Task("c", table(2), table(2, first=10))), ("learn", both), ("learn", a))
    assert [task.name for task in stream.subjects] == ["a", "b"]
