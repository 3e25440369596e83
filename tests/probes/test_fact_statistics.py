"""Intervals over facts within seeds, and partial rank correlations."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from remanence.errors import DataError, SettingError
from remanence.keys import key_seed
from remanence.probes.statistics import cluster_bootstrap, partial_spearman


def rng(*key):
    return np.random.default_rng(key_seed("fact statistics", *key))


def plain_bootstrap(values, seeds, statistic, n_resamples, random):
    """Seeds with replacement, then facts with replacement within each."""
    groups = [values[seeds == one] for one in np.unique(seeds)]
    found = []
    for _ in range(n_resamples):
        drawn = [groups[index] for index in random.integers(len(groups), size=len(groups))]
        found.append(statistic(np.concatenate([random.choice(group, len(group)) for group in drawn])))
    return np.percentile(found, (2.5, 97.5))


@pytest.mark.parametrize("statistic", [np.mean, np.median])
@pytest.mark.parametrize("sizes", [(12, 12, 12, 12), (5, 20, 9, 14)], ids=["equal", "unequal"])
def test_bounds_are_those_of_a_plain_resampling(statistic, sizes):
    random = rng("plain")
    seeds = np.repeat(np.arange(len(sizes)), sizes)
    values = random.normal(size=len(seeds)) + 0.8 * seeds
    low, high = plain_bootstrap(values, seeds, statistic, 4000, random)
    found = cluster_bootstrap(values, seeds, statistic, n_resamples=4000)
    assert found.mean == pytest.approx(statistic(values))
    assert found.n == sum(sizes)
    width = high - low
    assert found.low == pytest.approx(low, abs=0.08 * width)
    assert found.high == pytest.approx(high, abs=0.08 * width)


def test_all_at_once_and_one_by_one_draw_alike():
    random = rng("fast")
    values, seeds = random.normal(size=30), np.repeat(range(3), 10)
    fast = cluster_bootstrap(values, seeds, np.median)
    slow = cluster_bootstrap(values, seeds, lambda column: np.median(column))
    assert fast == pytest.approx(slow)


def test_facts_of_one_seed_are_no_independent_evidence():
    """Ten seeds that agree within and differ between: the interval must be as wide as that of ten numbers, not of two hundred."""
    random = rng("clusters")
    level = random.normal(size=10)
    values, seeds = np.repeat(level, 20) + 0.01 * random.normal(size=200), np.repeat(range(10), 20)
    within = cluster_bootstrap(values, seeds)
    flat = cluster_bootstrap(values, np.zeros(200))
    of_levels = cluster_bootstrap(level, np.zeros(10))
    assert within.high - within.low == pytest.approx(of_levels.high - of_levels.low, rel=0.15)
    assert within.high - within.low > 3 * (flat.high - flat.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    n_covered = 0
    for trial in range(200):
        random = rng("coverage", trial)
        values = (random.normal(size=(12, 1)) + random.normal(size=(12, 8))).flatten()
        found = cluster_bootstrap(values, np.repeat(range(12), 8), n_resamples=400, seed=trial)
        n_covered += found.low <= 0.0 <= found.high
    assert 0.86 <= n_covered / 200 <= 0.99


def test_statistics_of_several_columns():
    random = rng("columns")
    x, seeds = random.normal(size=80), np.repeat(range(5), 16)
    y = -x + 0.5 * random.normal(size=80)
    found = cluster_bootstrap((x, y), seeds, lambda a, b: spearmanr(a, b).statistic, n_resamples=300)
    assert found.mean == spearmanr(x, y).statistic
    assert -1.0 <= found.low < found.mean < found.high < -0.5


def test_strata_keep_the_number_of_each_kind():
    random = rng("strata")
    kinds = np.array(["outlandish", "mundane"])[(random.random(60) < 0.1).astype(int)]
    values = random.normal(size=60) + 2.0 * (kinds == "outlandish")
    counts = set()

    def difference(column, kind):
        counts.add(int((kind == "mundane").sum()))
        return np.median(column[kind == "outlandish"]) - np.median(column[kind == "mundane"])

    found = cluster_bootstrap((values, kinds), np.zeros(60), difference, strata=kinds, n_resamples=200)
    assert counts == {int((kinds == "mundane").sum())}
    assert found.low < found.mean < found.high


def test_it_is_a_pure_function_of_its_arguments():
    random = rng("pure")
    values, seeds = random.normal(size=20), np.repeat(range(2), 10)
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    first = cluster_bootstrap(values, seeds, seed=3)
    assert first == cluster_bootstrap(values, seeds, seed=3)
    assert first != cluster_bootstrap(values, seeds, seed=4)
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


def test_what_is_not_a_number_is_left_out():
    found = cluster_bootstrap([1.0, np.nan, 3.0, 5.0], [0, 0, 0, 1])
    assert (found.mean, found.n) == (3.0, 3)
    assert cluster_bootstrap([np.nan], [0]).n == 0
    alone = cluster_bootstrap([2.0, np.nan], [0, 1])
    assert (alone.mean, alone.n) == (2.0, 1)
    assert np.isnan([alone.low, alone.high]).all()


def test_a_statistic_that_most_resamples_lack_has_no_bounds():
    found = cluster_bootstrap(([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]), [0, 0, 0], lambda x, y: spearmanr(x, y).statistic, n_resamples=200)
    assert found.mean == 0.5
    assert np.isnan([found.low, found.high]).all()


def test_arguments_that_do_not_fit():
    with pytest.raises(DataError, match=r"got shapes \[\(2,\), \(3,\)\]. Give one value for each fact"):
        cluster_bootstrap([1.0, 2.0], [0, 0, 1])
    with pytest.raises(DataError, match="must be of one length"):
        cluster_bootstrap([1.0, 2.0], [0, 1], strata=["a"])
    with pytest.raises(DataError, match="must be of one length"):
        cluster_bootstrap(np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(SettingError, match="n_resamples=0; give 1 or more"):
        cluster_bootstrap([1.0, 2.0], [0, 1], n_resamples=0)


# --- partial rank correlation --------------------------------------------------------------------------------------


def test_it_is_the_textbook_formula():
    random = rng("partial")
    x, y, z = random.integers(0, 9, size=(3, 40)).astype(float)  # with ties
    xy, xz, yz = (spearmanr(*pair).statistic for pair in ((x, y), (x, z), (y, z)))
    assert partial_spearman(x, y, z) == pytest.approx((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)))


def test_a_common_cause_is_taken_out_and_a_direct_link_stays():
    random = rng("cause")
    z, noise = random.normal(size=400), random.normal(size=(2, 400))
    x, y = z + 0.3 * noise[0], z + 0.3 * noise[1]
    assert spearmanr(x, y).statistic > 0.8
    assert abs(partial_spearman(x, y, z)) < 0.2
    assert partial_spearman(x, x + 0.1 * noise[1], z) > 0.8
    assert abs(partial_spearman(x, y, np.column_stack([z, random.normal(size=400)]))) < 0.2


def test_nothing_left_is_no_correlation():
    values = np.arange(10.0)
    assert np.isnan(partial_spearman(values, values[::-1], values))
    assert np.isnan(partial_spearman([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [3.0, 1.0, 2.0]))
    assert np.isnan(partial_spearman([1.0, 2.0, 3.0, np.nan], [1.0, 3.0, 2.0, 0.0], [3.0, 1.0, 2.0, 0.0]))
    with pytest.raises(DataError, match="give as many rows of each"):
        partial_spearman([1.0, 2.0], [1.0, 2.0], [1.0])
