import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_memory import toy_documents

from remanence.context.documents import IGNORED, DocumentReader
from remanence.errors import DataError, SettingError

BOS = 99


def streams(reader, n_steps):
    """Of every row: [(input, target, begins)] of all places that are read."""
    rows = [[] for _ in range(reader.rows)]
    for step in range(n_steps):
        tokens, targets, lengths, reset = reader.batch(step)
        for row, n in enumerate(lengths.tolist()):
            rows[row] += zip(tokens[row, :n].tolist(), targets[row, :n].tolist(), reset[row, :n].tolist(), strict=True)
            assert (targets[row, n:] == IGNORED).all()
            assert (targets[row, :n] >= 0).all()
            assert not reset[row, n:].any()
            assert (tokens[row, n:] == BOS).all()
    return rows


def documents_of(stream):
    """The targets between two beginnings, complete or not."""
    found = []
    for _, target, begins in stream:
        if begins:
            found.append([])
        found[-1].append(target)
    return found


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("rows", "segment"), [(1, 1), (1, 4), (3, 4), (2, 64), (7, 5)])
def test_every_token_is_scored_once_in_a_pass(rows, segment, pack):
    documents = [torch.arange(n) + 100 * index for index, n in enumerate((1, 9, 4, 17, 5, 8), 1)]
    reader = DocumentReader(documents, rows, segment, BOS, pack=pack)
    known = sorted(document.tolist() for document in documents)
    n_steps = 60
    rows_read = [documents_of(stream) for stream in streams(reader, n_steps)]
    whole = [document for row in rows_read for document in row[:-1]]  # the last may be cut where the test ends
    assert all(document in known for document in whole)
    # one queue: at any time passes differ by what is being read, so counts differ by at most the rows
    counts = [whole.count(document) for document in known]
    assert max(counts) - min(counts) <= 1 + rows


@pytest.mark.parametrize("pack", [False, True])
def test_inputs_are_bos_and_then_the_targets(pack):
    for stream in streams(DocumentReader(toy_documents(7, 12, 3, 8), 2, 5, BOS, pack=pack), 30):
        for (_, before, _), (read, _, begins) in itertools.pairwise(stream):
            assert read == (BOS if begins else before)
        assert stream[0][0] == BOS
        assert stream[0][2]


def test_a_document_begins_with_a_segment_unless_packed():
    documents = toy_documents(7, 12, 3, 8)
    padded, packed = DocumentReader(documents, 2, 5, BOS), DocumentReader(documents, 2, 5, BOS, pack=True)
    batches = [(padded.batch(step), packed.batch(step)) for step in range(40)]
    assert not any(first.reset[:, 1:].any() for first, _ in batches)
    assert any(second.reset[:, 1:].any() for _, second in batches)
    assert all((second.lengths == 5).all() for _, second in batches)
    assert any((first.lengths < 5).any() for first, _ in batches)


def test_a_row_that_ends_its_document_takes_the_next_of_the_queue():
    """Rows are free after 3, 1, 2 segments: the queue's next documents go to rows 1, 2, and then to the first that is free."""
    sizes = {10: 3, 20: 1, 30: 2, 40: 4, 50: 4, 60: 4}
    reader = DocumentReader([torch.full((2 * n,), first) for first, n in sizes.items()], 3, 2, BOS, seed=5)
    order = [int(reader.documents[reader._taken(number)][0]) for number in range(12)]
    free, expected = [(0, row) for row in range(3)], [[], [], []]
    for first in order:
        start, row = min(free)
        free[row] = (start + sizes[first], row)
        expected[row] += [first] * sizes[first]
    n_steps = min(len(row) for row in expected)
    read = torch.stack([reader.batch(step).targets[:, 0] for step in range(n_steps)], 1)
    assert read.tolist() == [row[:n_steps] for row in expected]


def test_passes_are_permutations_that_differ():
    reader = DocumentReader(toy_documents(*[3] * 40), 2, 4, BOS)
    passes = [[reader._taken(40 * number + place) for place in range(40)] for number in range(60)]
    assert all(sorted(order) == list(range(40)) for order in passes)
    assert len({tuple(order) for order in passes}) == 60
    other = DocumentReader(toy_documents(*[3] * 40), 2, 4, BOS, seed=1)
    assert [other._taken(place) for place in range(40)] != passes[0]


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.integers(0, 9000), min_size=1, max_size=6),
    rows=st.integers(1, 4),
    segment=st.integers(1, 6),
    pack=st.booleans(),
    seed=st.integers(0, 3),
)
def test_batch_is_a_pure_function_of_the_step(steps, rows, segment, pack, seed):
    documents = toy_documents(5, 1, 11, 2)
    used = DocumentReader(documents, rows, segment, BOS, seed, pack)
    for step in steps:  # back and forth, across the places that are kept
        fresh = DocumentReader(documents, rows, segment, BOS, seed, pack)
        assert all(torch.equal(first, second) for first, second in zip(used.batch(step), fresh.batch(step), strict=True))


def test_a_far_step_keeps_no_plan_of_what_lies_before():
    reader = DocumentReader(toy_documents(5, 9, 40), 2, 8, BOS)
    reader.batch(200_000)
    assert len(reader._kept) == 200_000 // 4096 + 1
    assert sum(len(row) for row in reader._place.held) == 2


def test_documents_are_sliced_and_never_copied_or_changed():
    document = torch.arange(10, dtype=torch.uint8)
    reader = DocumentReader([document], 1, 4, BOS)
    segment = reader.batch(0)
    segment.targets.add_(1)
    assert reader.documents[0] is document
    assert document.tolist() == list(range(10))
    assert {part.dtype for part in segment} == {torch.int64, torch.bool}


def test_settings_tell_documents_apart_by_content_and_borders():
    one, two = torch.arange(6), torch.arange(3)
    fingerprints = [
        DocumentReader(documents, 1, 4, BOS).settings()["documents"]
        for documents in ([one], [one[:3], one[3:]], [one[:2], one[2:]], [two, two], [one.to(torch.uint8)])
    ]
    assert len(set(fingerprints[:4])) == 4
    assert fingerprints[0] == fingerprints[4]


def test_counts():
    documents = toy_documents(7, 12, 3)
    assert DocumentReader(documents, 2, 5, BOS).segments_per_pass == (2 + 3 + 1) / 2
    packed = DocumentReader(documents, 2, 5, BOS, pack=True)
    assert packed.segments_per_pass == 2.2
    assert packed.n_tokens == 22


def test_a_segment_moves():
    segment = DocumentReader(toy_documents(7), 1, 5, BOS).batch(0).to("meta")
    assert {part.device.type for part in segment} == {"meta"}


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "no document to read"),
        ([torch.arange(3), torch.arange(0)], "document 1 is empty"),
        ([torch.zeros(2, 3, dtype=torch.int64)], r"document 0 has shape \(2, 3\)"),
        ([torch.zeros(3)], r"dtype torch\.float32; give a vector of integer ids"),
        ([torch.zeros(3, dtype=torch.bool)], r"dtype torch\.bool"),
    ],
)
def test_broken_documents_are_refused(documents, message):
    with pytest.raises(DataError, match=message):
        DocumentReader(documents, 1, 4, BOS)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"segment": 0}, {"bos": -1}])
def test_wrong_settings_are_refused(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(SettingError, match=f"{name}={value} must be"):
        DocumentReader(toy_documents(4), **{"rows": 1, "segment": 4, "bos": BOS} | wrong)
    with pytest.raises(SettingError, match="step -1 must be 0 or more"):
        DocumentReader(toy_documents(4), 1, 4, BOS).batch(-1)
