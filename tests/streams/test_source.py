import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from toy_sources import toy_source

from remanence.errors import DataError, SettingError
from remanence.streams import Source, digits, part, turned
from remanence.streams.source import draw_share, rows_by_value, variants, with_variant
from remanence.task import example_ids, origins


def test_train_and_test_are_the_marked_rows():
    source = toy_source()
    assert torch.equal(source.train.ids, source.ids[~source.is_test])
    assert torch.equal(source.test.ids, source.ids[source.is_test])
    assert torch.equal(source.test.inputs, source.images[source.is_test])
    assert source.classes == (0, 2, 5, 9)


def test_select_keeps_name_and_label_space():
    source = toy_source()
    kept = source.select(source.labels < 3)
    assert (kept.name, kept.classes, kept.n_labels, len(kept)) == ("toy", (0, 2), 10, 16)


@pytest.mark.parametrize("mask", [torch.arange(3), torch.ones(3, dtype=torch.bool)])
def test_select_refuses_what_is_no_mask(mask):
    with pytest.raises(DataError, match=r"a mask of 33 booleans is needed"):
        toy_source().select(mask)


def test_fingerprint_sees_every_column():
    source = toy_source()
    images, labels, ids, is_test = source.images.clone(), source.labels.clone(), source.ids.clone(), source.is_test.clone()
    images[3, 0, 1, 1] = 0
    labels[3], ids[3], is_test[3] = 2, ids[3] + 1000, True
    changed = [replace(source, images=images), replace(source, labels=labels), replace(source, ids=ids), replace(source, is_test=is_test)]
    prints = {each.fingerprint() for each in (source, *changed)}
    assert len(prints) == 5
    assert toy_source().fingerprint() == source.fingerprint()
    assert replace(source, name="other").fingerprint() == source.fingerprint()


def test_fingerprint_is_computed_once(monkeypatch):
    source = toy_source()
    first = source.fingerprint()
    monkeypatch.setattr("hashlib.sha256", None)
    assert source.fingerprint() == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(33, 4, 4)}, r"images must be \(N, C, H, W\) float32, got \(33, 4, 4\)"),
        ({"images": torch.zeros(33, 1, 4, 4, dtype=torch.uint8)}, "got .* torch.uint8"),
        ({"images": torch.zeros(0, 1, 4, 4)}, "has no images"),
        ({"images": torch.full((33, 1, 4, 4), 255.0)}, r"pixels must lie in \[0, 1\], got \[255, 255\]"),
        ({"images": torch.full((33, 1, 4, 4), float("nan"))}, "pixels must lie in"),
        ({"labels": torch.zeros(32, dtype=torch.int64)}, r"labels must be \(33,\) torch.int64, got \(32,\)"),
        ({"labels": torch.zeros(33)}, "labels must be .* torch.float32"),
        ({"labels": torch.full((33,), -1)}, "label -1 is negative"),
        ({"is_test": torch.zeros(33, dtype=torch.int64)}, "is_test must be"),
        ({"ids": torch.zeros(33, dtype=torch.int64)}, "32 of 33 ids occur twice"),
        ({"class_names": {0: "a", 2: "b"}}, r"2 classes have no name \(first three: \[5, 9\]\)"),
        ({"class_names": {0: "a", 2: "b", 5: "a", 9: "c"}}, r"several classes are called \['a'\]"),
    ],
)
def test_a_wrong_table_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        replace(toy_source(), **change)


def test_turned_makes_new_exact_classes():
    source = toy_source()
    twice = turned(source, (2,))
    assert twice.name == "toy turned"
    assert twice.classes == (20, 22, 25, 29)
    assert twice.class_names[29] == "c9 turned 180°"
    assert torch.equal(twice.images.rot90(2, (2, 3)), source.images)
    assert torch.equal(origins(twice.ids), source.ids)
    assert set(variants(twice.ids).tolist()) == {2}
    assert torch.equal(twice.is_test, source.is_test)


def test_turned_labels_never_meet_those_of_another_part():
    source = toy_source()
    few = turned(source.select(source.labels < 5))
    assert set(few.classes).isdisjoint(source.classes)
    assert few.classes == (10, 12, 20, 22, 30, 32)
    assert few.n_labels == 40


@pytest.mark.parametrize("turns", [(), (0,), (1, 1), (4,)])
def test_turned_refuses_odd_turns(turns):
    with pytest.raises(SettingError, match="some of 1, 2 and 3, each once"):
        turned(toy_source(), turns)


def test_turned_refuses_a_second_time_and_oblong_images():
    with pytest.raises(DataError, match="was turned or permuted before"):
        turned(turned(toy_source()))
    oblong = replace(toy_source(), images=torch.zeros(33, 1, 4, 6))
    with pytest.raises(DataError, match="4 x 6 pixels cannot be turned"):
        turned(oblong)


def test_parts_are_disjoint_cover_all_and_are_stratified():
    source = digits()
    stream, pretrain = part(source, "stream"), part(source, "pretrain")
    assert (stream.name, pretrain.name) == ("digits", "digits pretrain")
    assert not torch.isin(stream.ids, pretrain.ids).any()
    assert torch.equal(torch.cat([stream.ids, pretrain.ids]).sort().values, source.ids.sort().values)
    for label in source.classes:
        for is_test in (False, True):
            n, n_pretrain = (int(((each.labels == label) & (each.is_test == is_test)).sum()) for each in (source, pretrain))
            assert n_pretrain == round(0.4 * n)
    test_ids = source.ids[source.is_test]
    for each in (stream, pretrain):
        assert torch.equal(each.is_test, torch.isin(each.ids, test_ids))


def test_part_gives_both_parts_a_row_of_every_class():
    source = toy_source({0: (2, 2), 1: (2, 2)})
    for share in (0.01, 0.99):
        assert part(source, "pretrain", share).classes == part(source, "stream", share).classes == (0, 1)


@pytest.mark.parametrize(
    ("which", "share", "message"), [("train", 0.4, "is no part"), ("stream", 0.0, "outside"), ("stream", 1.0, "outside")]
)
def test_part_refuses_wrong_settings(which, share, message):
    with pytest.raises(SettingError, match=message):
        part(toy_source(), which, share)


def test_draw_share_leaves_and_takes_one():
    strata = torch.tensor([0, 0, 1, 2, 2, 2, 2])
    drawn = draw_share(strata, 0.5, "key")
    assert [int(drawn[strata == stratum].sum()) for stratum in (0, 1, 2)] == [1, 0, 2]
    assert not draw_share(strata, 0, "key").any()


def test_rows_by_value_groups_in_order():
    found = rows_by_value(torch.tensor([7, 3, 7, 3, 3]))
    assert {value: rows.tolist() for value, rows in found.items()} == {3: [1, 3, 4], 7: [0, 2]}


def test_variants_are_those_of_example_ids():
    rows = torch.tensor([0, 5, 2**31 - 1])
    for variant in (0, 1, 255):
        ids = example_ids("x", rows, variant)
        assert variants(ids).tolist() == [variant] * 3
        assert torch.equal(with_variant(example_ids("x", rows), variant), ids)


def test_importing_the_room_loads_nothing_heavy():
    code = "import sys, remanence.streams; print([m for m in ('sklearn', 'PIL', 'pandas') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_source_is_frozen():
    with pytest.raises(AttributeError):
        toy_source().name = "other"  # type: ignore[misc]
    assert isinstance(toy_source(), Source)
