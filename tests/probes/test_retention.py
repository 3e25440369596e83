"""Retention curves and half-lives."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remanence.errors import DataError
from remanence.probes.retention import half_life, retention


def plain_half_life(steps, rho):
    """The definition, one point after the other."""
    if any(math.isnan(value) for value in rho):
        return math.nan
    lowest = [min(rho[: index + 1]) for index in range(len(rho))]
    for index, value in enumerate(lowest):
        if value < 0.5:
            if index == 0:
                return steps[0]
            share = (lowest[index - 1] - 0.5) / (lowest[index - 1] - value)
            if steps[index - 1] == 0:
                return share * steps[index]
            return math.exp(math.log(steps[index - 1]) + share * (math.log(steps[index]) - math.log(steps[index - 1])))
    return math.inf


def test_retention_is_the_share_of_the_gain_over_the_control():
    log_p, control = np.array([[-1.0, -2.0, -3.0]]), np.array([[-9.0, -8.0, -8.5]])
    assert retention(log_p, control).tolist() == [[1.0, 6.0 / 8.0, 5.5 / 8.0]]
    assert retention(log_p[0], control[0]).tolist() == [1.0, 6.0 / 8.0, 5.5 / 8.0]


def test_a_gain_below_log_two_is_not_learned():
    least = math.log(2.0)
    rho = retention([[least * 1.001, 0.0], [least * 0.999, 0.0], [-3.0, 0.0], [math.nan, 0.0]], np.zeros((4, 2)))
    assert rho[0].tolist() == [1.0, 0.0]
    assert np.isnan(rho[1:]).all()


def test_known_facts_are_not_counted():
    curves, controls = np.full((2, 2), -0.01), np.full((2, 2), -4.0)
    rho = retention(curves, controls, np.log([0.6, 0.4]))
    assert np.isnan(rho[0]).all()
    assert rho[1].tolist() == [1.0, 1.0]
    assert np.isnan(retention(curves[0], controls[0], math.log(0.6))).all()


def test_inputs_stay_as_they_are_and_no_facts_are_no_error():
    curves, controls = np.zeros((1, 2)), np.full((1, 2), -2.0)
    retention(curves, controls)
    assert curves.tolist() == [[0.0, 0.0]]
    assert controls.tolist() == [[-2.0, -2.0]]
    assert retention(np.zeros((0, 3)), np.zeros((0, 3))).shape == (0, 3)
    assert half_life([0, 1, 2], np.zeros((0, 3))).shape == (0,)


def test_curves_that_do_not_fit():
    for curves, controls in ((np.zeros((2, 3)), np.zeros((2, 2))), (np.zeros((1, 1, 2)),) * 2, (np.zeros((2, 0)),) * 2):
        with pytest.raises(DataError, match="on one grid, k = 0 first"):
            retention(curves, controls)
    with pytest.raises(DataError, match=r"log_p_before of shape \(3,\), but \(2,\) curves; give one number for each"):
        retention(np.zeros((2, 2)), np.zeros((2, 2)), np.zeros(3))


def test_half_lives_of_known_curves():
    steps = [0, 1, 10, 100]
    curves = {
        "linear in log k": ([1.0, 1.0, 0.75, 0.25], math.sqrt(1000.0)),
        "before the first step": ([1.0, 0.0, 0.0, 0.0], 0.5),
        "never": ([1.0, 0.9, 0.5, 0.5], math.inf),
        "the running minimum": ([1.0, 0.4, 0.9, 0.1], 1.0 * (0.5 / 0.6)),
        "not learned": ([math.nan] * 4, math.nan),
        "a point is missing": ([1.0, math.nan, 0.2, 0.1], math.nan),
        "gone at once": ([0.2, 0.1, 0.1, 0.1], 0.0),
    }
    found = half_life(steps, [curve for curve, _ in curves.values()])
    np.testing.assert_allclose(found, [expected for _, expected in curves.values()])


@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=8, unique=True).map(sorted),
    st.lists(st.lists(st.floats(-1.0, 1.5), min_size=8, max_size=8), min_size=1, max_size=4),
)
def test_half_lives_are_those_of_a_plain_loop(steps, curves):
    rows = [curve[: len(steps)] for curve in curves]
    np.testing.assert_allclose(half_life(steps, rows), [plain_half_life(steps, row) for row in rows], rtol=1e-9)
    assert half_life(steps, rows[0]).shape == ()


def test_grids_that_do_not_fit():
    for steps, curve in (([0, 1], [1.0, 0.5, 0.2]), ([], []), ([[0, 1]], [1.0, 0.5])):
        with pytest.raises(DataError, match="give one step for each point"):
            half_life(steps, curve)
    for steps in ([0, 2, 1], [0, 0, 1], [-1, 0, 1]):
        with pytest.raises(DataError, match="must begin at 0 or above and ascend"):
            half_life(steps, [1.0, 0.5, 0.2])
