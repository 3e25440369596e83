import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import SettingError
from remanence.facts import Expanding, Massed, Poisson, Spaced

counts = st.integers(0, 12)
starts = st.integers(0, 50)
schedules = st.one_of(
    st.builds(Spaced, every=st.integers(1, 9), times=counts, start=starts),
    st.builds(Massed, times=counts, start=starts, per_step=st.none() | st.integers(1, 5)),
    st.builds(Expanding, base=st.integers(1, 4), factor=st.floats(1, 2), times=st.integers(0, 7), start=starts),
    st.builds(Poisson, rate=st.floats(0.05, 1), times=counts, seed=st.integers(0, 99), start=starts),
)


@settings(deadline=None, max_examples=150)
@given(schedules)
def test_steps_last_and_exposures_agree(schedule):
    steps = schedule.steps
    assert list(steps) == sorted(set(steps))
    assert all(step >= schedule.start for step in steps)
    assert schedule.last == (steps[-1] if steps else None)
    end = (schedule.last or 0) + 10
    assert tuple(step for step in range(-5, end) if schedule.exposures(step)) == steps
    assert sum(schedule.exposures(step) for step in range(end)) == schedule.times


def test_spaced():
    assert Spaced().steps == tuple(range(20))
    assert Spaced(every=7, times=3, start=2).steps == (2, 9, 16)
    assert Spaced(times=0).steps == ()
    assert Spaced(times=0).last is None


def test_massed_takes_as_few_batches_as_it_may():
    assert Massed(times=20).steps == (0,)
    assert Massed(times=20).exposures(0) == 20
    burst = Massed(times=5, start=3, per_step=2)
    assert [burst.exposures(step) for step in range(8)] == [0, 0, 0, 2, 2, 1, 0, 0]
    assert burst.last == 5
    assert Massed(times=0).last is None


def test_expanding_gaps_grow_by_the_factor():
    steps = Expanding(base=2, factor=1.5, times=6, start=1).steps
    assert [later - earlier for earlier, later in itertools.pairwise(steps)] == [2, 3, 4, 6, 10]
    assert Expanding(base=3, factor=1.0, times=4).steps == Spaced(every=3, times=4).steps
    assert Expanding().last == 127
    assert Expanding(times=1, start=9).steps == (9,)


def test_poisson_has_its_rate_and_its_seed():
    steps = Poisson(rate=0.1, times=4000, seed=3).steps
    assert steps[-1] / 4000 == pytest.approx(10, rel=0.06)
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    assert sum(gap == 1 for gap in gaps) / len(gaps) == pytest.approx(0.1, abs=0.02)
    assert Poisson(0.1, 10, seed=1).steps == Poisson(0.1, 10, seed=1).steps != Poisson(0.1, 10, seed=2).steps
    assert Poisson(0.1, 5, seed=1).steps == Poisson(0.1, 10, seed=1).steps[:5]
    assert Poisson(0.1, 5, seed=1, start=7).steps == tuple(7 + step for step in Poisson(0.1, 5, seed=1).steps)


def test_poisson_draws_the_same_everywhere():
    assert Poisson(rate=0.2, times=6).steps == (1, 3, 10, 11, 14, 17)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Spaced(every=0), "every: 0; give a whole number of 1 or more"),
        (lambda: Spaced(times=-1), "times: -1; give a whole number of 0 or more"),
        (lambda: Spaced(start=1.5), "start: 1.5; give a whole number of 0 or more"),
        (lambda: Spaced(times=True), "times: True; give a whole number"),
        (lambda: Massed(per_step=0), "per_step: 0; give a whole number of 1"),
        (lambda: Massed(start=-2), "start: -2"),
        (lambda: Expanding(base=0), "base: 0"),
        (lambda: Expanding(factor=0.5), r"factor: 0\.5; gaps grow or stay"),
        (lambda: Expanding(factor=float("nan")), "factor: nan"),
        (lambda: Expanding(times=60), "base 1, factor 2.0, times 60: the last gap exceeds"),
        (lambda: Expanding(factor=1e300, times=9), "the last gap exceeds"),
        (lambda: Poisson(rate=0.0, times=3), r"rate: 0\.0 exposures a step; give a number in \(0, 1\]"),
        (lambda: Poisson(rate=1.5, times=3), r"rate: 1\.5"),
        (lambda: Poisson(rate=0.5, times=-3), "times: -3"),
        (lambda: Poisson(rate=1e-13, times=3), "the exposures end beyond 1e\\+12 steps; raise rate"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(SettingError, match=message):
        make()
