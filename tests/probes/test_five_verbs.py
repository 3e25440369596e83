"""From a synthetic ledger to the five verbs, every number worked out by hand.

The stream teaches a, b, c in turn and then forgets a:

    event   a     b     c
    -1      0.0   0.1   0.2
     0      0.9   0.1   0.2
     1      0.6   0.8   0.3
     2      0.7   0.5   0.9
     3      0.1   0.4   0.9   (forget a)
"""

import numpy as np
import pandas as pd
import pytest

from remanence.errors import DataError, SettingError
from remanence.ledger import Row, to_frame
from remanence.probes import accuracy_matrix, cell_metrics, five_verbs, paired_difference
from remanence.probes.matrix import is_independent

TABLE = {-1: [0.0, 0.1, 0.2], 0: [0.9, 0.1, 0.2], 1: [0.6, 0.8, 0.3], 2: [0.7, 0.5, 0.9], 3: [0.1, 0.4, 0.9]}
NAMES = ["a", "b", "c"]


class Cell:
    def __init__(self, learner="L", seed=0, stream="split"):
        self.rows, self.place = [], ("run", stream, learner, "weights", seed)

    def add(self, event, probe, subject, metric, value, *, step=None, at=None, note="", reader="", verb=None):
        verb = verb or ("" if event < 0 else "forget" if event == 3 else "learn")
        task = "" if event < 0 else "a" if event == 3 else NAMES[event % 3]
        exact = metric not in ("seconds", "peak_memory_bytes")
        self.rows.append(Row(*self.place, event, verb, task, step, probe, reader, subject, metric, at, value, "1", exact, note))


def full_cell(learner="L", seed=0, shift=0.0, supported=True, forget=True):
    cell = Cell(learner, seed)
    for event, values in TABLE.items():
        if event == 3 and not forget:
            continue
        for name, value in zip(NAMES, values, strict=True):
            cell.add(event, "accuracy", name, "accuracy", value + shift)
            cell.add(event, "accuracy", name, "chance", 0.0 if event < 0 else 0.25)
        cell.add(event, "bystanders", "old", "accuracy", 0.8 - 0.1 * max(event, -1))
        if 0 <= event < 3:
            cell.add(event, "accuracy", "", "accuracy_seen", [0.9, 0.7, 0.65][event])
            cell.add(event, "run", NAMES[event], "n_train", 40.0)
            for metric, value in (("steps", 10.0), ("examples", 80.0), ("seconds", 0.5), ("peak_memory_bytes", 100.0 + event)):
                cell.add(event, "run", "", metric, value)
            costs = (
                ("total_bytes", 30.0 * (event + 1)),
                ("trainable_parameters", 7.0),
                ("flops_learn", 1000.0),
                ("flops_predict", 5.0),
            )
            for metric, value in costs:
                cell.add(event, "cost", "", metric, value)
            for step, share in ((1, 0.1), (2, 0.5), (4, 0.95), (8, 1.0)):
                cell.add(event, "accuracy", NAMES[event], "accuracy", share * values[event], step=step)
    cell.add(2, "membership", "a", "membership_auc", 0.75)
    if forget:
        cell.add(3, "run", "", "erasure_supported", float(supported), note="" if supported else "L cannot take 'a' out again.")
        cell.add(3, "membership", "a", "membership_auc", 0.5)
        for metric, curve in (
            ("relearn_accuracy", {0: 0.1, 8: 0.5, 16: 0.7}),
            ("fresh_accuracy", {0: 0.0, 8: 0.3, 16: 0.6, 64: 0.8}),
        ):
            for at, value in curve.items():
                cell.add(3, "relearning", "a", metric, value, at=at)
    return cell.rows


def value_of(frame, metric, **where):
    table = five_verbs(frame)
    for column, wanted in {"learner": "L", "reader": "", **where}.items():
        table = table[table[column] == wanted]
    row = table[table["metric"] == metric]
    assert len(row) == 1
    return row.iloc[0]


EXPECTED = {
    "learning_accuracy": 2.6 / 3,
    "examples_to_learn": 32.0,  # 95 % at step 4 of 10, 80 examples an event
    "average_accuracy": 0.7,
    "average_incremental_accuracy": 0.75,  # (0.9 + 0.7 + 0.65) / 3, as recorded
    "forgetting_first": 0.25,
    "forgetting_max": 0.25,
    "forgetting_step": 0.2,
    "backward_transfer": -0.25,
    "forward_transfer": 0.05,  # b: 0.1 - 0.1; c: 0.3 - 0.2
    "interference": -0.2,
    "bystander_change": -0.3,  # 0.6 after event 2, 0.9 before
    "forgets": 1.0,
    "forgotten_accuracy_before": 0.7,
    "forgotten_accuracy_after": 0.1,
    "rest_change": -0.05,  # b 0.5 -> 0.4, c 0.9 -> 0.9
    "relearn_examples": 16.0,  # 0.9 x 0.7 = 0.63: 0.7 at 16
    "fresh_examples": 64.0,  # 0.6 at 16 is too little
    "relearn_ratio": 0.25,
    "membership_auc_before": 0.75,
    "membership_auc_after": 0.5,
    "bytes_per_task": 30.0,  # 90 bytes, three tasks
    "trainable_parameters": 7.0,
    "steps": 30.0,
    "examples": 240.0,
    "seconds": 1.5,
    "flops_learn": 3000.0,
    "flops_predict": 5.0,
    "peak_memory_bytes": 102.0,
}


def test_every_metric_by_hand():
    table = five_verbs(to_frame(full_cell()))
    table = table[table["learner"] == "L"]
    found = dict(zip(table["metric"], table["mean"], strict=True))
    assert np.isnan(found.pop("plasticity"))
    assert found == pytest.approx(EXPECTED)


def test_matrix_holds_learn_events_only():
    matrix = accuracy_matrix(to_frame(full_cell()))
    assert matrix.values.tolist() == [TABLE[0], TABLE[1], TABLE[2]]
    assert matrix.before.tolist() == TABLE[-1]
    assert matrix.learned.tolist() == np.eye(3, dtype=bool).tolist()
    assert matrix.events == (0, 1, 2)
    assert matrix.subjects == ("a", "b", "c")


def test_interval_over_seeds_by_hand():
    frame = to_frame([*full_cell(seed=0), *full_cell(seed=1, shift=0.02), *full_cell(seed=2, shift=0.04)])
    row = value_of(frame, "average_accuracy")
    # mean 0.72, standard deviation 0.02, t(2) = 4.302653
    assert row["mean"] == pytest.approx(0.72)
    assert row["high"] - row["mean"] == pytest.approx(4.302653 * 0.02 / 3**0.5, rel=1e-6)
    assert row["n"] == 3


def test_one_seed_has_no_interval():
    row = value_of(to_frame(full_cell()), "average_accuracy")
    assert np.isnan(row["low"])
    assert row["n"] == 1


def test_reference_rows():
    frame = to_frame([*full_cell("L"), *full_cell("M", shift=0.1)])
    assert value_of(frame, "average_accuracy", learner="chance")["mean"] == pytest.approx(0.25)
    # mean over learners of (0 + 0.1 + 0.2) / 3, and the same plus 0.1
    assert value_of(frame, "average_accuracy", learner="never learned")["mean"] == pytest.approx(0.15)


def test_a_learner_that_cannot_forget_has_nulls_with_its_own_words():
    frame = to_frame(full_cell(supported=False))
    assert value_of(frame, "forgets")["mean"] == 0.0
    for metric in ("forgotten_accuracy_after", "relearn_ratio", "rest_change", "membership_auc_after"):
        row = value_of(frame, metric)
        assert np.isnan(row["mean"])
        assert row["note"] == "L cannot take 'a' out again."


def test_without_forget_events_the_forget_columns_say_so():
    row = value_of(to_frame(full_cell(forget=False)), "forgets")
    assert np.isnan(row["mean"])
    assert row["note"] == "nothing was forgotten in this stream"


def test_relearning_that_never_arrives_is_missing_with_the_number_tried():
    rows = [row for row in full_cell() if not (row.metric == "fresh_accuracy" and row.at == 64)]
    row = value_of(to_frame(rows), "fresh_examples")
    assert np.isnan(row["mean"])
    assert row["note"] == "90 % of the old accuracy did not come back within 16 examples"
    assert value_of(to_frame(rows), "relearn_ratio")["note"] == row["note"]


def test_missing_in_one_seed_is_told():
    broken = [row for row in full_cell(seed=1) if row.metric != "membership_auc"]
    row = value_of(to_frame([*full_cell(), *broken]), "membership_auc_after")
    assert row["n"] == 1
    assert row["note"] == "1 of 2 seeds without a value: membership was not measured"


def alone_cell(seed=0, values=(0.9, 0.9, 1.0)):
    cell = Cell("L", seed, stream="alone")
    for event, value in enumerate(values):
        cell.add(event, "accuracy", NAMES[event], "accuracy", value, verb="learn")
        cell.add(event, "run", NAMES[event], "n_train", 40.0, verb="learn")
    return cell.rows


def test_plasticity_reads_the_cell_in_which_tasks_were_learned_alone():
    frame = to_frame([*full_cell(), *alone_cell()])
    assert is_independent(to_frame(alone_cell()))
    assert not is_independent(to_frame(full_cell()))
    assert value_of(frame, "plasticity", stream="split")["mean"] == pytest.approx(-0.2 / 3)
    assert value_of(frame, "learning_accuracy", stream="alone")["mean"] == pytest.approx(2.8 / 3)
    kept = value_of(frame, "average_accuracy", stream="alone")
    assert np.isnan(kept["mean"])
    assert kept["note"] == "every task of this stream starts from the base state"


def test_joint_stream_has_no_forgetting_but_a_reason():
    cell = Cell("L", 0, stream="joint")
    for name, value in zip(NAMES, (0.9, 0.8, 0.7), strict=True):
        cell.add(-1, "accuracy", name, "accuracy", 0.1)
        cell.add(0, "accuracy", name, "accuracy", value)
        cell.add(0, "run", name, "n_train", 40.0)
    frame = to_frame(cell.rows)
    assert value_of(frame, "average_accuracy")["mean"] == pytest.approx(0.8)
    row = value_of(frame, "forgetting_first")
    assert np.isnan(row["mean"])
    assert "one learn event only" in row["note"]


def test_other_readers_get_rows_of_their_own():
    cell = Cell()
    cell.rows = full_cell()
    for event, values in TABLE.items():
        for name, value in zip(NAMES, values, strict=True):
            cell.add(event, "accuracy", name, "accuracy", value / 2, reader="average")
    frame = to_frame(cell.rows)
    assert value_of(frame, "average_accuracy", reader="average")["mean"] == pytest.approx(0.35)
    assert value_of(frame, "average_accuracy")["mean"] == pytest.approx(0.7)
    assert "steps" not in set(cell_metrics(frame).query("reader == 'average'")["metric"])


def test_a_torn_run_is_read_up_to_its_last_whole_event():
    rows = [row for row in full_cell(forget=False) if not (row.event == 2 and row.subject == "b")]
    frame = to_frame(rows)
    assert value_of(frame, "average_accuracy")["mean"] == pytest.approx(0.7)  # (0.6 + 0.8) / 2
    assert value_of(frame, "forgetting_first")["mean"] == pytest.approx(0.3)


def test_subjects_without_test_examples_are_left_out():
    rows = full_cell(forget=False)
    cell = Cell()
    for event in range(-1, 3):
        cell.add(event, "accuracy", "empty", "accuracy", None, note="the test set is empty")
    cell.add(1, "run", "empty", "n_train", 1.0)
    assert value_of(to_frame([*rows, *cell.rows]), "average_accuracy")["mean"] == pytest.approx(0.7)


def test_paired_difference_by_hand():
    rows = [*full_cell("L", 0, 0.01), *full_cell("L", 1, 0.05), *full_cell("M", 0), *full_cell("M", 1)]
    difference = paired_difference(to_frame(rows), "average_accuracy", "L", "M")
    # 0.01 and 0.05: mean 0.03, t(1) = 12.7062, standard error 0.02
    assert difference.mean == pytest.approx(0.03)
    assert difference.low == pytest.approx(0.03 - 12.7062 * 0.02, rel=1e-4)
    assert difference.n == 2


def test_paired_difference_names_what_is_wrong():
    frame = to_frame([*full_cell(), *alone_cell()])
    with pytest.raises(SettingError, match="Did you mean 'average_accuracy'"):
        paired_difference(frame, "average_acuracy", "L", "L")
    with pytest.raises(SettingError, match="learner 'K' is not in this run"):
        paired_difference(frame, "average_accuracy", "K", "L")
    with pytest.raises(SettingError, match="L @ alone, L @ split"):
        paired_difference(frame, "average_accuracy", "L", "L")
    assert paired_difference(frame, "learning_accuracy", "L @ split", "L @ alone").mean == pytest.approx(-0.2 / 3)


def test_several_cells_in_one_matrix_are_refused():
    with pytest.raises(DataError, match="the frame holds 2"):
        accuracy_matrix(to_frame([*full_cell(seed=0), *full_cell(seed=1)]))


def test_an_empty_ledger_gives_an_empty_table():
    table = five_verbs(to_frame([]))
    assert isinstance(table, pd.DataFrame)
    assert len(table) == 0


def test_relearning_of_what_was_already_lost_has_no_length():
    frame = to_frame(full_cell(shift=-0.5))  # a stood at 0.2 before it was forgotten, chance is 0.25
    row = value_of(frame, "relearn_ratio")
    assert np.isnan(row["mean"])
    assert "did not exceed chance" in value_of(frame, "relearn_examples")["note"]
