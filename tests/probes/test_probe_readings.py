"""Accuracy, Bystanders, Relearning, Membership and Cost read by hand from a learner that counts."""

import pytest
import torch
import toy_probe_world as toy
from toy_probe_world import BYSTANDER, FIRST, SECOND, STRANGER, Counting, ToyStream

from remanence.errors import SettingError
from remanence.learner import Prediction, Progress, fit
from remanence.probe import View
from remanence.probes import Accuracy, Bystanders, Cost, Membership, Relearning
from remanence.probes.cost import count_flops
from remanence.probes.erasure import separability
from remanence.state import copy_state, states_equal
from remanence.task import Data, Task

LEARNS = [("learn", FIRST), ("learn", SECOND)]


def view(learner, stream, event=-1, make=Counting):
    events = [stream[event]] if event >= 0 else []
    return View(learner, stream, event, events[0].verb if events else "", tuple(item.task for item in events), make)


def read(probe, seen):
    before = copy_state(seen.learner.state_dict())
    readings = {(r.subject, r.metric, r.reader, r.at): r for r in probe(seen)}
    assert states_equal(before, seen.learner.state_dict()), "the probe changed the learner it read"
    return readings


def taught(*tasks):
    learner = Counting()
    for task in tasks:
        fit(learner, task)
    return learner


def test_accuracy_and_chance_by_hand():
    readings = read(Accuracy(), view(taught(FIRST), ToyStream(*LEARNS), 0))
    value = {key: reading.value for key, reading in readings.items()}
    assert value["first", "accuracy", "", None] == 1.0
    assert value["first", "chance", "", None] == 0.5  # both targets among two classes
    assert value["second", "accuracy", "", None] == 0.0  # its classes are unknown
    assert value["second", "chance", "", None] == 0.0
    assert value["", "accuracy_seen", "", None] == 1.0  # the four examples of `first`
    assert value["first", "accuracy", "upside down", None] == 0.0


def test_chance_counts_only_targets_among_the_classes():
    mixed = Task("mixed", FIRST.train, toy.table([0, 1, 2, 2], 900))
    readings = read(Accuracy(), view(taught(FIRST), ToyStream(("learn", mixed)), 0))
    assert readings["mixed", "accuracy", "", None].value == 0.5
    assert readings["mixed", "chance", "", None].value == 0.25  # half of the targets are choosable, of two classes
    assert readings["", "accuracy_seen", "", None].value == 1.0  # the two unknown ones are left out


def test_before_the_first_event_nothing_is_known():
    readings = read(Accuracy(), view(Counting(), ToyStream(*LEARNS)))
    assert readings["first", "accuracy", "", None].value == 0.0
    assert readings["first", "chance", "", None].note == "the learner knows no classes yet"
    assert readings["", "accuracy_seen", "", None].value is None


def test_an_empty_test_set_gives_none_and_a_note():
    empty = Task("empty", FIRST.train, toy.table([], 900))
    readings = read(Accuracy(), view(taught(FIRST), ToyStream(("learn", empty)), 0))
    assert readings["empty", "accuracy", "", None].value is None
    assert "empty" in readings["empty", "accuracy", "", None].note


def test_independent_tasks_are_read_together():
    class Parallel(Counting):
        asked = ()

        def predict_many(self, inputs, tasks, reader=""):
            self.asked = (len(inputs), tuple(tasks))
            return super().predict_many(inputs, tasks)

    stream = ToyStream(*LEARNS, mode="independent")
    learner = Parallel()
    fit(learner, FIRST)
    readings = read(Accuracy(), View(learner, stream, 0, "learn", (FIRST, SECOND), Parallel))
    assert learner.asked == (2, (None, None))
    assert readings["first", "accuracy", "", None].value == 1.0
    one = read(Accuracy(), View(learner, stream, 0, "learn", (SECOND,), Parallel))
    assert {key[0] for key in one} == {"second", ""}


class Speaking(Counting):
    """Says token 1 everywhere, with probability 3/4."""

    answers = ("tokens",)
    readers = ("",)

    def predict(self, inputs, task=None, reader=""):
        return Prediction(torch.tensor([0.25, 0.75]).log().expand(*inputs.shape, 2), torch.tensor([0, 1]))

    def score(self, inputs, targets, task=None, reader=""):
        return self.predict(inputs).logits.gather(-1, targets[..., None]).squeeze(-1)


def test_tokens_have_accuracy_and_nats_per_token():
    targets = torch.tensor([[1, 1, 0], [1, 1, 1]])
    text = Task("text", None, Data(torch.zeros(2, 3, dtype=torch.int64), targets, torch.arange(2)), answer="tokens")
    readings = read(Accuracy(), view(Speaking(), ToyStream(("learn", text)), 0, Speaking))
    assert readings["text", "accuracy", "", None].value == pytest.approx(5 / 6)
    # five tokens at ln(4/3), one at ln 4
    assert readings["text", "loss", "", None].value == pytest.approx((5 * 0.2876820724 + 1.3862943611) / 6)


class Recording(Speaking):
    """Notes how many rows it is asked at once; gives nothing to targets below 0."""

    n_parallel = 2

    def __init__(self, seed=0):
        super().__init__(seed)
        self.asked = []

    def predict(self, inputs, task=None, reader=""):
        self.asked.append(len(inputs))
        return super().predict(inputs)

    def score(self, inputs, targets, task=None, reader=""):
        found = super().predict(inputs).logits.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        return found.masked_fill(targets < 0, 0.0).sum(-1)


def padded(name, n):
    targets = torch.tensor([1, 0, -100]).repeat(n, 1)
    return Task(name, None, Data(torch.zeros(n, 3, dtype=torch.int64), targets, torch.arange(n)), answer="tokens")


def test_text_is_asked_in_chunks_and_padding_is_not_counted():
    learner, long = Recording(), padded("long", 40)
    readings = read(Accuracy(), view(learner, ToyStream(("learn", long)), 0, Recording))
    assert max(learner.asked) == 16
    assert sum(learner.asked) == 40
    assert readings["long", "accuracy", "", None].value == 0.5
    assert readings["", "accuracy_seen", "", None].value == 0.5
    assert readings["long", "chance", "", None].value == 0.5
    assert readings["long", "loss", "", None].value == pytest.approx((0.2876820724 + 1.3862943611) / 2)


def test_texts_of_independent_tasks_are_asked_in_chunks_too():
    long, short = padded("long", 40), padded("short", 3)
    learner, stream = Recording(), ToyStream(("learn", long), ("learn", short), mode="independent")
    readings = read(Accuracy(), View(learner, stream, 0, "learn", (long, short), Recording))
    assert learner.asked == [16, 3, 16, 0, 8, 0]
    assert {readings[name, "accuracy", "", None].value for name in ("long", "short")} == {0.5}


def test_bystanders_in_text_are_counted_alike():
    learner = Recording()
    readings = read(Bystanders(), view(learner, ToyStream(("learn", padded("a", 1)), bystanders=(padded("old", 20),)), 0, Recording))
    assert readings["old", "accuracy", "", None].value == 0.5
    assert learner.asked == [16, 4]


def test_text_without_a_counted_target_has_no_accuracy():
    empty = Task("pad", None, Data(torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), -100), torch.arange(2)), answer="tokens")
    readings = read(Accuracy(), view(Recording(), ToyStream(("learn", empty)), 0, Recording))
    for metric in ("accuracy", "chance", "loss"):
        assert readings["pad", metric, "", None].note == "no target of the test set is counted"


@pytest.mark.parametrize("at", [0, -1, "often"])
def test_a_wrong_grid_is_refused(at):
    with pytest.raises(SettingError, match="probe grid"):
        Accuracy(at=at)


def test_grid_and_verbs_come_from_the_settings():
    assert [step for step in range(1, 10) if Accuracy(at="log").due(step)] == [1, 2, 4, 8]
    assert Accuracy(at=3, verbs=("learn",)).verbs == ("", "learn")


def test_bystanders_by_hand_and_none_without_an_answer():
    stream = ToyStream(*LEARNS, bystanders=(BYSTANDER, STRANGER))
    readings = read(Bystanders(), view(taught(FIRST), stream, 0))
    assert readings["old", "accuracy", "", None].value == 1.0  # targets 0, 0, 1, 1
    assert readings["old", "accuracy", "upside down", None].value == 0.0
    stranger = readings["stranger", "accuracy", "", None]
    assert stranger.value is None
    assert "names none of its classes" in stranger.note


def test_relearning_reads_a_log_grid_against_a_fresh_learner():
    stream = ToyStream(*LEARNS, ("forget", FIRST))
    learner = taught(SECOND)  # as if `first` had been taken out cleanly
    readings = read(Relearning(), view(learner, stream, 2))
    curves = {metric: {key[3]: r.value for key, r in readings.items() if key[1] == metric} for _, metric, _, _ in readings}
    # eight train examples, two a step: steps 1, 2 and the end (step 4), plus 0
    assert list(curves["relearn_accuracy"]) == [0, 2, 4, 8]
    assert curves["relearn_accuracy"][0] == 0.0
    assert curves["relearn_accuracy"][8] == 1.0
    assert curves["fresh_accuracy"][0] == 0.0
    assert list(curves["fresh_accuracy"]) == [0, 2, 4, 8]


def test_relearning_of_something_still_known_starts_at_its_accuracy():
    readings = read(Relearning(), view(taught(FIRST, SECOND), ToyStream(*LEARNS, ("forget", FIRST)), 2))
    assert readings["first", "relearn_accuracy", "", 0].value == 1.0
    assert readings["first", "fresh_accuracy", "", 0].value == 0.0


def test_separability_by_hand():
    # pairs (member, other): 3>2, 3>-inf, 1<2, 1>-inf, tie 2=2 (half), 2>-inf
    assert separability(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, -torch.inf])) == pytest.approx(4.5 / 6)
    assert separability(torch.tensor([0.0]), torch.tensor([0.0, 0.0])) == 0.5


def test_membership_is_read_for_the_event_and_for_what_is_forgotten_next():
    stream = ToyStream(*LEARNS, ("forget", FIRST))
    assert {key[0] for key in read(Membership(), view(taught(FIRST), stream, 0))} == {"first"}
    last = read(Membership(), view(taught(FIRST, SECOND), stream, 1))
    assert {key[0]: r.value for key, r in last.items()} == {"second": 0.5, "first": 0.5}  # train and test images are alike
    (gone,) = read(Membership(), view(taught(SECOND), stream, 2)).values()
    assert (gone.subject, gone.value) == ("first", 0.5)
    assert "does not name these classes" in gone.note


def test_membership_tells_a_learner_that_knows_its_members():
    class Leaky(Counting):
        def score(self, inputs, targets, task=None, reader=""):
            return torch.full((len(inputs),), float(len(inputs) == 8))  # the train set is larger

    reading = read(Membership(), view(Leaky(), ToyStream(*LEARNS), 0, Leaky))["first", "membership_auc", "", None]
    assert reading.value == 1.0


def test_membership_of_an_empty_train_set_is_none():
    empty = Task("empty", toy.table([], 10), FIRST.test)
    reading = read(Membership(), view(Counting(), ToyStream(("learn", empty)), 0))["empty", "membership_auc", "", None]
    assert reading.value is None


def test_cost_by_hand():
    readings = read(Cost(), view(taught(FIRST), ToyStream(*LEARNS), 0))
    value = {(key[0], key[1]): reading.value for key, reading in readings.items()}
    assert value["", "total_bytes"] == 32  # two classes, four float32 each
    assert value["", "shared_bytes"] == 0
    assert value["", "trainable_parameters"] == 8
    assert value["0", "task_bytes"] == 16
    assert value["", "flops_predict"] == 16  # 4 pixels x 2 classes x 2
    assert value["", "flops_learn"] == 96 + 4 * 128 + 8  # set-up once, four steps, consolidation


def test_cost_of_learning_is_none_where_the_number_of_steps_is_unknown():
    class Endless(Counting):
        def _learn(self, task, data):
            yield Progress(1, None, 0.0, 1)

    reading = read(Cost(), view(Endless(), ToyStream(*LEARNS), 0, Endless))["", "flops_learn", "", None]
    assert reading.value is None
    assert "how many steps" in reading.note


def test_attention_on_the_cpu_is_not_free():
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    forward = 2 * 2 * (2 * 3 * 5 * 5 * 8)  # QK and AV: two products of 5x8x5 for 2 x 3 heads

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    assert count_flops(attend) == forward
    # backward: five products, the scores being computed once more
    assert count_flops(lambda: attend().sum().backward()) == forward + forward // 2 * 5
