"""Training through the recurrence, the loss of all prefixes, and measures of a sequence."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_continual import model_of, support

from remanence.errors import DataError, SettingError
from remanence.generated import Episode, SequenceSampler
from remanence.generated.continual import ContinualHyperTransformer, accuracy_table, continual_loss, continual_targets
from remanence.generated.continual_measures import forgetting_beyond_oracle, oracle_drop, prototype_drift, sequence_measures
from remanence.keys import generator
from remanence.streams import digits


def episode(step: int, n: int = 2, shots: int = 1, queries: int = 3, batch: int = 2, **more: object) -> Episode:
    x, y = support(step, n, shots, batch)
    query_x = torch.rand(batch, n * queries, 1, 8, 8, generator=generator("query", step))
    return Episode(x, y, query_x, torch.arange(n).repeat_interleave(queries).expand(batch, -1), **more)


def _episode(seed: int, ids: list[list[int]] | None, queries: int = 1) -> Episode:
    return episode(seed, queries=queries) if ids is None else episode(seed, queries=queries, class_ids=torch.tensor(ids))


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["class", "task", "minibatch"])
@pytest.mark.parametrize("head", ["prototype", "generated"])
def test_unrolling_is_stepping(scenario, head):
    model = model_of(scenario=scenario, head=head)
    sequence = [episode(step) for step in range(3)]
    answers, state = model.unroll(sequence), model.init_state(2)
    for t, task in enumerate(sequence):
        state = model.step(state, task.support_x, task.support_y)
        for earlier, got in enumerate(answers[t].split(6, 1)):
            asked = earlier if scenario == "task" and head == "prototype" else None
            assert torch.allclose(got, model.predict(state, sequence[earlier].query_x, asked), atol=1e-5)


def test_tasks_of_a_sequence_may_ask_different_numbers_of_queries():
    model = model_of(scenario="task")
    answers = model.unroll([episode(0, queries=2), episode(1, queries=5)])
    own = answers[1].isneginf()
    assert own[:, :4].all(1).tolist() == [[False, False, True, True]] * 2
    assert own[:, 4:].all(1).tolist() == [[True, True, False, False]] * 2


def _gradient_of_first_support(model: ContinualHyperTransformer) -> torch.Tensor:
    """Of the loss on the last task's own queries among its own classes: the first support reaches it through the weights alone."""
    first = episode(0)
    images = first.support_x.requires_grad_()
    logits = model.unroll([first, episode(1), episode(2)])[-1][:, -6:, -2:]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), episode(2).query_y.flatten()).backward()
    return torch.zeros_like(images) if images.grad is None else images.grad


def test_the_last_loss_reaches_the_first_support_through_the_weights():
    assert (_gradient_of_first_support(model_of(scenario="task")).flatten(2).norm(dim=2) > 0).all()
    assert not _gradient_of_first_support(model_of(scenario="task", carry=False)).any()


def test_a_batch_of_sequences_is_the_sequences_one_by_one():
    model = model_of()
    sequence = [episode(step, batch=3) for step in range(3)]
    together = model.unroll(sequence)
    for row in range(3):
        alone = model.unroll([task.select(torch.tensor([row])) for task in sequence])
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.allclose(one[0], all_of_them[row], atol=1e-5)


def test_a_class_that_comes_again_keeps_its_column():
    model, ids = model_of(), ([[1, 2], [1, 2]], [[3, 4], [2, 5]], [[1, 3], [5, 2]])
    sequence = [episode(step, class_ids=torch.tensor(numbers)) for step, numbers in enumerate(ids)]
    states = model.states(sequence)
    assert states[1].counts.tolist() == [[1, 1, 1, 1], [1, 2, 0, 1]]
    assert states[2].counts.tolist() == [[2, 1, 2, 1], [1, 3, 0, 2]]
    assert states[2].task_of_class.tolist() == [0, 0, 1, 1]


def test_unrolling_needs_tasks_that_fit():
    model = model_of()
    with pytest.raises(DataError, match="the sequence holds no task; give at least one episode"):
        model.unroll([])
    with pytest.raises(DataError, match="the state holds 2 sequences, the images are of 3"):
        model.unroll([episode(0), episode(1, batch=3)])


# --- loss --------------------------------------------------------------------------------------------------------


def _plain(logits: list[torch.Tensor], targets: list[torch.Tensor], n_queries: int, weighting: str) -> float:
    """The same by a loop over prefixes, tasks, sequences and queries, in float64."""
    table = {}
    for t, (answer, target) in enumerate(zip(logits, targets, strict=True)):
        for i in range(t + 1):
            each = [
                answer[b, q].double().logsumexp(0).item() - answer[b, q, target[b, q]].item()
                for b in range(len(answer)) for q in range(i * n_queries, (i + 1) * n_queries)
            ]  # fmt: skip
            table[t, i] = sum(each) / len(each)
    n = len(logits)
    whole = [sum(table[t, i] for i in range(t + 1)) / (t + 1) for t in range(n)]
    if weighting == "all":
        return sum(whole) / n
    return whole[-1] if weighting == "last" else 0.5 * (sum(table[t, t] for t in range(n)) / n + whole[-1])


@pytest.mark.parametrize("weighting", ["all", "last", "current+last"])
@given(n_tasks=st.integers(1, 4), n_queries=st.integers(1, 3), seed=st.integers(0, 9))
@settings(max_examples=8, deadline=None)
def test_the_loss_is_the_plain_loops(weighting, n_tasks, n_queries, seed):
    draw = generator("loss", seed)
    logits = [torch.randn(2, (t + 1) * n_queries, 2 * (t + 1), generator=draw) for t in range(n_tasks)]
    targets = [torch.randint(2 * (t + 1), (2, (t + 1) * n_queries), generator=draw) for t in range(n_tasks)]
    loss, table = continual_loss(logits, targets, weighting)
    assert loss.item() == pytest.approx(_plain(logits, targets, n_queries, weighting), rel=1e-5)
    assert table.isnan().equal(torch.ones(n_tasks, n_tasks).triu(1).bool())
    assert table[-1].mean().item() == pytest.approx(_plain(logits, targets, n_queries, "last"), rel=1e-5)


def test_the_loss_says_what_it_cannot_take():
    logits, targets = [torch.zeros(1, 2, 3)], [torch.zeros(1, 2, dtype=torch.int64)]
    with pytest.raises(SettingError, match=r"weighting='first' is unknown; give 'all', 'last' or 'current\+last'"):
        continual_loss(logits, targets, "first")
    with pytest.raises(DataError, match="1 tensors of logits and 2 of targets; give one of each for every task"):
        continual_loss(logits, targets * 2)
    with pytest.raises(DataError, match="0 tensors of logits and 0 of targets"):
        continual_loss([], [])
    with pytest.raises(DataError, match=r"after task 1 logits are \(1, 3, 3\) and targets \(1, 3\); .* the same number of queries"):
        continual_loss([logits[0], torch.zeros(1, 3, 3)], [targets[0], torch.zeros(1, 3, dtype=torch.int64)])


def test_targets_stand_where_unroll_put_the_classes():
    first, second = _episode(0, None), _episode(1, None)
    assert [found.tolist() for found in continual_targets([first, second])] == [[[0, 1]] * 2, [[0, 1, 2, 3]] * 2]
    assert continual_targets([first, second], shared_classes=True)[1].tolist() == [[0, 1, 0, 1]] * 2


def test_targets_of_a_class_that_comes_again_are_its_column():
    ids = ([[1, 2], [1, 2]], [[3, 4], [2, 5]], [[1, 3], [5, 2]])
    sequence = [_episode(step, numbers) for step, numbers in enumerate(ids)]
    assert continual_targets(sequence)[-1].tolist() == [[0, 1, 2, 3, 0, 2], [0, 1, 1, 3, 3, 1]]
    assert continual_targets(sequence, merge_repeats=False)[-1].tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    unknown = [sequence[0], _episode(1, None), sequence[2]]
    assert continual_targets(unknown)[-1].tolist() == [[0, 1, 2, 3, 0, 5], [0, 1, 2, 3, 4, 1]]


def test_targets_need_answers():
    bare = Episode(_episode(0, None).support_x, _episode(0, None).support_y, _episode(0, None).query_x)
    with pytest.raises(DataError, match="task 1 of the sequence has no query_y; give the answers of its queries"):
        continual_targets([_episode(0, None), bare])


@given(repeat_prob=st.sampled_from([0.0, 0.5, 1.0]), step=st.integers(0, 20))
@settings(max_examples=12, deadline=None)
def test_every_target_of_a_sampled_sequence_is_a_class_that_its_sequence_holds(repeat_prob, step):
    sequence = SequenceSampler(digits(), n_tasks=3, ways=3, queries=2, sequences=2, repeat_prob=repeat_prob).sample(step)
    logits = model_of().unroll(sequence)
    targets = continual_targets(sequence)
    for answer, target in zip(logits, targets, strict=True):
        assert answer.gather(2, target[..., None]).isfinite().all()
        for row in range(2):
            ids = torch.cat([episode.class_ids[row, episode.query_y[row]] for episode in sequence])[: target.shape[1]]
            columns = {(int(number), int(column)) for number, column in zip(ids, target[row], strict=True)}
            assert len(columns) == len(set(ids.tolist())) == int(answer[row].isfinite().all(0).sum())
    assert continual_loss(logits, targets)[0].isfinite()


def test_shares_of_right_answers():
    logits = [torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.eye(4)[None]]
    found = accuracy_table(logits, [torch.tensor([[0, 1]]), torch.tensor([[0, 1, 3, 3]])])
    assert found.shape == (1, 2, 2)
    assert found[0].tolist()[1] == [1.0, 0.5]
    assert found[0, 0, 0] == 0.5
    assert math.isnan(found[0, 0, 1])


# --- measures ----------------------------------------------------------------------------------------------------


def test_measures_by_hand():
    table = np.array([[0.8, np.nan, np.nan], [0.9, 0.6, np.nan], [0.5, 0.7, 1.0]])
    found = sequence_measures(table)
    assert found.accuracy.value == pytest.approx((0.5 + 0.7 + 1.0) / 3)
    assert found.forgetting.value == pytest.approx(((0.9 - 0.5) + (0.6 - 0.7)) / 2)
    assert found.backward_transfer.value == pytest.approx(((0.5 - 0.8) + (0.7 - 0.6)) / 2)


def test_what_stands_above_the_diagonal_is_not_read():
    table = np.array([[0.8, 0.99], [0.5, 0.7]])
    assert sequence_measures(table) == sequence_measures(np.tril(table))
    assert sequence_measures(table).forgetting.value == pytest.approx(0.3)


def test_one_task_has_nothing_to_forget():
    found = sequence_measures(np.array([[0.8]]))
    assert found.accuracy.value == 0.8
    assert math.isnan(found.forgetting.value)
    assert "one learn event only" in found.backward_transfer.reason


def test_the_oracle_takes_the_growing_choice_out():
    table, oracle = np.array([[0.9, 0, 0], [0.7, 0.8, 0], [0.4, 0.6, 0.9]]), np.array([[0.9, 0, 0], [0.8, 0.8, 0], [0.6, 0.7, 0.9]])
    assert oracle_drop(oracle).value == pytest.approx((0.3 + 0.1) / 2)
    assert forgetting_beyond_oracle(table, oracle).value == pytest.approx(((0.6 - 0.4) + (0.7 - 0.6)) / 2)
    assert forgetting_beyond_oracle(table, table).value == 0
    assert forgetting_beyond_oracle(table[:1, :1], oracle[:1, :1]).reason


def test_tables_must_be_square_and_alike():
    with pytest.raises(DataError, match=r"the table must be \(T, T\), accuracy on task i after task t; got \(2, 3\)"):
        sequence_measures(np.zeros((2, 3)))
    with pytest.raises(DataError, match=r"the table is \(2, 2\), that of the oracle \(3, 3\); measure both on the same sequence"):
        forgetting_beyond_oracle(np.zeros((2, 2)), np.zeros((3, 3)))


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_drift_is_the_distance_from_the_means_laid_down(scenario):
    model = model_of(scenario=scenario)
    sequence = [_episode(step, None) for step in range(3)]
    state = model.states(sequence)[-1]
    drift = prototype_drift(model, state, sequence)
    assert drift.shape == (2, 3)
    assert torch.allclose(drift[:, 2], torch.zeros(2), atol=1e-5)
    distance = (model.embed(state, sequence[0].support_x) - state.prototypes[:, :2]).norm(dim=-1)
    assert torch.allclose(drift[:, 0], distance.mean(1), atol=1e-6)
    assert (drift[:, :2] > 1e-3).all()


def test_drift_of_a_class_that_came_again_is_from_its_merged_mean():
    model = model_of()
    sequence = [_episode(0, [[1, 2]] * 2), _episode(1, [[2, 3]] * 2)]
    state = model.states(sequence)[-1]
    drift = prototype_drift(model, state, sequence)
    distance = (model.embed(state, sequence[1].support_x) - state.prototypes[:, 1:]).norm(dim=-1)
    assert torch.allclose(drift[:, 1], distance.mean(1), atol=1e-6)


def test_drift_in_task_incremental_is_from_the_means_of_the_task_itself():
    model = model_of(scenario="task")
    sequence = [_episode(step, [[1, 2]] * 2) for step in range(2)]
    assert torch.allclose(prototype_drift(model, model.states(sequence)[-1], sequence)[:, 1], torch.zeros(2), atol=1e-5)


def test_drift_counts_the_classes_that_a_sequence_has():
    model, x = model_of(), support(0, n=2, batch=2)[0]
    sequence = [Episode(x, torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]), x[:, :0]), episode(1)]
    state = model.states(sequence)[-1]
    drift = prototype_drift(model, state, sequence)
    own = (model.embed(state, x)[1].mean(0) - state.prototypes[1, 0]).norm()
    assert torch.allclose(drift[1, 0], own, atol=1e-5)


def test_drift_of_mini_batches_is_from_the_shared_means():
    model = model_of(scenario="minibatch")
    sequence = [_episode(step, None) for step in range(2)]
    state = model.states(sequence)[-1]
    distance = (model.embed(state, sequence[1].support_x) - state.prototypes).norm(dim=-1)
    assert torch.allclose(prototype_drift(model, state, sequence)[:, 1], distance.mean(1), atol=1e-6)


def test_drift_needs_every_support():
    model = model_of()
    sequence = [_episode(step, None) for step in range(2)]
    with pytest.raises(DataError, match="the state took 2 tasks in, 1 supports are given; give those of all its tasks"):
        prototype_drift(model, model.states(sequence)[-1], sequence[:1])
