"""The loop of a cell: what it writes where, and what stops it."""

import subprocess
import sys

import pytest
import torch
from list_stream import ListStream, exact_rows

from remanence.errors import CellBusy, DataError, ErasureNotSupported, NonFiniteLoss, SettingError, StateMismatchError
from remanence.learner import Learner, Prediction, Progress, require_learnable
from remanence.ledger import Ledger
from remanence.probe import Probe, Reading
from remanence.probes import Accuracy
from remanence.runner import CHECKPOINT, LOCK, CellRunner, is_finished, require_pair
from remanence.state import all_finite, load_state
from remanence.task import Data, Task
from remanence.testing import tiny_tasks


class Means(Learner):
    """Few-shot learning in one pass, up to 64 tasks at once: class means of the pixels."""

    store = "generated"

    def __init__(self, n_parallel=1):
        self.n_parallel, self.means, self.batches = n_parallel, {}, []

    def learn(self, task):
        return self.learn_many([task])

    def learn_many(self, tasks):
        return self._learn([(task, require_learnable(self, task)) for task in tasks])

    def _learn(self, tasks):
        self.batches.append(len(tasks))
        for task, data in tasks:
            self.means[task.name] = {str(k): data.inputs[data.targets == k].flatten(1).mean(0) for k in task.classes}
        yield Progress(1, 1, None, sum(len(data) for _, data in tasks))

    def predict(self, inputs, task=None, reader=""):
        means = self.means.get(task, {})
        logits = [-(inputs.flatten(1) - mean).square().sum(1) for mean in means.values()]
        return Prediction(torch.stack([inputs.new_zeros(len(inputs)), *logits], 1)[:, 1:], torch.tensor([int(k) for k in means]).long())

    def state_dict(self):
        return {"means": {name: dict(means) for name, means in self.means.items()}}

    def load_state_dict(self, state):
        self.means = {name: {k: mean.clone() for k, mean in means.items()} for name, means in state["means"].items()}


class Peers(Learner):
    """One running mean a peer over its own shard; each is a read-out, the union is the headline."""

    store = "peers"
    readers = ("all", "peer 0", "peer 1")

    def __init__(self):
        self.sums = [{}, {}]

    def learn(self, task):
        return self._learn([(peer, require_learnable(self, part)) for peer, part in enumerate(task.parts)])

    def _learn(self, shards):
        for peer, data in shards:
            for k in data.targets.unique().tolist():
                self.sums[peer][str(k)] = data.inputs[data.targets == k].flatten(1).mean(0)
        yield Progress(1, 1, 0.5, sum(len(data) for _, data in shards))

    def predict(self, inputs, task=None, reader=""):
        peers = [int(reader[-1])] if reader.startswith("peer") else [0, 1]
        means = {k: mean for peer in peers for k, mean in self.sums[peer].items()}
        logits = [-(inputs.flatten(1) - mean).square().sum(1) for mean in means.values()]
        return Prediction(torch.stack([inputs.new_zeros(len(inputs)), *logits], 1)[:, 1:], torch.tensor([int(k) for k in means]).long())

    def state_dict(self):
        return {"sums": [dict(sums) for sums in self.sums]}

    def load_state_dict(self, state):
        self.sums = [{k: v.clone() for k, v in sums.items()} for sums in state["sums"]]


class Exploding(Learner):
    """Loss and weights go wrong at one step each."""

    store = "weights"

    def __init__(self, bad_loss=0, bad_weights=0, n_steps=9):
        self.bad_loss, self.bad_weights, self.n_steps = bad_loss, bad_weights, n_steps
        self.weight = torch.zeros(2)

    def learn(self, task):
        return self._learn(task)

    def _learn(self, task):
        while self.weight[0] < self.n_steps:
            self.weight = self.weight + 1
            step = int(self.weight[0])
            if step == self.bad_weights:
                self.weight[1] = torch.inf
            yield Progress(step, self.n_steps, torch.tensor(float("nan") if step == self.bad_loss else 1.0 / step), 1)

    def predict(self, inputs, task=None, reader=""):
        return Prediction(torch.zeros(len(inputs), 0), torch.zeros(0).long())

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state):
        self.weight = state["weight"].clone()


class Steps(Probe):
    """The position of the event; raises in one place when told to."""

    name = "steps"

    def __init__(self, at="event"):
        self.at = at

    def __call__(self, view):
        yield Reading("", "position", view.event, "1")


def runner(folder, make, *events, probes=(), seconds=0.0, **settings):
    return CellRunner(ListStream(*events, **settings), make, list(probes), folder, ("r", "s", "l"), 0, seconds)


def rows_of(ledger, **wanted):
    return [row for row in ledger if all(getattr(row, key) == value for key, value in wanted.items())]


# --- loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_a_loss_that_is_no_number_stops_the_cell(tmp_path, tasks, seconds):
    make = lambda: Exploding(bad_loss=6)  # noqa: E731
    for _ in range(2):  # a second attempt meets the same end
        with pytest.raises(NonFiniteLoss, match=r"the loss is nan at step 6 of event 0 \(learn 'task 0'\).*Lower the learning rate"):
            runner(tmp_path, make, ("learn", tasks[0]), seconds=seconds).run()
        (row,) = rows_of(Ledger(tmp_path / "ledger.jsonl"), metric="loss")
        assert (row.step, row.value, row.note) == (6, None, "the loss is nan at step 6 of event 0 (learn 'task 0')")
        assert not is_finished(tmp_path, 1) if seconds == 0 else not (tmp_path / CHECKPOINT).exists()
    if seconds == 0:
        kept = load_state(tmp_path / CHECKPOINT)
        assert all_finite(kept)
        assert (kept["tally"]["step"], kept["learner"]["weight"].tolist()) == (5, [5.0, 5.0])


def test_broken_weights_never_replace_a_good_checkpoint(tmp_path, tasks):
    make = lambda: Exploding(bad_weights=4)  # noqa: E731
    with pytest.raises(NonFiniteLoss, match="state holds NaN or infinity after the last event"):
        runner(tmp_path, make, ("learn", tasks[0])).run()
    kept = load_state(tmp_path / CHECKPOINT)
    assert (kept["tally"]["step"], kept["learner"]["weight"].tolist()) == (3, [3.0, 3.0])


def test_a_real_learner_that_diverges_is_stopped(tmp_path, tasks, tiny_vit):
    from remanence.weights import FineTuning

    make = lambda: FineTuning(tiny_vit, epochs=4, batch_size=4, lr=1e30)  # noqa: E731
    with pytest.raises(NonFiniteLoss, match=r"the loss is (nan|inf) at step \d+"):
        runner(tmp_path, make, ("learn", tasks[0]), probes=[Accuracy(at=1)]).run()
    assert all_finite(load_state(tmp_path / CHECKPOINT))


# --- streams of independent tasks, composite tasks ---------------------------------------------------------------


def episodes(n):
    return [Task(f"episode {i}", task.train, task.test) for i, task in enumerate(tiny_tasks(n, n_train=4, n_test=6))]


def per_task(ledger, probe):
    return sorted((row.subject, row.metric, row.value) for row in ledger if row.probe == probe and row.subject and row.event >= 0)


def test_tasks_learned_at_once_give_the_rows_of_tasks_learned_one_by_one(tmp_path):
    events = [("learn", task) for task in episodes(70)]
    ledgers, learners = {}, {}
    for n_parallel in (1, 64):
        cell = runner(tmp_path / str(n_parallel), lambda n=n_parallel: Means(n), *events, probes=[Accuracy()], mode="independent",
                      task_id_at_test=True)  # fmt: skip
        ledgers[n_parallel], learners[n_parallel] = cell.run(), cell.learner
    assert learners[64].batches == [64, 6]
    assert learners[1].batches == [1] * 70
    for probe in ("accuracy", "run"):
        one, many = (
            [row for row in per_task(ledgers[n], probe) if row[1] in ("accuracy", "chance", "n_train")] for n in (1, 64)
        )
        assert one == many
        assert len(one) == (140 if probe == "accuracy" else 70)
    examples = [sum(row.value for row in rows_of(ledgers[n], metric="examples")) for n in (1, 64)]
    assert examples == [280, 280]
    assert list(learners[1].means) == ["episode 69"]  # every task starts from the base state


def test_an_interrupted_stream_of_episodes_goes_on_with_the_same_groups(tmp_path):
    events = [("learn", task) for task in episodes(7)]
    make = lambda: Means(3)  # noqa: E731
    settings = {"probes": [Accuracy(at=1)], "mode": "independent", "task_id_at_test": True}
    whole = exact_rows(runner(tmp_path / "whole", make, *events, **settings).run())
    for n_events in (3, 6):
        cell = runner(tmp_path / "cut", make, *events, **settings)

        def stop(done, total, n_events=n_events):
            if done == n_events:
                raise KeyboardInterrupt

        cell.on_event = stop
        with pytest.raises(KeyboardInterrupt):
            cell.run()
    assert exact_rows(runner(tmp_path / "cut", make, *events, **settings).run()) == whole


def test_parts_of_a_composite_task_are_measured_for_every_reader(tmp_path):
    a, b = tiny_tasks(2)
    both = Task("both", Data(torch.cat([a.train.inputs, b.train.inputs]), torch.cat([a.train.targets, b.train.targets]),
                             torch.cat([a.train.ids, b.train.ids])), a.test, parts=(a, b))  # fmt: skip
    ledger = runner(tmp_path, Peers, ("learn", both), probes=[Accuracy()]).run()
    accuracy = {(row.subject, row.reader): row.value for row in rows_of(ledger, metric="accuracy", event=0)}
    assert accuracy.keys() == {(task, reader) for task in ("task 0", "task 1") for reader in Peers.readers}
    assert accuracy["task 0", "peer 1"] == accuracy["task 1", "peer 0"] == 0
    assert accuracy["task 0", "peer 0"] > 0.9
    assert accuracy["task 1", "all"] > 0.9
    assert {row.subject: row.value for row in rows_of(ledger, metric="n_train")} == {"task 0": 10, "task 1": 10}
    assert {row.task for row in ledger if row.event == 0} == {"both"}


# --- forgetting --------------------------------------------------------------------------------------------------


def test_a_refused_forget_is_a_row_and_the_run_goes_on(tmp_path, tasks):
    events = [("learn", tasks[0]), ("forget", tasks[0]), ("learn", tasks[1])]
    ledger = runner(tmp_path, Means, *events, probes=[Accuracy()], task_id_at_test=True).run()
    (row,) = rows_of(ledger, metric="erasure_supported")
    assert (row.value, row.event, row.verb) == (0.0, 1, "forget")
    assert "Means cannot take 'task 0' out again" in row.note
    assert rows_of(ledger, event=2, metric="accuracy", subject="task 1")
    assert is_finished(tmp_path, 3)


def test_a_granted_forget_is_a_row_too(tmp_path, tasks, makers):
    ledger = runner(tmp_path, makers["LoRA prototype"], ("learn", tasks[0]), ("forget", tasks[0])).run()
    (row,) = rows_of(ledger, metric="erasure_supported")
    assert (row.value, row.note) == (1.0, "")


def test_forgetting_the_unknown_is_no_refusal_but_an_error(tmp_path, tasks, makers):
    with pytest.raises(DataError, match="was never learned") as raised:
        runner(tmp_path, makers["LoRA prototype"], ("forget", tasks[0])).run()
    assert not isinstance(raised.value, ErasureNotSupported)


# --- the loop ----------------------------------------------------------------------------------------------------


def test_the_runner_tells_what_an_event_consumed(tmp_path, tasks, makers):
    ledger = runner(tmp_path, makers["fine-tuning"], ("learn", tasks[0]), probes=[Steps()]).run()
    told = {row.metric: row for row in rows_of(ledger, probe="run")}
    assert (told["steps"].value, told["examples"].value, told["n_train"].value) == (3, 12, 10)
    assert not told["seconds"].exact
    assert told["seconds"].value > 0
    assert not told["peak_memory_bytes"].exact
    assert told["loss"].value > 0
    assert [(row.event, row.step) for row in rows_of(ledger, probe="steps")] == [(-1, None), (0, None)]


def test_probes_run_when_they_are_due(tmp_path, tasks):
    for at, steps in (("event", []), ("log", [1, 2, 4, 8]), (3, [3, 6, 9]), (1, list(range(1, 10)))):
        ledger = runner(tmp_path / str(at), Exploding, ("learn", tasks[0]), probes=[Steps(at)]).run()
        assert [row.step for row in rows_of(ledger, probe="steps")] == [None, *steps, None]


def test_a_mechanism_without_a_loss_says_so(tmp_path, tasks):
    (row,) = rows_of(runner(tmp_path, Means, ("learn", tasks[0])).run(), metric="loss")
    assert (row.value, row.note) == (None, "the mechanism reports no loss")


@pytest.mark.parametrize("n_steps", [3, 40])
def test_the_loss_of_an_event_is_that_of_its_last_step(tmp_path, tasks, n_steps):
    ledger = runner(tmp_path, lambda: Exploding(n_steps=n_steps), ("learn", tasks[0]), seconds=3600).run()
    assert [row.value for row in rows_of(ledger, metric="loss")] == [pytest.approx(1 / n_steps)]


def test_a_learner_that_counts_wrongly_is_stopped(tmp_path, tasks):
    class Skipping(Exploding):
        def _learn(self, task):
            yield Progress(2, 2, None, 1)

    with pytest.raises(StateMismatchError, match="went on at step 2, its checkpoint stood at step 0"):
        runner(tmp_path, Skipping, ("learn", tasks[0])).run()


def test_an_empty_stream_and_an_empty_task(tmp_path, tasks, makers):
    assert [row.event for row in runner(tmp_path / "none", Means, probes=[Steps()]).run()] == [-1]
    empty = Task("empty", tasks[0].train.select(torch.arange(0)), tasks[0].test)
    ledger = runner(tmp_path / "empty", makers["replay"], ("learn", empty), probes=[Accuracy(at=1)]).run()
    assert {row.metric: row.value for row in rows_of(ledger, probe="run", exact=True)}["steps"] == 0


def test_a_cell_at_work_refuses_a_second_process(tmp_path, tasks):
    path = str(tmp_path / LOCK)
    code = f"from filelock import FileLock; lock = FileLock({path!r}); lock.acquire(); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CellBusy, match=r"another process runs .*Wait for it, or give another run folder"):
            runner(tmp_path, Means, ("learn", tasks[0])).run()
        assert not (tmp_path / "ledger.jsonl").exists()
        holder.kill()
    runner(tmp_path, Means, ("learn", tasks[0])).run()
    assert is_finished(tmp_path, 1)


def test_pairs_that_cannot_work_are_refused_before_any_work(tasks, makers):
    oracle = makers["LoRA oracle"]()
    with pytest.raises(SettingError, match=r"LoRA needs to be told the task's name, stream 'list' withholds it.*task_id_at_test: true"):
        require_pair(ListStream(("learn", tasks[0])), oracle)
    require_pair(ListStream(("learn", tasks[0]), task_id_at_test=True), oracle)
    with pytest.raises(DataError, match=r"8, 8.*9, 9|9, 9.*8, 8"):
        require_pair(ListStream(("learn", tiny_tasks(1, side=9)[0])), makers["prototypes"]())
    words = Task("words", tasks[0].train, tasks[0].test, answer="tokens")
    with pytest.raises(SettingError, match="asks for tokens"):
        require_pair(ListStream(("learn", words)), makers["prototypes"]())
