import json
import subprocess
import sys
from pathlib import Path

import pytest
import stream_hashes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_sources import assert_no_leak, same_task, tables, toy_source

from remanence.errors import DataError, SettingError
from remanence.streams import domains, part, permuted, split_classes, turned
from remanence.streams._changes import Permutation, Turn
from remanence.streams.source import variants
from remanence.task import origins

sizes = st.dictionaries(st.integers(0, 30), st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=6)
shares = st.sampled_from([0.0, 0.1, 0.5, 0.9])


@settings(deadline=None, max_examples=40)
@given(sizes, st.integers(1, 6), st.integers(0, 5), shares)
def test_split_classes_covers_every_class_and_row_once(counts, per_task, seed, share):
    source = toy_source(counts)
    stream = split_classes(source, min(per_task, len(counts)), seed, valid_share=share)
    seen = [label for event in stream for label in event.task.classes]
    assert sorted(seen) == sorted(counts)
    rows = torch.cat([table.ids for event in stream for table in tables(event.task)])
    assert torch.equal(rows.sort().values, source.ids)
    assert_no_leak(stream)
    names = [event.task.name for event in stream]
    assert len(set(names)) == len(names)


@settings(deadline=None, max_examples=30)
@given(sizes, st.integers(0, 5), shares, st.sampled_from(["split", "domains", "permuted"]), st.integers(0, 3))
def test_an_event_is_a_pure_function_of_its_index(counts, seed, share, kind, index):
    def make():
        source = toy_source(counts)
        if kind == "split":
            return split_classes(source, 1, seed, valid_share=share)
        return domains(source, (0, 30, 90), seed, valid_share=share) if kind == "domains" else permuted(source, 3, seed, valid_share=share)

    whole, other = list(make()), make()
    index %= len(whole)
    assert same_task(other[index].task, whole[index].task)  # asked for before any other
    assert all(same_task(a.task, b.task) for a, b in zip(whole, other, strict=True))
    assert all(same_task(a.task, b.task) for a, b in zip(other, other, strict=True))


def test_ids_are_those_of_every_platform_and_process():
    golden = json.loads((Path(__file__).parent / "golden_ids.json").read_text())
    assert stream_hashes.hashes() == golden
    out = subprocess.run([sys.executable, stream_hashes.__file__], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == golden


def test_the_order_seed_moves_the_order_and_nothing_else():
    source = toy_source(dict.fromkeys(range(10), (4, 2)))
    first, second = (split_classes(source, 1, seed, valid_share=0.5) for seed in (0, 1))
    names = [[event.task.name for event in stream] for stream in (first, second)]
    assert names[0] != names[1]
    assert sorted(names[0]) == sorted(names[1])
    by_name = {event.task.name: event.task for event in second}
    assert all(same_task(event.task, by_name[event.task.name]) for event in first)


def test_the_last_task_takes_what_is_left():
    stream = split_classes(toy_source(), per_task=3)
    assert [len(event.task.classes) for event in stream] == [3, 1]
    assert len(stream.subjects) == 2
    with pytest.raises(IndexError, match="has 2 events, no event 2"):
        stream[2]
    assert stream[-1] is stream[1]


def test_long_names_are_cut_short_and_stay_unique():
    source = toy_source(dict.fromkeys(range(40), (1, 1)))
    names = [event.task.name for event in split_classes(source, per_task=20)]
    assert all("and 19 more" in name and len(name) <= 40 for name in names)
    assert len(set(names)) == 2


def test_class_names_with_commas_do_not_collide():
    source = toy_source(dict.fromkeys(range(4), (1, 1)))
    source.class_names.update({0: "a", 1: "b, c", 2: "a, b", 3: "c"})
    for seed in range(12):
        names = [event.task.name for event in split_classes(source, 2, seed)]
        assert len(set(names)) == len(names)


def test_task_ids_and_validation_are_as_asked():
    plain, told = split_classes(toy_source()), split_classes(toy_source(), task_id_at_test=True, valid_share=0.2)
    assert (plain.task_id_at_test, told.task_id_at_test) == (False, True)
    assert all(event.task.valid is None for event in plain)
    assert all(event.task.valid is not None and len(event.task.valid) == 2 for event in told)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"per_task": 0}, r"per_task: 0 lies outside 1\.\.4"),
        ({"per_task": 5}, r"per_task: 5 lies outside 1\.\.4"),
        ({"valid_share": 1.0}, "valid_share: 1.0"),
        ({"valid_share": -0.1}, "valid_share: -0.1"),
    ],
)
def test_split_classes_refuses_wrong_settings(wrong, message):
    with pytest.raises(SettingError, match=message):
        split_classes(toy_source(), **wrong)


@pytest.mark.parametrize(("counts", "side"), [({0: (2, 2), 1: (2, 0)}, "test"), ({0: (2, 2), 1: (0, 2)}, "train")])
def test_a_class_on_one_side_of_the_split_is_named(counts, side):
    for cut in (lambda source: split_classes(source, 1), domains, permuted):
        with pytest.raises(DataError, match=rf"1 of 2 classes have no {side} images \(first three: \['c1'\]\)"):
            cut(toy_source(counts))


def test_bystanders_are_test_only_tasks():
    source = toy_source()
    old = turned(part(source, "pretrain"))
    stream = split_classes(part(source, "stream"), bystanders=[old])
    (task,) = stream.bystanders
    assert (task.name, task.train) == ("toy pretrain turned", None)
    assert torch.equal(task.test.ids, old.test.ids)
    assert_no_leak(stream)


def test_a_bystander_that_leaks_is_refused():
    source = toy_source()
    exposed = turned(source.select(~source.is_test))
    exposed = type(exposed)(exposed.name, exposed.images, exposed.labels, exposed.ids, ~exposed.is_test, exposed.class_names)
    for cut in (split_classes, domains, permuted):
        with pytest.raises(DataError, match="66 of its test images are, turned or not, trained on in 'toy'"):
            cut(source, bystanders=[exposed])


def test_other_impossible_bystanders():
    source = toy_source()
    with pytest.raises(DataError, match=r"must share \(C, H, W\).*\(3, 4, 4\)"):
        split_classes(source, bystanders=[toy_source(name="other", channels=3)])
    with pytest.raises(SettingError, match="bystanders must differ in name"):
        split_classes(source, bystanders=[toy_source(name="other"), toy_source(name="other")])
    with pytest.raises(SettingError, match="from the tasks"):
        split_classes(source, 1, bystanders=[toy_source(name="class c5")])
    held = toy_source(name="other")
    with pytest.raises(DataError, match="'other' has no test images"):
        split_classes(source, bystanders=[held.select(~held.is_test)])


@settings(deadline=None, max_examples=30)
@given(sizes, st.lists(st.integers(-400, 400), min_size=1, max_size=4, unique_by=lambda angle: angle % 360), shares)
def test_domains_show_all_rows_in_every_task_without_a_leak(counts, degrees, share):
    source = toy_source(counts)
    stream = domains(source, degrees, valid_share=share)
    assert {event.task.name for event in stream} == {f"turned {angle % 360}°" for angle in degrees}
    for event in stream:
        rows = torch.cat([origins(table.ids) for table in tables(event.task)])
        assert torch.equal(rows.sort().values, source.ids)
    assert_no_leak(stream)
    every = torch.cat([table.ids for event in stream for table in tables(event.task)])
    assert len(torch.unique(every)) == len(every)


def test_right_angles_are_exact_and_carry_the_variants_of_turned():
    source = toy_source()
    by_name = {event.task.name: event.task for event in domains(source)}
    assert torch.equal(by_name["turned 0°"].test.inputs, source.test.inputs)
    quarter = turned(source, (1,))
    assert torch.equal(by_name["turned 90°"].test.inputs, quarter.test.inputs)
    assert torch.equal(by_name["turned 90°"].test.ids, quarter.test.ids)


@pytest.mark.parametrize("quarter", [1, 2, 3])
@pytest.mark.parametrize("side", [4, 5])
def test_interpolated_turns_agree_with_exact_ones(quarter, side):
    images = toy_source(side=side, channels=2).images
    almost = Turn(90 * quarter - 1, 0), Turn(90 * quarter + 1, 0)
    exact = Turn(90 * quarter, 0)(images)
    for turn in almost:
        assert float((turn(images) - exact).abs().mean()) < 0.05
    assert float((Turn(90 * quarter - 45, 0)(images) - exact).abs().mean()) > 0.1


def test_a_turn_keeps_lengths_in_oblong_images():
    disc = torch.zeros(1, 1, 21, 41)
    rows, columns = torch.meshgrid(torch.arange(21) - 10, torch.arange(41) - 20, indexing="ij")
    disc[0, 0][rows**2 + columns**2 <= 36] = 1
    assert float((Turn(30, 0)(disc) - disc).abs().mean()) < 0.02


def test_domains_refuse_wrong_angles():
    for degrees in ((), (0, 360), (90, 90)):
        with pytest.raises(SettingError, match="at least one angle, each once"):
            domains(toy_source(), degrees)
    oblong = toy_source()
    oblong = type(oblong)("toy", torch.zeros(33, 1, 4, 6), oblong.labels, oblong.ids, oblong.is_test, oblong.class_names)
    with pytest.raises(DataError, match="cannot be turned by 90"):
        domains(oblong)
    assert len(domains(oblong, (0, 180))) == 2


def test_permutations_begin_with_the_identity_and_move_channels_together():
    source = toy_source(channels=2)
    stream = permuted(source, 3)
    assert torch.equal(stream[0].task.test.inputs, source.test.inputs)
    moved = stream[1].task.test.inputs
    assert not torch.equal(moved, source.test.inputs)
    assert torch.equal(moved.flatten(2).sort().values, source.test.inputs.flatten(2).sort().values)
    both = Permutation(1, 0)(torch.arange(16.0).view(1, 1, 4, 4).repeat(1, 2, 1, 1))
    assert torch.equal(both[:, 0], both[:, 1])
    assert not torch.equal(permuted(source, 2, order_seed=1)[1].task.test.inputs, moved)


def test_permuted_refuses_wrong_numbers():
    for n in (0, 257):
        with pytest.raises(SettingError, match=f"n_tasks: {n} lies outside"):
            permuted(toy_source(), n)


def test_copies_of_copies_stay_apart_or_are_refused():
    source = turned(toy_source())
    stream = domains(source, (0, 90))
    ids = torch.cat([table.ids for event in stream for table in tables(event.task)])
    assert len(torch.unique(ids)) == len(ids)
    assert int(variants(ids).max()) < 256
    with pytest.raises(SettingError, match="cannot be told apart"):
        permuted(source, 100)


def test_fingerprints_tell_content_and_settings_apart():
    source, other = toy_source(), toy_source({0: (3, 1), 1: (3, 1)})
    streams = [
        split_classes(source), split_classes(source, 1), split_classes(source, order_seed=1), split_classes(other), domains(source),
        domains(source, (0, 90)), permuted(source), split_classes(source, bystanders=[toy_source(name="b")]),
    ]  # fmt: skip
    assert len({stream.fingerprint() for stream in streams}) == len(streams)
    assert split_classes(toy_source()).fingerprint() == streams[0].fingerprint()
