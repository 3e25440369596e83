"""Texts as streams of documents: how they are cut, drawn, asked in parts, and forgotten."""

import pytest
import torch
from reader_models import SIZES, SOURCE

from remanence.context import MelodiConfig, MelodiLM, MelodiReader
from remanence.errors import DataError, SettingError
from remanence.keys import keyed_rng
from remanence.learner import fit
from remanence.streams import documents
from remanence.testing import state_difference


def test_documents_are_cut_into_rows_that_follow_one_another():
    stream = documents(SOURCE, window=64, n_windows=4, n_test=2, n_documents=3)
    assert len(stream) == 3
    assert stream.task_id_at_test
    numbers = {event.task.name for event in stream}
    assert numbers == {"document 1", "document 2", "document 3"}
    for event in stream:
        text = SOURCE.test[int(event.task.name.split()[1])].encode()
        train, test = event.task.train, event.task.test
        assert train.ordered
        assert bytes(torch.cat([train.targets, test.targets]).flatten().tolist()) == text[: 6 * 64]
        assert torch.cat([train.inputs, test.inputs]).flatten().tolist() == [256, *text[: 6 * 64 - 1]]


def test_the_seed_draws_which_documents_and_in_which_order():
    def names(seed):
        return [event.task.name for event in documents(SOURCE, 64, 4, 2, 2, order_seed=seed)]

    assert names(0) == names(0)
    assert len({tuple(names(seed)) for seed in range(8)}) > 3
    first, second = (documents(SOURCE, 64, 4, 2, 2, order_seed=seed).fingerprint() for seed in (0, 1))
    assert first != second


def test_a_segment_is_a_part_that_is_asked_again_and_then_forgotten():
    stream = documents(SOURCE, window=64, n_windows=4, n_test=2, n_documents=2, forget=(1, 3))
    name = stream[0].task.name
    assert [(event.verb, event.task.name) for event in stream][::2] == [("learn", name), ("forget", f"{name}, windows 1 to 2")]
    whole, segment = stream[0].task, stream[2].task
    assert segment.train.ids.tolist() == whole.train.ids[1:3].tolist()
    assert segment.test.inputs.equal(whole.train.inputs[1:3])
    assert [task.name for task in stream.subjects][:2] == [f"{name}, continued", f"{name}, windows 1 to 2"]
    never = documents(SOURCE, window=64, n_windows=4, n_test=2, n_documents=2, forget=(1, 3), never=True)
    assert [event.verb for event in never] == ["learn", "learn"]
    assert never[0].task.train.ids.tolist() == whole.train.ids[[0, 3]].tolist()
    assert [task.name for task in never.subjects] == [task.name for task in stream.subjects]
    assert stream.fingerprint() != never.fingerprint()


def test_parts_are_answered_through_their_document():
    stream = documents(SOURCE, window=64, n_windows=4, n_test=2, n_documents=2, forget=(1, 3))
    with keyed_rng("byte model"):
        learner = MelodiReader(MelodiLM(MelodiConfig(**SIZES["melodi"])), snapshot_every=2)
    task = stream[0].task
    fit(learner, task)
    whole, unknown = (learner.predict(task.test.inputs, name).logits for name in (task.name, "unknown"))
    assert not whole.allclose(unknown)
    for part in task.parts:
        assert learner.predict(task.test.inputs, part.name).logits.equal(whole)
    fit(learner, stream[2].task, "forget")
    twin = MelodiReader(learner.model, snapshot_every=2)
    fit(twin, documents(SOURCE, 64, 4, 2, 2, forget=(1, 3), never=True)[0].task)
    assert state_difference(learner.state_dict(), twin.state_dict()) == ""


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"window": 63}, SettingError, "window: 63 bytes; give 64 or more"),
        ({"n_windows": 0}, SettingError, "n_windows: 0; give 1 or more"),
        ({"n_test": 0}, SettingError, "n_test: 0"),
        ({"n_documents": 0}, SettingError, "n_documents: 0"),
        ({"n_documents": 4}, DataError, "has 3 test documents of 384 bytes or more, n_documents=4"),
        ({"forget": (2, 2)}, SettingError, r"forget: \[2, 2\] is no part of rows 0 to 4"),
        ({"forget": (0, 4)}, SettingError, "is no part of rows"),
        ({"never": True}, SettingError, "give forget: too"),
    ],
)
def test_a_stream_of_documents_refuses(settings, error, message):
    with pytest.raises(error, match=message):
        documents(SOURCE, **({"window": 64, "n_windows": 4, "n_test": 2, "n_documents": 2} | settings))
