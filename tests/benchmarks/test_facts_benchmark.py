"""The parts of the benchmark of facts: runs in one equal runs apart; levels, choices and gates on made-up rows."""

import math
import sys
from pathlib import Path

import pandas as pd
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _on_path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def test_runs_in_one_equal_runs_apart():
    from facts_together import TOLERANCE, batches, compare, small_model

    found = compare(small_model(50, 16, 1), batches(3, 4, 50, 4, 9))
    assert found["difference"] <= TOLERANCE


def test_runs_in_one_differ_where_their_rows_do():
    from facts_together import batches, small_model, together

    first, second = together(small_model(50, 16, 1), batches(2, 2, 50, 4, 9))
    assert any(not first[name].equal(second[name]) for name in first)


def test_priming_is_read_where_memory_first_reaches_the_level():
    from facts_gates import at_level, paired

    curve = {"log_p": [-2.0, -1.0, 0.0], "priming_median": [0.0, 1.0, 3.0]}
    rows = pd.DataFrame(curve | {"experiment": "exposed", "seed": 0, "fact": "a", "variant": "plain"})
    slow = rows.assign(log_p=-5.0, variant="every 4")
    found = at_level(pd.concat([rows, slow]), level=-0.5).set_index("variant")["priming_median"]
    assert found["plain"] == 2.0
    assert math.isnan(found["every 4"])
    assert paired(at_level(rows, level=-0.5), "every 4", "plain").empty


def test_the_gentlest_update_that_removes_enough_is_chosen():
    from facts import FRACTIONS, tuned
    from facts_runs import method_name

    def rows(enough):
        lines = [("injected", 1.0, 1.0)]
        for fraction in FRACTIONS:
            for embeddings in (False, True):
                left = 0.2 if (fraction, embeddings) in enough else 0.6
                lines.append((method_name("ignore_top", fraction, embeddings), left, left))
        table = pd.DataFrame(lines, columns=["method", "priming_median", "log_s_mem"])
        return table.assign(experiment="erased")

    assert tuned(rows({(0.08, True), (0.32, False)})) == (0.08, True)
    assert tuned(rows(set())) == (FRACTIONS[-1], True)


def test_a_gate_that_only_reports_never_fails_the_command():
    from facts_gates import Gate

    assert not Gate("G1", "c", "s", False).passed
    assert Gate("G1", "c", "s", False, is_gated=False).passed
    assert "FAILS" in str(Gate("G1", "c", "s", False))


def test_the_null_of_a_forecast_can_fail():
    from facts_gates import _nulls

    n = 40
    permuted = pd.DataFrame({"experiment": "permuted", "seed": [i % 2 for i in range(n)], "kind": "mundane",
                             "log_p_before": [float(-i) for i in range(n)], "priming_median": [float(i) for i in range(n)]})  # fmt: skip
    control = pd.DataFrame({"experiment": "curve", "run": "control", "step": 20, "seed": [0, 1] * 4, "priming_median": 1.0, "drift": 0.0})
    nothing = pd.DataFrame({"experiment": ["nothing"], "case": ["no exposures"], "equal": [False]})
    assert [gate.passed for gate in _nulls(pd.concat([permuted, control, nothing]))] == [False, False, False]
