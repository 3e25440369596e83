import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import DataError, SettingError
from remanence.generated import UNLABELED, Episode, EpisodeSampler, SequenceSampler, require_disjoint
from remanence.streams import Source, omniglot, part, turned
from remanence.task import example_ids

CORNERS = ((0, 0), (-1, 0), (-1, -1), (0, -1))  # where a pixel of the top left corner goes by quarter turns anticlockwise


def coded_source(sizes: dict[int, int], name: str = "coded", side: int = 5) -> Source:
    """Label -> number of rows; every image says which row it is, and a white corner which way it is turned."""
    labels = torch.tensor([label for label, n in sizes.items() for _ in range(n)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    rows = torch.arange(len(labels))
    images = (rows.float() / 2000)[:, None, None, None].expand(-1, 1, side, side).clone()
    images[:, :, 0, 0] = 1.0
    names = {label: f"{name} {label}" for label in sizes}
    return Source(name, images, labels, example_ids(name, rows), torch.zeros(len(labels), dtype=torch.bool), names)


def rows_of(images: torch.Tensor) -> torch.Tensor:
    """(...) which row of its source each image (..., C, H, W) is."""
    return (images.flatten(-3).amin(-1) * 2000).round().long()


def turns_of(images: torch.Tensor) -> torch.Tensor:
    """(...) by how many quarters each image is turned."""
    return torch.stack([images[..., 0, row, column] for row, column in CORNERS], -1).argmax(-1)


def same_episode(first: Episode, second: Episode) -> bool:
    one, other = vars(first), vars(second)
    return all(torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name] for name, value in one.items())


def assert_true_to(episode: Episode, source: Source) -> None:
    """Every labelled or asked image is of the class, and turned the way, that its slot is named after."""
    for images, labels in ((episode.support_x, episode.support_y), (episode.query_x, episode.query_y)):
        for task, names in enumerate(episode.class_names):
            shown = labels[task] != UNLABELED
            rows, turns = rows_of(images[task][shown]), turns_of(images[task][shown])
            for row, turn, slot in zip(rows.tolist(), turns.tolist(), labels[task][shown].tolist(), strict=True):
                name = source.class_names[int(source.labels[row])]
                assert names[slot] == (f"{name} turned {90 * turn}°" if turn else name)


SIZES = {0: 9, 3: 6, 4: 12, 7: 7, 8: 20, 11: 6, 12: 8}


def test_a_plain_episode():
    source = coded_source(SIZES)
    episode = EpisodeSampler(source, ways=4, shots=2, queries=3, tasks=6).sample(0)
    assert episode.support_x.shape == (6, 8, 1, 5, 5)
    assert episode.query_x.shape == (6, 12, 1, 5, 5)
    assert episode.support_y.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 6
    assert episode.query_y.tolist() == [[0] * 3 + [1] * 3 + [2] * 3 + [3] * 3] * 6
    assert episode.support_mask is None
    assert episode.ways.tolist() == [4] * 6
    assert_true_to(episode, source)


def test_an_episode_is_a_function_of_seed_and_step():
    source = coded_source(SIZES)
    sampler = EpisodeSampler(source, ways=(2, 4), shots=(1, 3), queries=2, unlabeled=1, quarter_turns=True)
    first = sampler.sample(5)
    before = torch.get_rng_state()
    sampler.sample(6)
    assert torch.equal(before, torch.get_rng_state())
    assert same_episode(first, sampler.sample(5))
    assert same_episode(first, EpisodeSampler(source, (2, 4), (1, 3), 2, unlabeled=1, quarter_turns=True).sample(5))
    other = EpisodeSampler(source, (2, 4), (1, 3), 2, unlabeled=1, quarter_turns=True, seed=1)
    assert not same_episode(first, other.sample(5))
    assert not same_episode(first, sampler.sample(7))


@settings(deadline=None, max_examples=25)
@given(
    step=st.integers(0, 10**9),
    ways=st.integers(1, 7),
    shots=st.tuples(st.integers(1, 2), st.integers(2, 3)),
    queries=st.integers(1, 2),
    unlabeled=st.integers(0, 1),
)
def test_no_row_of_a_task_comes_twice(step, ways, shots, queries, unlabeled):
    source = coded_source(SIZES)
    episode = EpisodeSampler(source, ways, shots, queries, tasks=3, unlabeled=unlabeled).sample(step)
    present = torch.ones_like(episode.support_y, dtype=torch.bool) if episode.support_mask is None else episode.support_mask
    for task in range(3):
        rows = torch.cat([rows_of(episode.support_x[task][present[task]]), rows_of(episode.query_x[task])])
        assert len(torch.unique(rows)) == len(rows)
        assert len(set(episode.class_names[task])) == ways
    assert_true_to(episode, source)


def test_a_class_may_take_any_slot_and_any_of_its_rows():
    source = coded_source({0: 6, 1: 9, 2: 6})
    episode = EpisodeSampler(source, ways=3, shots=1, queries=2, tasks=300).sample(0)
    slot_of_class_1 = torch.tensor([names.index("coded 1") for names in episode.class_names])
    counts = torch.bincount(slot_of_class_1, minlength=3)
    assert counts.min() > 70  # 100 each in the mean
    support = torch.bincount(rows_of(episode.support_x).flatten(), minlength=len(source)).float()
    for label, n in ((0, 6), (1, 9), (2, 6)):
        expected = 300 / n
        found = support[source.labels == label]
        assert len(found) == n
        assert ((found - expected).abs() < 5 * expected**0.5).all()


def test_the_source_is_neither_copied_nor_changed():
    source = coded_source(SIZES)
    before = source.images.clone()
    sampler = EpisodeSampler(source, ways=3, shots=(1, 3), queries=2, quarter_turns=True)
    sampler.sample(0).support_x.add_(1)
    assert torch.equal(source.images, before)
    assert sampler._pool.images[0] is source.images


def test_a_range_of_shots_is_padded_with_the_mask():
    source = coded_source(SIZES)
    episode = EpisodeSampler(source, ways=3, shots=(1, 4), queries=2, tasks=50).sample(0)
    mask = episode.support_mask.view(50, 3, 4)
    assert episode.support_x.shape == (50, 12, 1, 5, 5)
    assert set(mask.sum(2).flatten().tolist()) == {1, 2, 3, 4}
    assert (mask.sum(2) != mask.sum(2)[:, :1]).any()  # within a task too
    assert (mask.long().diff(dim=2) <= 0).all()  # the present ones stand first
    slots = torch.arange(3)[:, None].expand(50, 3, 4)
    assert torch.equal(episode.support_y.view(50, 3, 4), torch.where(mask, slots, UNLABELED))
    assert not episode.support_x[~episode.support_mask].any()
    assert_true_to(episode, source)


def test_a_range_of_ways_is_drawn_once_a_step():
    sampler = EpisodeSampler(coded_source(SIZES), ways=(2, 5), queries=2, tasks=3)
    found = [sampler.sample(step).ways.tolist() for step in range(40)]
    assert all(len(set(ways)) == 1 for ways in found)
    assert {ways[0] for ways in found} == {2, 3, 4, 5}


def test_unlabelled_rows_stand_behind_and_are_of_the_same_classes():
    source = coded_source(SIZES)
    episode = EpisodeSampler(source, ways=3, shots=(1, 2), queries=2, tasks=20, unlabeled=2).sample(0)
    assert episode.support_y.shape == (20, 3 * 2 + 3 * 2)
    assert (episode.support_y[:, 6:] == UNLABELED).all()
    assert episode.support_mask[:, 6:].all()
    for task, names in enumerate(episode.class_names):
        labels = source.labels[rows_of(episode.support_x[task, 6:])].view(3, 2)
        assert [[source.class_names[label] for label in pair] for pair in labels.tolist()] == [[name] * 2 for name in names]
    assert EpisodeSampler(source, ways=3, queries=2, unlabeled=1).sample(0).support_mask is None


def test_turned_classes_are_classes_of_their_own():
    source = coded_source(SIZES)
    episode = EpisodeSampler(source, ways=6, shots=2, queries=2, tasks=60, quarter_turns=True).sample(0)
    assert_true_to(episode, source)
    turns = turns_of(episode.support_x)
    assert torch.bincount(turns.flatten()).min() > 100  # 180 each in the mean
    assert any(len({name.split(" turned")[0] for name in names}) < 6 for names in episode.class_names)  # a class meets its turned copy
    assert all(len(set(names)) == 6 for names in episode.class_names)


def test_a_turn_is_the_one_that_turned_makes():
    source = coded_source({0: 6}, side=3)
    copies = turned(source)
    episode = EpisodeSampler(source, ways=4, shots=1, queries=1, tasks=1, quarter_turns=True).sample(0)
    for image, slot in zip(episode.support_x[0], episode.support_y[0].tolist(), strict=True):
        turn, row = int(turns_of(image)), int(rows_of(image))
        expected = copies.images[(turn - 1) * len(source) + row] if turn else source.images[row]
        assert torch.equal(image, expected)
        assert (f"turned {90 * turn}°" in episode.class_names[0][slot]) == bool(turn)


def test_class_ids_tell_classes_apart_across_turns_and_sources():
    source, other = coded_source(SIZES), coded_source(SIZES, name="other")
    episodes = [
        EpisodeSampler(source, ways=7, queries=1, tasks=9).sample(0),
        EpisodeSampler(source, ways=28, queries=1, tasks=2, quarter_turns=True).sample(1),
        EpisodeSampler(other, ways=28, queries=1, tasks=2, quarter_turns=True).sample(2),
    ]
    pairs = {
        (int(number), name)
        for episode in episodes
        for numbers, names in zip(episode.class_ids, episode.class_names, strict=True)
        for number, name in zip(numbers, names, strict=True)
    }
    assert len(pairs) == len({number for number, _ in pairs}) == len({name for _, name in pairs}) == 2 * 28


def test_class_ids_do_not_depend_on_which_classes_are_selected():
    source = coded_source(SIZES)
    fewer = source.select(source.labels > 5)
    ids = dict(zip(*(lambda e: (e.class_names[0], e.class_ids[0].tolist()))(EpisodeSampler(source, 7, queries=1).sample(0)), strict=True))
    some = EpisodeSampler(fewer, 4, queries=1).sample(0)
    assert [ids[name] for name in some.class_names[0]] == some.class_ids[0].tolist()


def test_the_classes_drawn_from():
    assert EpisodeSampler(coded_source(SIZES), ways=2, queries=1).classes == (0, 3, 4, 7, 8, 11, 12)


def test_every_class_and_row_may_be_needed():
    episode = EpisodeSampler(coded_source({0: 3, 1: 3}), ways=2, shots=1, queries=1, unlabeled=1, tasks=2).sample(0)
    rows = torch.cat([rows_of(episode.support_x), rows_of(episode.query_x)], dim=1)
    assert rows.sort().values.tolist() == [list(range(6))] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ways": 0}, "ways: 0; give a number from 1, or a range"),
        ({"ways": (3, 2)}, r"ways: \(3, 2\); give a number"),
        ({"shots": (0, 2)}, r"shots: \(0, 2\); give a number"),
        ({"shots": (1, 2, 3)}, r"shots: \(1, 2, 3\); give a number"),
        ({"queries": 0}, "queries: 0; give 1 or more"),
        ({"tasks": 0}, "tasks: 0; give 1 or more"),
        ({"unlabeled": -1}, "unlabeled: -1; give 0 or more"),
        ({"ways": 8}, "8 different classes are needed, 'coded' has 7; lower ways"),
        ({"ways": (2, 29), "quarter_turns": True}, "29 different classes are needed, 'coded' has 28"),
    ],
)
def test_settings_out_of_range_are_refused(given, message):
    with pytest.raises(SettingError, match=message):
        EpisodeSampler(coded_source(SIZES), **{"ways": 2, "queries": 1, **given})


def test_a_class_with_too_few_rows_is_named():
    with pytest.raises(DataError, match="class 'coded 3' has 6 rows, shots, unlabelled and queries need 7; lower them or leave"):
        EpisodeSampler(coded_source(SIZES), ways=2, shots=(1, 2), queries=4, unlabeled=1)


def test_what_cannot_be_turned_is_refused():
    rows = torch.arange(4)
    flat = Source("flat", torch.rand(4, 1, 2, 3), rows // 2, example_ids("flat", rows), rows < 0, {0: "a", 1: "b"})
    assert EpisodeSampler(flat, ways=2, queries=1).sample(0).query_x.shape == (8, 2, 1, 2, 3)
    with pytest.raises(DataError, match="'flat': images of 2 x 3 pixels cannot be turned"):
        EpisodeSampler(flat, ways=2, queries=1, quarter_turns=True)
    with pytest.raises(DataError, match="'coded turned' was turned or permuted before; give the untouched source"):
        EpisodeSampler(turned(coded_source(SIZES)), ways=2, queries=1, quarter_turns=True)


def test_sequences_of_disjoint_classes():
    source = coded_source(SIZES)
    tasks = SequenceSampler(source, n_tasks=3, ways=2, shots=1, queries=3, sequences=5).sample(0)
    assert [task.support_x.shape for task in tasks] == [(5, 2, 1, 5, 5)] * 3
    assert [task.query_y.tolist() for task in tasks] == [[[0] * 3 + [1] * 3] * 5] * 3
    for sequence in range(5):
        ids = [number for task in tasks for number in task.class_ids[sequence].tolist()]
        assert len(set(ids)) == 6
    for task in tasks:
        assert_true_to(task, source)


def test_a_sequence_is_a_function_of_seed_and_step():
    source = coded_source(SIZES)
    sampler = SequenceSampler(source, n_tasks=(1, 3), ways=2, queries=2, repeat_prob=0.5, quarter_turns=True)
    again = SequenceSampler(source, n_tasks=(1, 3), ways=2, queries=2, repeat_prob=0.5, quarter_turns=True)
    steps = {step: sampler.sample(step) for step in range(12)}
    assert {len(tasks) for tasks in steps.values()} == {1, 2, 3}
    for step in (11, 4):
        assert all(same_episode(one, other) for one, other in zip(steps[step], again.sample(step), strict=True))
    assert not same_episode(steps[0][0], SequenceSampler(source, 1, 2, queries=2, quarter_turns=True, seed=1).sample(0)[0])


def test_repeated_classes_come_from_earlier_tasks_at_the_rate_asked_for():
    sampler = SequenceSampler(coded_source(SIZES), n_tasks=3, ways=2, queries=2, sequences=400, repeat_prob=0.3)
    tasks = sampler.sample(0)
    ids = torch.stack([task.class_ids for task in tasks], 1)  # (sequences, T, n)
    assert all(len(set(row)) == 2 for task in tasks for row in task.class_ids.tolist())
    for task in (1, 2):
        earlier = ids[:, :task].flatten(1)
        repeated = (ids[:, task][:, :, None] == earlier[:, None]).any(2).float().mean()
        assert abs(float(repeated) - 0.3) < 0.07
    from_first = (ids[:, 2][:, :, None] == ids[:, 0][:, None]).any(2).sum()
    from_second = (ids[:, 2][:, :, None] == ids[:, 1][:, None]).any(2).sum()
    assert from_first > 50  # any earlier task may lend its classes
    assert from_second > 50


def test_always_repeating_stays_with_the_first_classes_in_new_slots():
    tasks = SequenceSampler(coded_source(SIZES), n_tasks=3, ways=2, queries=1, sequences=50, repeat_prob=1.0).sample(0)
    assert all(torch.equal(task.class_ids.sort().values, tasks[0].class_ids.sort().values) for task in tasks)
    assert any(not torch.equal(task.class_ids, tasks[0].class_ids) for task in tasks[1:])


def test_a_repeated_class_shows_fresh_rows_while_there_are_any():
    source = coded_source({label: 8 if label < 8 else 5 for label in range(12)})
    tasks = SequenceSampler(source, n_tasks=4, ways=2, shots=1, queries=1, sequences=60, repeat_prob=1.0).sample(0)
    for sequence in range(60):
        rows = torch.cat([torch.cat([rows_of(task.support_x[sequence]), rows_of(task.query_x[sequence])]) for task in tasks])
        labels, used = torch.unique(source.labels[torch.unique(rows)], return_counts=True)
        assert len(rows) == 16
        assert torch.equal(used, torch.where(labels < 8, 8, 5))  # four pairs use up every row of both classes
    for task in tasks:
        assert_true_to(task, source)


@settings(deadline=None, max_examples=20)
@given(step=st.integers(0, 10**9), shots=st.integers(1, 3), queries=st.integers(1, 3))
def test_a_repeated_class_that_runs_out_still_asks_for_rows_it_does_not_show(step, shots, queries):
    source = coded_source({label: 6 + label % 2 for label in range(12)})
    tasks = SequenceSampler(source, 4, 3, shots, queries, sequences=4, repeat_prob=0.8).sample(step)
    for task in tasks:
        for sequence in range(4):
            rows = torch.cat([rows_of(task.support_x[sequence]), rows_of(task.query_x[sequence])])
            assert len(torch.unique(rows)) == len(rows)
        assert_true_to(task, source)


def test_a_former_query_comes_again_before_a_former_support():
    source = coded_source(dict.fromkeys(range(6), 6))
    first, second = SequenceSampler(source, 2, 3, shots=1, queries=3, sequences=20, repeat_prob=1.0).sample(0)
    for sequence in range(20):
        shown = set(rows_of(first.support_x[sequence]).tolist())
        assert shown.isdisjoint(rows_of(torch.cat([second.support_x[sequence], second.query_x[sequence]])).tolist())


def test_several_sources_of_different_sizes():
    sizes = {0: 4, 1: 9, 2: 3, 3: 3}
    sources = [coded_source(SIZES, "one"), coded_source(sizes, "two"), coded_source({0: 30, 5: 30, 6: 30, 9: 30}, "three")]
    tasks = SequenceSampler(sources, n_tasks=2, ways=2, shots=1, queries=2, sequences=120).sample(0)
    by_name = {source.name: source for source in sources}
    chosen = []
    for task in tasks:
        for sequence in range(120):
            names = {name.split()[0] for name in task.class_names[sequence]}
            assert len(names) == 1  # a task stays within its source
            chosen += names
            assert_true_to(task.select(torch.tensor([sequence])), by_name[next(iter(names))])
    assert all(chosen.count(name) > 50 for name in by_name)  # 80 each in the mean
    assert any(a != b for a, b in zip(chosen[:120], chosen[120:], strict=True))
    assert all(len({*one, *other}) == 4 for one, other in zip(tasks[0].class_names, tasks[1].class_names, strict=True))


def test_several_sources_turn_too():
    sources = [coded_source(SIZES, "one"), coded_source({0: 4, 1: 9, 2: 3}, "two")]
    (task,) = SequenceSampler(sources, n_tasks=1, ways=6, queries=2, sequences=40, quarter_turns=True).sample(0)
    for sequence, names in enumerate(task.class_names):
        assert_true_to(task.select(torch.tensor([sequence])), sources[0] if names[0].startswith("one") else sources[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_tasks": 0}, "n_tasks: 0; give a number from 1"),
        ({"n_tasks": (3, 2)}, r"n_tasks: \(3, 2\); give a number"),
        ({"ways": 0}, "ways: 0; give 1 or more"),
        ({"shots": 0}, "shots: 0; give 1 or more"),
        ({"queries": -1}, "queries: -1; give 1 or more"),
        ({"sequences": 0}, "sequences: 0; give 1 or more"),
        ({"repeat_prob": 1.5}, r"repeat_prob: 1\.5 lies outside \[0, 1\]"),
        ({"repeat_prob": -0.1}, r"repeat_prob: -0\.1 lies outside"),
        ({"repeat_prob": float("nan")}, "repeat_prob: nan lies outside"),
        ({"n_tasks": (1, 4)}, "8 different classes are needed, 'coded' has 7; lower ways or n_tasks"),
        ({"sources": []}, "sources: none is given"),
    ],
)
def test_sequence_settings_out_of_range_are_refused(given, message):
    with pytest.raises(SettingError, match=message):
        SequenceSampler(**{"sources": coded_source(SIZES), "n_tasks": 3, "ways": 2, "queries": 1, **given})


def test_sources_that_do_not_go_together_are_refused():
    source = coded_source(SIZES)
    with pytest.raises(DataError, match="must share"):
        SequenceSampler([source, coded_source(SIZES, "wide", side=6)], ways=2, queries=1)
    with pytest.raises(DataError, match=r"the sources \['coded', 'coded'\] share classes; select different classes"):
        SequenceSampler([source, source.select(source.labels > 3)], n_tasks=1, ways=2, queries=1)
    with pytest.raises(SettingError, match="6 different classes are needed, 'few' has 3"):
        SequenceSampler([source, coded_source({0: 9, 1: 9, 2: 9}, "few")], ways=2, queries=1)
    with pytest.raises(DataError, match="class 'coded 3' has 6 rows"):
        SequenceSampler(source, ways=2, queries=6)


def test_sets_without_a_class_in_common_pass():
    source = coded_source(SIZES)
    train, test = source.select(source.labels < 5), source.select(source.labels > 5)
    require_disjoint(train, test)
    require_disjoint(EpisodeSampler(train, 2, queries=1, quarter_turns=True), SequenceSampler(test, 2, 2, queries=1))
    require_disjoint(source, coded_source(SIZES, "other"))  # the same labels of another source
    require_disjoint(turned(part(source, "pretrain")), part(source, "stream"))  # other images under other labels


def test_a_class_in_both_sets_is_refused():
    source = coded_source(SIZES)
    train, test = source.select(source.labels < 8), source.select(source.labels > 3)
    message = r"'coded' and 'coded' share 2 classes \(first three: \['coded 4', 'coded 7'\]\); select classes"
    with pytest.raises(DataError, match=message):
        require_disjoint(train, test)
    with pytest.raises(DataError, match=message):
        require_disjoint(EpisodeSampler(train, 2, queries=1), EpisodeSampler(test, 2, queries=1, quarter_turns=True))
    with pytest.raises(DataError, match=message):
        require_disjoint(train, SequenceSampler([coded_source(SIZES, "other"), test], 1, 2, queries=1))
    with pytest.raises(DataError, match=r"'coded pretrain' and 'coded' share 7 classes \(first three: \['coded 0', "):
        require_disjoint(part(source, "pretrain"), part(source, "stream"))


def test_turned_copies_of_the_test_images_are_refused():
    source = coded_source(SIZES)
    with pytest.raises(DataError, match="204 images of 'coded turned' stand in 'coded' too, turned; select classes before turning"):
        require_disjoint(turned(source), source)


def test_omniglot_halves_are_disjoint_and_an_episode_takes_milliseconds():
    try:
        train, test = omniglot(), omniglot("evaluation")
    except DataError as error:
        pytest.skip(str(error))
    require_disjoint(EpisodeSampler(train, quarter_turns=True), EpisodeSampler(test))
    sampler = EpisodeSampler(train, quarter_turns=True)
    sampler.sample(0)
    start = time.process_time()
    for step in range(20):
        sampler.sample(step)
    assert (time.process_time() - start) / 20 < 0.01  # about 1 ms on an idle core
