import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_sources import assert_no_leak, same_task, toy_source

from remanence.errors import SettingError
from remanence.streams import alone, domains, episodes, joint, learn_then_forget, online, split_classes
from remanence.task import Data, Event, Stream, Task

sizes = st.dictionaries(st.integers(0, 30), st.tuples(st.integers(1, 9), st.integers(1, 2)), min_size=1, max_size=5)


class OwnStream(Stream):
    """A user's own stream: two tasks of one example each, and what else it is told."""

    name = "own"

    def __init__(self, shift: float = 0.0, ordered: bool = False) -> None:
        self.shift, self.ordered = shift, ordered

    def __len__(self) -> int:
        return 2

    def event(self, index: int) -> Event:
        ids = torch.arange(4) + 4 * index
        table = Data(torch.full((4, 1, 2, 2), self.shift), torch.full((4,), index), ids, ordered=self.ordered)
        return Event("learn", Task(f"t{index}", table.select(torch.arange(3)), table.select(torch.tensor([3]))))


def all_ids(stream):
    return torch.cat([event.task.train.ids for event in stream])


def test_joint_is_one_event_of_everything():
    inner = split_classes(toy_source(), task_id_at_test=True, valid_share=0.3, bystanders=[toy_source(name="b")])
    (event,) = stream = joint(inner)
    task = event.task
    assert (event.verb, task.name, stream.name) == ("learn", "all at once", f"{inner.name}, all at once")
    assert torch.equal(task.train.ids, all_ids(inner))
    assert torch.equal(task.test.ids, torch.cat([each.task.test.ids for each in inner]))
    assert torch.equal(task.valid.ids, torch.cat([each.task.valid.ids for each in inner]))
    assert [part.name for part in stream.subjects] == [each.task.name for each in inner]
    assert (stream.task_id_at_test, stream.bystanders, stream.mode) == (True, inner.bystanders, "sequential")
    assert_no_leak(stream)


def test_joint_unites_domains_that_share_rows():
    inner = domains(toy_source(), valid_share=0.3)
    stream = joint(inner)
    assert len(stream[0].task.train) == sum(len(event.task.train) for event in inner)
    assert_no_leak(stream)


def test_joint_without_validation_has_none():
    assert joint(split_classes(toy_source()))[0].task.valid is None


def test_joint_refuses_a_taken_name():
    with pytest.raises(SettingError, match="already that of a task"):
        joint(split_classes(toy_source(), 1), name="class c5")


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(1, 12), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 3))
def test_online_shows_every_example_once_in_chunks(counts, chunk, blur, seed):
    inner = split_classes(toy_source(counts), 1)
    stream = online(inner, chunk, blur, seed)
    assert torch.equal(all_ids(stream).sort().values, all_ids(inner).sort().values)
    assert all(1 <= len(event.task.train) <= chunk and event.task.train.one_pass for event in stream)
    assert len(stream) == sum(-(-len(event.task.train) // chunk) for event in inner)
    assert_no_leak(stream)
    by_name = {task.name: task for task in stream.subjects}
    assert list(by_name) == [event.task.name for event in inner]
    assert all(torch.equal(event.task.test.ids, by_name[event.task.name].test.ids) for event in stream)


@settings(deadline=None, max_examples=30)
@given(sizes, st.integers(1, 6), st.sampled_from([0.0, 1.0]), st.integers(0, 99))
def test_a_chunk_is_a_pure_function_of_its_index(counts, chunk, blur, index):
    first, second = (online(split_classes(toy_source(counts), 1), chunk, blur) for _ in range(2))
    whole = list(first)
    index %= len(whole)
    assert same_task(second[index].task, whole[index].task)
    assert all(same_task(a.task, b.task) for a, b in zip(whole, first, strict=True))
    with pytest.raises(IndexError):
        first[len(whole)]


@settings(deadline=None, max_examples=30)
@given(sizes, st.integers(1, 6))
def test_without_blur_the_boundaries_hold(counts, chunk):
    inner = split_classes(toy_source(counts), 1)
    stream = online(inner, chunk)
    for event in stream:
        whole = next(each.task for each in inner if each.task.name == event.task.name)
        assert torch.isin(event.task.train.ids, whole.train.ids).all()
    names = [event.task.name for event in stream]
    assert names == sorted(names, key=[event.task.name for event in inner].index)


def test_blur_mixes_neighbours_and_only_near_the_boundary():
    inner = split_classes(toy_source(dict.fromkeys(range(3), (40, 1))), 1)
    first, second, third = (set(event.task.train.ids.tolist()) for event in inner)
    shares = []
    for blur in (0.0, 0.5, 1.0):
        order = all_ids(online(inner, 5, blur)).tolist()
        moved = [place for place, row in enumerate(order) if row not in (first, second, third)[place // 40]]
        shares.append(len(moved))
        reach = blur * 40 / 2
        assert all(min(abs(place + 0.5 - 40), abs(place + 0.5 - 80)) < reach for place in moved)
    assert shares[0] == 0 < shares[1] < shares[2]
    names = [event.task.name for event in online(inner, 2, 1.0)]
    runs = 1 + sum(a != b for a, b in itertools.pairwise(names))
    assert runs > 3  # a task's name comes again


def test_a_mixed_chunk_is_named_after_the_majority():
    inner = split_classes(toy_source(dict.fromkeys(range(2), (40, 1))), 1)
    own = {event.task.name: event.task.train.ids for event in inner}
    for event in online(inner, 7, 1.0):
        counts = {name: int(torch.isin(event.task.train.ids, ids).sum()) for name, ids in own.items()}
        assert counts[event.task.name] == max(counts.values())


def test_the_order_of_examples_has_its_seed():
    inner = split_classes(toy_source())
    assert not torch.equal(all_ids(online(inner, 3)), all_ids(online(inner, 3, order_seed=1)))


def test_online_keeps_the_order_of_documents():
    assert all_ids(online(OwnStream(ordered=True), 2)).tolist() == [0, 1, 2, 4, 5, 6]


def test_online_around_joint_is_the_one_pass_upper_bound():
    inner = split_classes(toy_source())
    stream = online(joint(inner), 4)
    assert {event.task.name for event in stream} == {"all at once"}
    assert stream[0].task.parts == ()
    assert [task.name for task in stream.subjects] == [event.task.name for event in inner]
    assert torch.equal(all_ids(stream).sort().values, all_ids(inner).sort().values)


@pytest.mark.parametrize(
    ("chunk", "blur", "message"), [(0, 0.0, "chunk: 0"), (1, -0.1, "blur: -0.1"), (1, 1.1, "blur: 1.1 lies outside")]
)
def test_online_refuses_wrong_settings(chunk, blur, message):
    with pytest.raises(SettingError, match=message):
        online(split_classes(toy_source()), chunk, blur)


def test_online_refuses_blur_where_the_task_is_told():
    told = split_classes(toy_source(), task_id_at_test=True)
    assert online(told, 3).task_id_at_test
    with pytest.raises(SettingError, match="tells the task at test time"):
        online(told, 3, blur=0.5)


def test_alone_is_independent_over_the_same_events():
    inner = split_classes(toy_source(), bystanders=[toy_source(name="b")])
    stream = alone(inner)
    assert (stream.mode, stream.bystanders, stream.task_id_at_test) == ("independent", inner.bystanders, False)
    assert all(same_task(a.task, b.task) for a, b in zip(stream, inner, strict=True))


def test_learn_then_forget_by_place_or_name():
    inner = split_classes(toy_source(), 1)
    names = [event.task.name for event in inner]
    for forget in ([2, 0], [names[2], names[0]]):
        stream = learn_then_forget(inner, forget)
        assert [event.verb for event in stream] == ["learn"] * 4 + ["forget"] * 2
        assert [event.task.name for event in stream] == [*names, names[2], names[0]]
        assert same_task(stream[-1].task, inner[0].task)
        assert [task.name for task in stream.subjects] == names


def test_a_part_of_a_joint_stream_and_a_task_of_an_online_one_can_be_forgotten():
    inner = split_classes(toy_source())
    assert same_task(learn_then_forget(joint(inner), [1])[-1].task, inner[1].task)
    assert same_task(learn_then_forget(online(inner, 3), [1])[-1].task, inner[1].task)


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ([], "name at least one subject, each once. Subjects: 0 = 'class c"),
        ([1, 1], "each once"),
        ([4], "there is no subject 4 in .* Subjects: 0 = 'class c"),
        ([-5], "there is no subject -5"),
        (["clas c5"], "Did you mean 'class c5'"),
    ],
)
def test_forgetting_the_unknown_names_the_known(forget, message):
    with pytest.raises(SettingError, match=message):
        learn_then_forget(split_classes(toy_source(), 1), forget)


def test_independent_and_forgetting_streams_are_refused():
    inner = split_classes(toy_source())
    for independent in (alone(inner), episodes(toy_source(), ways=2, queries=1, n=3)):
        for cut in (joint, alone, lambda stream: online(stream, 2), lambda stream: learn_then_forget(stream, [0])):
            with pytest.raises(SettingError, match="needs a sequential stream"):
                cut(independent)
    forgetting = learn_then_forget(inner, [0])
    for cut in (joint, alone, lambda stream: online(stream, 2)):
        with pytest.raises(SettingError, match="put learn_then_forget around"):
            cut(forgetting)


def test_test_only_tasks_cannot_be_taught_again():
    class Untaught(OwnStream):
        def event(self, index: int) -> Event:
            return Event("learn", Task("t", None, super().event(index).task.test))

    for cut in (joint, lambda stream: online(stream, 2)):
        with pytest.raises(SettingError, match="test-only and cannot be taught"):
            list(cut(Untaught()))


def test_fingerprints_reach_through_to_the_content():
    inner, other = split_classes(toy_source()), split_classes(toy_source(), order_seed=1)
    made = [cut(stream) for stream in (inner, other) for cut in (joint, alone, lambda s: online(s, 2), lambda s: learn_then_forget(s, [0]))]
    made += [online(inner, 3), online(inner, 2, 0.5), learn_then_forget(inner, [1]), joint(OwnStream()), joint(OwnStream(0.5))]
    assert len({stream.fingerprint() for stream in made}) == len(made)
    assert joint(OwnStream()).fingerprint() == joint(OwnStream()).fingerprint()
