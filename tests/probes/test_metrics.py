"""Metrics against values worked out by hand, and against the peers' formulas re-derived from their definitions.

A (rows: after learning 0, 1, 2; columns: task 0, 1, 2):

    0.9  0.1  0.2
    0.6  0.8  0.3
    0.7  0.5  0.9
"""

import numpy as np
import pytest

from remanence.errors import DataError
from remanence.probes import metrics

A = np.array([[0.9, 0.1, 0.2], [0.6, 0.8, 0.3], [0.7, 0.5, 0.9]])
EYE = np.eye(3, dtype=bool)
BEFORE = np.array([0.1, 0.05, 0.1])
ALONE = np.array([0.9, 0.9, 1.0])


def test_metrics_of_a_3x3_matrix_by_hand():
    expected = {
        metrics.average_accuracy: 0.7,  # (0.7 + 0.5 + 0.9) / 3
        metrics.forgetting_first: 0.25,  # ((0.9 - 0.7) + (0.8 - 0.5)) / 2
        metrics.backward_transfer: -0.25,
        metrics.forgetting_max: 0.25,  # max over t < 2: 0.9 and 0.8
        metrics.forgetting_step: 0.2,  # t=1: 0.9-0.6 = 0.3; t=2: ((0.6-0.7) + (0.8-0.5)) / 2 = 0.1; mean 0.2
        metrics.interference: -0.2,
        metrics.learning_accuracy: 2.6 / 3,  # (0.9 + 0.8 + 0.9) / 3
    }
    assert {f.__name__: f(A, EYE).value for f in expected} == pytest.approx({f.__name__: v for f, v in expected.items()})


def test_forward_transfer_and_plasticity_by_hand():
    # task 1: 0.1 - 0.05; task 2: 0.3 - 0.1
    assert metrics.forward_transfer(A, EYE, BEFORE).value == pytest.approx((0.05 + 0.2) / 2)
    # 0.9-0.9, 0.8-0.9, 0.9-1.0
    assert metrics.plasticity(A, EYE, ALONE).value == pytest.approx(-0.2 / 3)
    assert metrics.plasticity(A, EYE, np.array([np.nan, 0.9, np.nan])).value == pytest.approx(-0.1)


def test_incremental_accuracy_by_hand():
    # a_0 = 0.9; a_1 = (0.6 + 0.8) / 2 = 0.7; a_2 = 0.7
    assert metrics.accuracy_on_seen(A, EYE) == pytest.approx([0.9, 0.7, 0.7])
    assert metrics.average_incremental_accuracy(np.array([0.9, 0.7, 0.7])).value == pytest.approx(2.3 / 3)
    assert metrics.average_incremental_accuracy(np.array([0.9, np.nan, 0.7])).value == pytest.approx(0.9)


def test_forgetting_max_sees_a_best_value_before_the_subject_was_learned_last():
    matrix = np.array([[0.5, 0.9, 0.0], [0.8, 0.6, 0.0], [0.4, 0.7, 1.0]])
    # max over t < 2: task 0 0.8, task 1 0.9; final 0.4 and 0.7
    assert metrics.forgetting_max(matrix, EYE).value == pytest.approx((0.4 + 0.2) / 2)
    # task 1 gained: 0.6 -> 0.7
    assert metrics.forgetting_first(matrix, EYE).value == pytest.approx((0.1 - 0.1) / 2)


def mammoth(matrix):
    """aimagelab/mammoth: np.mean of max over all rows minus the last, over all tasks but the last."""
    return float(np.mean([max(row[j] for row in matrix) - matrix[-1][j] for j in range(len(matrix) - 1)]))


def avalanche(matrix):
    """ContinualAI/avalanche: per experience the accuracy when it was first trained minus the present one."""
    initial = {j: matrix[j][j] for j in range(len(matrix))}
    last = {j: matrix[-1][j] for j in range(len(matrix) - 1)}
    return sum(initial[j] - last[j] for j in last) / len(last)


def coda(matrix):
    """GT-RIPL/CODA-Prompt: at each task the mean loss of the earlier ones since the task before."""
    total = 0.0
    for t in range(1, len(matrix)):
        total += sum(matrix[t - 1][i] - matrix[t][i] for i in range(t)) / t
    return total / (len(matrix) - 1)


@pytest.mark.parametrize("seed", range(5))
def test_agreement_with_the_peers(seed):
    matrix = np.random.default_rng(seed).random((5, 5))
    eye = np.eye(5, dtype=bool)
    assert metrics.forgetting_first(matrix, eye).value == pytest.approx(avalanche(matrix), abs=1e-12)
    assert metrics.forgetting_step(matrix, eye).value == pytest.approx(coda(matrix), abs=1e-12)
    # mammoth's maximum includes the last row: equal once no task gained in the last event
    worse = matrix.copy()
    worse[-1] = matrix[:-1].min(axis=0)
    assert metrics.forgetting_max(worse, eye).value == pytest.approx(mammoth(worse), abs=1e-12)
    ours = [matrix[:-1, j].max() - matrix[-1, j] for j in range(4)]
    assert metrics.forgetting_max(matrix, eye).value == pytest.approx(np.mean(ours))
    assert np.mean(np.maximum(ours, 0)) == pytest.approx(mammoth(matrix))


UNDEFINED = [
    metrics.forgetting_first,
    metrics.forgetting_max,
    metrics.forgetting_step,
    metrics.backward_transfer,
    metrics.interference,
]


@pytest.mark.parametrize("metric", UNDEFINED)
def test_a_single_event_has_no_forgetting_but_a_reason(metric):
    value, reason = metric(np.array([[0.9]]), np.array([[True]]))
    assert np.isnan(value)
    assert reason == "one learn event only: nothing was learned afterwards"


@pytest.mark.parametrize("metric", [*UNDEFINED, metrics.average_accuracy, metrics.learning_accuracy])
def test_nothing_measured_is_nan_with_a_reason(metric):
    value, reason = metric(np.empty((0, 3)), np.empty((0, 3), dtype=bool))
    assert np.isnan(value)
    assert "no learn event" in reason


def test_joint_event_has_accuracy_but_no_forgetting():
    values, learned = np.array([[0.9, 0.8]]), np.array([[True, True]])
    assert metrics.average_accuracy(values, learned).value == pytest.approx(0.85)
    assert metrics.learning_accuracy(values, learned).value == pytest.approx(0.85)
    assert np.isnan(metrics.forgetting_max(values, learned).value)
    assert metrics.forward_transfer(values, learned, np.zeros(2)).reason == "no task waited while another was learned"


def test_two_events():
    values, learned = np.array([[0.9, 0.2], [0.5, 0.8]]), np.eye(2, dtype=bool)
    assert metrics.forgetting_first(values, learned).value == pytest.approx(0.4)
    assert metrics.forgetting_max(values, learned).value == pytest.approx(0.4)
    assert metrics.forgetting_step(values, learned).value == pytest.approx(0.4)


def test_online_stream_reads_the_last_event_that_taught_a_subject():
    values = np.array([[0.5, 0.0], [0.8, 0.0], [0.6, 0.4], [0.2, 0.9]])
    learned = np.array([[True, False], [True, False], [False, True], [False, True]])
    assert metrics.first_event(learned).tolist() == [0, 2]
    assert metrics.last_event(learned).tolist() == [1, 3]
    assert metrics.learning_accuracy(values, learned).value == pytest.approx((0.8 + 0.9) / 2)
    assert metrics.forgetting_first(values, learned).value == pytest.approx(0.6)  # 0.8 -> 0.2
    # changes of task 0 at t=2 and t=3; at t=1 it is being learned itself
    assert metrics.interference(values, learned).value == pytest.approx((-0.2 - 0.4) / 2)
    # before task 1's first event
    assert metrics.forward_transfer(values, learned, np.array([0.0, 0.1])).value == pytest.approx(-0.1)


def test_partial_run_is_read_up_to_the_first_missing_cell():
    torn = A.copy()
    torn[2, 1] = np.nan
    assert metrics.forgetting_first(torn, EYE).value == pytest.approx(0.3)  # 0.9 -> 0.6, two rows
    assert metrics.average_accuracy(torn, EYE).value == pytest.approx(0.7)  # (0.6 + 0.8) / 2: task 2 was not taught yet
    assert metrics.accuracy_on_seen(torn, EYE) == pytest.approx([0.9, 0.7])


def test_forward_transfer_without_a_first_measurement():
    assert metrics.forward_transfer(A, EYE, np.full(3, np.nan)).reason == "accuracy before the first event was not measured"


def test_shapes_that_disagree_are_named():
    with pytest.raises(DataError, match=r"\(3, 3\) and \(2, 3\)"):
        metrics.average_accuracy(A, EYE[:2])
