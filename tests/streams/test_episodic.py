import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_sources import assert_no_leak, same_task, toy_source

from remanence.errors import DataError, SettingError
from remanence.streams import episodes

WIDE = dict.fromkeys(range(0, 14, 2), (8, 4))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 7), st.integers(0, 3))
def test_every_episode_has_its_ways_shots_and_queries(ways, shots, queries, seed):
    stream = episodes(toy_source(WIDE), ways, shots, queries, n=4, order_seed=seed)
    assert len(list(stream)) == 4
    for event in stream:
        for table, each in ((event.task.train, shots), (event.task.test, queries)):
            labels, counts = table.targets.unique(return_counts=True)
            assert counts.tolist() == [each] * ways
            assert set(labels.tolist()) <= set(WIDE)
        assert event.task.train.targets.unique().tolist() == event.task.test.targets.unique().tolist()
        assert not torch.isin(event.task.train.ids, event.task.test.ids).any()


def test_an_episode_is_a_pure_function_of_seed_and_index():
    first, second = (episodes(toy_source(WIDE), 3, 2, n=50) for _ in range(2))
    late = second[40].task
    whole = [event.task for event in first]
    assert same_task(late, whole[40])
    assert all(same_task(a, b.task) for a, b in zip(whole, second, strict=True))
    assert same_task(episodes(toy_source(WIDE), 3, 2, n=10**6)[40].task, late)
    assert not same_task(whole[0], whole[1])
    assert not torch.equal(episodes(toy_source(WIDE), 3, 2, order_seed=1)[0].task.train.ids, whole[0].train.ids)


def test_imbalanced_shots():
    counts = episodes(toy_source(WIDE), 3, [1, 5, 2], n=1)[0].task.train.targets.unique_consecutive(return_counts=True)[1]
    assert counts.tolist() == [1, 5, 2]
    drawn = {
        n
        for event in episodes(toy_source(WIDE), 4, n=30, shots_range=(2, 5))
        for n in event.task.train.targets.unique_consecutive(return_counts=True)[1].tolist()
    }
    assert drawn == {2, 3, 4, 5}


def test_a_million_episodes_cost_nothing_until_asked_for():
    source = toy_source(WIDE)
    start = time.perf_counter()
    stream = episodes(source, n=10**6)
    assert stream.subjects == ()
    assert stream[10**6 - 1].task.name == "episode 999999"
    assert time.perf_counter() - start < 1  # a million built episodes would take a hundred
    assert stream.mode == "independent"
    with pytest.raises(IndexError):
        stream[10**6]


def test_names_say_what_they_are():
    source = toy_source(WIDE)
    assert episodes(source, 5, 1).name == "toy, 5-way 1-shot"
    assert episodes(source, 2, [1, 3]).name == "toy, 2-way 1-3-shot"
    assert episodes(source, 2, shots_range=(2, 4)).name == "toy, 2-way 2-4-shot"
    assert_no_leak(episodes(source, 2, n=1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ways": 0}, "ways: 0"),
        ({"ways": 8}, "ways: 8 classes an episode, but 'toy' has 7 only"),
        ({"queries": 0}, "queries: 0"),
        ({"n": 0}, "n: 0"),
        ({"shots": 0}, "shots: 0"),
        ({"shots": [1, 2]}, "2 numbers for 5 ways"),
        ({"shots": [1, 2, 0, 1, 1]}, "shots: 0"),
        ({"shots": 2, "shots_range": (1, 3)}, "contradict each other"),
        ({"shots_range": (3, 1)}, "the least and the most"),
        ({"shots_range": (0, 1)}, "shots: 0"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(SettingError, match=message):
        episodes(toy_source(WIDE), **wrong)


def test_too_few_examples_are_named():
    with pytest.raises(DataError, match=r"7 of 7 classes of 'toy' have fewer than 13 rows, which 8 shots and 5 queries need"):
        episodes(toy_source(WIDE), shots=8)


def test_fingerprints():
    source = toy_source(WIDE)
    variants = [{}, {"ways": 4}, {"order_seed": 1}, {"shots_range": (1, 2)}, {"n": 9}]
    made = [episodes(source, **each) for each in variants]
    assert len({stream.fingerprint() for stream in made}) == len(made)
