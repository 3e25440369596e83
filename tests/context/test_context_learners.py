"""Documents as tasks: the contract, and what forgetting a segment leaves in a reader's state."""

import pytest
import torch
from reader_models import KINDS

from remanence.context import ContextTrainer, DocumentReader, MelodiConfig, MelodiLM, MelodiReader
from remanence.errors import DataError, ErasureNotSupported, SettingError
from remanence.keys import generator, keyed_rng
from remanence.learner import STOP, fit
from remanence.state import copy_state, load_state, save_state, state_bytes, states_equal
from remanence.task import Data, Task
from remanence.testing import check_learner, state_difference
from remanence.weights import DynamicEvaluation, LanguageFineTuning

SIZE = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "window": 4}
T = 4


def model(kind="melodi"):
    made, configuration, settings = KINDS[kind]
    with keyed_rng("model of a reader", kind):
        return made(configuration(**SIZE, **settings)).eval()


def document(name, first_id=0, n=12, n_test=3, length=T):
    ids = torch.randint(16, (n + n_test, length + 1), generator=generator("document", name))
    table = Data(ids[:, :-1].clone(), ids[:, 1:].clone(), torch.arange(first_id, first_id + n + n_test), ordered=True)
    return Task(name, table.select(torch.arange(n)), table.select(torch.arange(n, n + n_test)), answer="tokens")


FIRST, SECOND = document("first", n=7), document("second", 100, n=5)


def reader(kind="melodi", **settings):
    return MelodiReader(model(kind), **({"snapshot_every": 3} | settings))


def read(*tasks, **settings):
    learner = reader(**settings)
    for task in tasks:
        fit(learner, task)
    return learner


def loss(learner, task, data=None):
    asked = task.test if data is None else data
    return -float(learner.score(asked.inputs, asked.targets, task.name).sum()) / asked.targets.numel()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "melodi"])  # which tests/contract has
def test_a_reader_keeps_the_contract_and_forgets_exactly(kind):
    kept = model(kind)
    check_learner(lambda seed: MelodiReader(kept, snapshot_every=2, seed=seed), [FIRST, SECOND], exact_forget=True)


# --- replay ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "end"), [(0, 1), (2, 5), (3, 6), (5, 12), (11, 12)])
def test_replay_leaves_bit_for_bit_what_never_reading_the_segment_leaves(kind, first, end):
    task, rows = document("a"), torch.arange(12)
    is_segment = (rows >= first) & (rows < end)
    learner = read(task, SECOND, kind=kind)
    fit(learner, task.select(rows[is_segment]), "forget")
    never = read(task.select(rows[~is_segment]), SECOND, kind=kind)
    assert state_difference(learner.state_dict(), never.state_dict()) == ""
    assert states_equal(learner.predict(task.test.inputs, "a").logits, never.predict(task.test.inputs, "a").logits)


def test_rows_that_do_not_fall_on_windows_are_forgotten_exactly_too():
    task, rows = document("odd", length=7), torch.arange(12)
    gone = torch.tensor([1, 4, 5])
    learner = read(task)
    fit(learner, task.select(gone), "forget")
    never = read(task.select(rows[~torch.isin(rows, gone)]))
    assert state_difference(learner.state_dict(), never.state_dict()) == ""
    fit(learner, SECOND), fit(never, SECOND)
    fit(learner, task.select(torch.tensor([0, 2])), "forget")
    assert state_difference(learner.state_dict(), read(task.select(torch.tensor([3, 6, 7, 8, 9, 10, 11])), SECOND).state_dict()) == ""


def test_only_what_follows_the_snapshot_is_read_again():
    task = document("a")
    learner = read(task)
    last = fit(learner, task.select(torch.tensor([7])), "forget")
    assert (last.step, last.steps) == (5, 5)  # rows 6, 8, 9, 10, 11
    assert fit(learner, task.select(torch.tensor([11])), "forget").step == 1  # row 10; the snapshot stands before it


def test_a_replay_goes_on_after_a_crash_and_a_stop_reads_the_rest(tmp_path):
    task, rows = document("a"), torch.arange(12)
    segment, never = task.select(rows[1:3]), read(task.select(rows[[0, *range(3, 12)]]))
    stopped = read(task)
    steps = stopped.forget(segment)
    next(steps), next(steps)
    save_state(tmp_path / "state", stopped.state_dict())
    with pytest.raises(StopIteration):
        steps.send(STOP)
    assert state_difference(stopped.state_dict(), never.state_dict()) == ""
    resumed = reader()
    resumed.load_state_dict(load_state(tmp_path / "state"))
    assert [progress.step for progress in resumed.forget(segment)] == list(range(3, 11))
    assert state_difference(resumed.state_dict(), never.state_dict()) == ""


def test_a_replay_that_was_left_open_is_ended_by_the_next_verb():
    task, rows = document("a"), torch.arange(12)
    learner = read(task)
    steps = learner.forget(task.select(rows[1:3]))
    next(steps)
    steps.close()
    fit(learner, task.select(rows[6:7]), "forget")  # another segment of the same document
    assert state_difference(learner.state_dict(), read(task.select(rows[[0, 3, 4, 5, *range(7, 12)]])).state_dict()) == ""
    steps = learner.forget(task.select(rows[3:4]))
    next(steps)
    steps.close()
    fit(learner, SECOND)
    never = read(task.select(rows[[0, 4, 5, *range(7, 12)]]), SECOND).state_dict()["documents"]
    assert state_difference(learner.state_dict()["documents"], never) == ""


def test_a_row_that_was_read_twice_or_in_two_documents_goes_everywhere():
    task, again = document("a"), Task("again", document("a").train, document("a").test, answer="tokens")
    learner = read(task, task, again)
    fit(learner, task.select(torch.arange(12) != 0), "forget")
    rows = torch.tensor([0])
    assert state_difference(learner.state_dict(), read(task.select(rows), task.select(rows), again.select(rows)).state_dict()) == ""


# --- slots -------------------------------------------------------------------------------------------------------


def test_slots_of_the_segment_are_gone_and_all_others_stay_as_they_are():
    task = document("a", n=6)
    learner = read(task, forget_mode="slots")
    before = learner.state_dict()["documents"]["a"]["state"]
    steps = list(learner.forget(task.select(torch.tensor([2, 3]))))
    after = learner.state_dict()["documents"]["a"]["state"]
    assert steps == []
    assert before["long_window"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert after["long_window"].tolist() == [[0, 1, -1, -1, 4, 5]]
    assert not after["long"][:, :, 2:4].any()
    assert states_equal(after["long"][:, :, [0, 1, 4, 5]], before["long"][:, :, [0, 1, 4, 5]])
    assert states_equal(after["short"], before["short"])
    assert learner.state_dict()["documents"]["a"]["ids"].tolist() == [0, 1, 4, 5]


def test_a_window_that_holds_any_token_of_the_segment_goes_and_so_does_an_open_one():
    task = document("odd", n=3, length=6)  # rows stand at 0..5, 6..11, 12..17: windows 0 to 3 and half of window 4
    learner = read(task, forget_mode="slots")
    fit(learner, task.select(torch.tensor([1])), "forget")
    state = learner.state_dict()["documents"]["odd"]["state"]
    assert state["long_window"][0, :4].tolist() == [0, -1, -1, 3]
    assert int(state["n_tokens"]) == 18
    fit(learner, task.select(torch.tensor([2])), "forget")
    state = learner.state_dict()["documents"]["odd"]["state"]
    assert state["long_window"][0, :4].tolist() == [0, -1, -1, -1]
    assert int(state["n_tokens"]) == 16
    assert not state["tail"].any()
    fit(learner, document("more", 50, n=2))
    fit(learner, Task("odd", document("more", 50).train.select(torch.tensor([0])), task.test, answer="tokens"))
    assert int(learner.state_dict()["documents"]["odd"]["state"]["n_tokens"]) == 20


def test_a_reader_with_snapshots_can_forget_slots_and_replay_later_without_them():
    task, rows = document("a", n=8), torch.arange(8)
    learner = read(task)
    assert fit(learner, task.select(rows[1:2]), "forget") is not None
    learner = read(task)
    assert [*learner.forget(task.select(rows[1:2]), mode="slots")] == []
    held = learner.state_dict()["documents"]["a"]
    assert [entry["row"] for entry in held["snapshots"]] == [2, 5]
    assert all(1 not in entry["state"]["long_window"] for entry in held["snapshots"])
    fit(learner, task.select(rows[0:1]), "forget")  # goes back to the beginning: now the rest was never read either
    never = read(task.select(rows[2:]))
    assert state_difference(learner.state_dict(), never.state_dict()) == ""


WIDE = 8


def alphabets(key, order, n_more=0):
    """Rows of eight tokens, each drawn from one of the document's two alphabets of three tokens, and more rows of the first."""
    source = generator("alphabets", key)
    letters = torch.randperm(16, generator=source)[:6].view(2, 3)
    rows = [letters["AB".index(name)][torch.randint(3, (WIDE,), generator=source)] for name in order + "A" * n_more]
    return torch.cat(rows)


def two_alphabets(key, n_test=4):
    ids = alphabets(key, "AABB", n_test)
    inputs = torch.cat([torch.tensor([16]), ids[:-1]]).view(-1, WIDE)
    table, rows = Data(inputs, ids.clone().view(-1, WIDE), torch.arange(4 + n_test), ordered=True), torch.arange(4 + n_test)
    return Task("two", table.select(rows[:4]), table.select(rows[4:]), answer="tokens")


@pytest.fixture(scope="module")
def trained():
    """A model that has learned to keep in mind which tokens a document is made of."""
    small = {"vocab_size": 17, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "window": WIDE}
    with keyed_rng("alphabets"):
        found = MelodiLM(MelodiConfig(**small, short=0, summary=2, long_per_window=2, long_windows=8, long_layers=(1,)))
    texts = [alphabets(key, "AABBAB") for key in range(400)]
    for _ in ContextTrainer(found, DocumentReader(texts, rows=16, segment=48, bos=16), steps=200, lr=5e-3).run():
        pass
    return found


def test_slots_forget_in_part_what_replay_forgets_wholly(trained):
    means = dict.fromkeys(("read", "slots", "replay", "never"), 0.0)
    for key in range(1000, 1008):
        task = two_alphabets(key)
        segment, rest = task.select(torch.tensor([0, 1])), task.select(torch.tensor([2, 3]))
        for mode in ("slots", "replay", "never"):
            learner = MelodiReader(trained)
            fit(learner, rest if mode == "never" else task)
            if mode != "never":
                means["read"] += loss(learner, task) / 16
                list(learner.forget(segment, mode=mode))
            means[mode] += loss(learner, task) / 8
    assert means["replay"] == means["never"]
    assert means["read"] + 0.03 < means["slots"] < means["never"] - 0.005, means


# --- reading -----------------------------------------------------------------------------------------------------


def test_a_document_is_answered_through_what_was_read_of_it_and_an_unknown_one_through_nothing():
    kept = model()
    learner = MelodiReader(kept)
    for task in (FIRST, SECOND):
        fit(learner, task)
    state = kept(FIRST.train.inputs.view(1, -1))[1]
    for row in FIRST.test.inputs:
        torch.testing.assert_close(learner.predict(row[None], "first").logits, kept(row[None], state)[0])
    torch.testing.assert_close(learner.predict(FIRST.test.inputs, "nobody").logits, kept(FIRST.test.inputs)[0])
    with pytest.raises(SettingError, match="holds a state for each of 2 documents and must be told"):
        learner.predict(FIRST.test.inputs)


@pytest.mark.parametrize("n", [0, 1, 16, 37])
def test_scores_are_the_log_probabilities_of_predict_summed_over_counted_targets(n):
    task = document("long", n=2, n_test=40)
    learner = read(task)
    inputs, targets = task.test.inputs[:n], task.test.targets[:n].clone()
    targets[:, 0] = -100
    log_p = learner.predict(inputs, "long").logits.log_softmax(-1)
    wanted = log_p.gather(-1, targets.clamp_min(0)[..., None])[..., 1:, 0].sum(-1)
    torch.testing.assert_close(learner.score(inputs, targets, "long"), wanted)
    assert learner.score(torch.zeros(1, T, dtype=torch.int64), torch.full((1, T), 99), "long").item() == -torch.inf


def test_the_loss_of_a_step_is_that_of_its_window_before_it_was_read():
    task, kept = document("a"), model()
    losses = [float(progress.loss) for progress in MelodiReader(kept).learn(task)]
    text = torch.cat([task.train.inputs.flatten(), task.train.targets[-1, -1:]])
    inputs, targets = task.train.inputs.view(1, -1), task.train.targets.view(1, -1)
    assert len(text) == 49
    logits = kept(inputs)[0].log_softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(torch.tensor(losses), -logits.view(12, T).mean(1), atol=1e-5, rtol=1e-5)
    task.train.targets[:] = -100
    assert next(MelodiReader(kept).learn(task)).loss is None


def test_the_footprint_shows_what_replay_costs():
    task = document("a")
    slots, replay = read(task, SECOND, forget_mode="slots").footprint(), read(task, SECOND).footprint()
    assert set(slots.task_bytes) == set(replay.task_bytes) == {"a", "second"}
    held = read(task).state_dict()["documents"]["a"]
    snapshots = state_bytes(held["snapshots"])
    assert [entry["row"] for entry in held["snapshots"]] == [3, 6, 9]
    assert replay.task_bytes["a"] - slots.task_bytes["a"] == snapshots + 12 * T * 4
    assert snapshots == 3 * state_bytes(held["state"])
    assert slots.shared_bytes == replay.shared_bytes == replay.trainable_parameters == 0


def test_what_cannot_be_done_is_refused_with_the_reason():
    task = document("a")
    learner = read(task)
    state = copy_state(learner.state_dict())
    with pytest.raises(ErasureNotSupported, match=r"has read none of the 5 rows of 'second', .* Read: 'a' \(12 rows\)"):
        learner.forget(SECOND)
    with pytest.raises(ErasureNotSupported, match="Read: nothing"):
        reader().forget(SECOND)
    segment = task.select(torch.tensor([2]))
    fit(learner, segment, "forget")
    with pytest.raises(ErasureNotSupported, match="or forgot them before"):
        learner.forget(segment)
    learner.load_state_dict(state)
    assert learner.forget(segment) is not None
    with pytest.raises(ErasureNotSupported, match="keeps neither text nor snapshots"):
        read(task, forget_mode="slots").forget(segment, mode="replay")
    with pytest.raises(SettingError, match="forget_mode 'other' is unknown"):
        learner.forget(segment, mode="other")
    with pytest.raises(SettingError, match="a TransformerXL has none; choose 'replay'"):
        reader("transformer-xl", forget_mode="slots")
    with pytest.raises(SettingError, match="snapshot_every=0 must be 1 or more"):
        reader(snapshot_every=0)
    with pytest.raises(DataError, match="the model knows 0 to 16"):
        learner.learn(Task("large", Data(task.train.inputs + 9, task.train.targets, task.train.ids), task.test, answer="tokens"))
    with pytest.raises(DataError, match=r"takes windows of ids, inputs and targets \(N, T\)"):
        learner.learn(Task("flat", Data(task.train.inputs[:, 0], task.train.targets[:, 0], task.train.ids), task.test, answer="tokens"))


# --- dynamic evaluation ------------------------------------------------------------------------------------------


def test_dynamic_evaluation_is_one_step_of_gradient_descent_for_each_window():
    kept, task = model("windowed"), document("a", n=3)
    learner = DynamicEvaluation(kept, lr=0.5)
    twin = model("windowed")
    for step, progress in enumerate(learner.learn(task)):
        found, _ = twin.loss(task.train.inputs[step : step + 1], task.train.targets[step : step + 1])
        assert float(progress.loss) == pytest.approx(float(found.detach()), abs=1e-6)
        gradients = torch.autograd.grad(found, list(twin.parameters()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
                if gradient is not None:
                    parameter -= 0.5 * gradient
    for own, wanted in zip(learner.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, wanted)
    assert states_equal(dict(kept.state_dict()), dict(model("windowed").state_dict()))  # the one that was handed in


def test_dynamic_evaluation_refuses_to_forget_and_a_rate_of_zero():
    learner = DynamicEvaluation(model("windowed"))
    fit(learner, FIRST)
    with pytest.raises(ErasureNotSupported, match="later windows were learned on top of it"):
        learner.forget(FIRST)
    with pytest.raises(SettingError, match="lr=0 must be above 0"):
        DynamicEvaluation(model("windowed"), lr=0)


def test_other_language_learners_take_models_that_return_a_state():
    learner = LanguageFineTuning(model("windowed"), batch_size=2, lr=1e-2)
    fit(learner, FIRST), fit(learner, FIRST, "forget")
    assert learner.predict(FIRST.test.inputs).logits.shape == (3, T, 17)
