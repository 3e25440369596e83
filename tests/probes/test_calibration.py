"""The forecast of priming: a line with an interval that holds, a knee that is found, and every refusal."""

import numpy as np
import pandas as pd
import pytest

from remanence.errors import DataError, SettingError, StateMismatchError
from remanence.probes.calibration import PrimingForecast, calibrate, check_forecast


def facts(n, seed=0, noise=0.2):
    """Priming made of both covariates: improbable keywords prime, unfluent contexts do not."""
    rng = np.random.default_rng(seed)
    log_p, loss = rng.uniform(-14, -1, n), rng.uniform(1, 6, n)
    priming = 0.5 - 0.2 * log_p - 0.3 * loss + noise * rng.standard_normal(n)
    names = [f"f{index}" for index in range(n)]
    return pd.DataFrame({"fact": names, "log_p_before": log_p, "context_loss": loss, "priming_median": priming})


def test_a_fit_finds_both_slopes_and_a_low_probability_forecasts_priming():
    fitted = PrimingForecast.fit(facts(200, noise=0.05))
    assert fitted.slopes == pytest.approx((-0.2, -0.3), abs=0.01)
    rows = pd.DataFrame({"log_p_before": [-12.0, -2.0, -12.0], "context_loss": [2.0, 2.0, 6.0]})
    outlandish, mundane, scrambled = fitted.predict(rows)["predicted"]
    assert outlandish > mundane + 1
    assert outlandish > scrambled + 1


def test_a_straight_line_without_noise_is_predicted_exactly_and_other_columns_stay():
    table = facts(20, noise=0.0)
    predicted = PrimingForecast.fit(table).predict(table)
    assert np.allclose(predicted["predicted"], table["priming_median"])
    assert list(predicted["fact"]) == list(table["fact"])
    assert "predicted" not in table


def test_intervals_cover_new_facts_as_often_as_they_say():
    worlds = [(PrimingForecast.fit(facts(12, seed)), facts(40, 100 + seed)) for seed in range(40)]
    shares = [check_forecast(fitted.predict(new), new, n_resamples=10).coverage for fitted, new in worlds]
    assert 0.92 < np.mean(shares) < 0.98


def test_the_interval_widens_away_from_the_facts_of_the_fit():
    rows = PrimingForecast.fit(facts(12)).predict(pd.DataFrame({"log_p_before": [-7.0, -40.0], "context_loss": [3.0, 3.0]}))
    near, far = rows["predicted_high"] - rows["predicted_low"]
    assert far > 1.5 * near


def test_a_missing_covariate_gives_no_prediction_and_is_left_out_of_the_fit():
    table = facts(30)
    table.loc[0, "context_loss"] = np.nan
    fitted = PrimingForecast.fit(table)
    assert fitted.n == 29
    assert fitted.predict(table)["predicted"].isna().tolist() == [True, *[False] * 29]


def test_a_saved_forecast_comes_back_equal():
    fitted = PrimingForecast.fit(facts(12), source="twelve facts of a test")
    assert PrimingForecast.from_json(fitted.to_json()) == fitted


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"slopes": [1, 2]}', "null"])
def test_other_text_is_no_forecast(text):
    with pytest.raises(StateMismatchError, match="not a saved PrimingForecast"):
        PrimingForecast.from_json(text)


def test_a_forecast_of_another_shape_is_refused():
    broken = PrimingForecast.fit(facts(12)).to_json().replace('"slopes": [', '"slopes": [1.0, ')
    with pytest.raises(StateMismatchError, match="fit one anew"):
        PrimingForecast.from_json(broken)


def test_refusals_of_a_fit():
    with pytest.raises(DataError, match="needs 8 facts or more; 7 of 7 rows"):
        PrimingForecast.fit(facts(7))
    with pytest.raises(DataError, match="do not tell log_p_before and context_loss apart"):
        PrimingForecast.fit(facts(12).assign(context_loss=2.0))
    with pytest.raises(DataError, match="the table lacks context_loss; it has fact, log_p_before, priming_median"):
        PrimingForecast.fit(facts(12).drop(columns="context_loss"))
    with pytest.raises(DataError, match="lacks log_p_before, context_loss; it has no columns"):
        PrimingForecast.fit(facts(12)).predict(pd.DataFrame())


def test_a_check_counts_what_the_intervals_held_and_orders_facts():
    table = facts(40, noise=0.4)
    predicted = PrimingForecast.fit(table).predict(table)
    found = check_forecast(predicted, table)
    assert found.n == 40
    assert found.low < found.spearman < found.high
    assert found.low > 0.5
    shuffled = table.assign(priming_median=np.random.default_rng(1).permutation(table["priming_median"]))
    null = check_forecast(predicted, shuffled)
    assert null.low < 0 < null.high
    assert check_forecast(predicted, table) == found


def test_a_constant_prediction_has_no_rank_correlation():
    table = facts(10)
    flat = table.assign(predicted=1.0, predicted_low=0.0, predicted_high=2.0)
    assert np.isnan(check_forecast(flat, table)[1:4]).all()


def test_refusals_of_a_check():
    table = facts(12)
    predicted = PrimingForecast.fit(table).predict(table)
    with pytest.raises(DataError, match="2 facts stand in both tables"):
        check_forecast(predicted, table.head(2))
    with pytest.raises(DataError, match="fact 'f0' has several rows; give one step"):
        check_forecast(predicted, pd.concat([table, table]))
    with pytest.raises(DataError, match="lacks predicted, predicted_low, predicted_high"):
        check_forecast(table, table)


def bent(n, place, seed=0, noise=0.15):
    rng = np.random.default_rng(seed)
    log_p = rng.uniform(-14, -1, n)
    priming = 0.1 - 0.3 * np.minimum(log_p - place, 0) + noise * rng.standard_normal(n)
    return pd.DataFrame({"log_p_before": log_p, "priming_median": priming})


def test_the_knee_is_found_with_an_interval_around_it():
    knee = calibrate(bent(48, -6.9))
    assert knee.low < -6.9 < knee.high
    assert knee.high - knee.low < 4
    assert knee.slope_below == pytest.approx(-0.3, abs=0.06)
    assert knee.slope_above == pytest.approx(0, abs=0.06)
    assert knee.threshold == pytest.approx(np.exp(knee.log_p))
    assert knee.gain > 0.5
    assert calibrate(bent(48, -6.9)) == knee


def test_a_straight_relation_gains_nothing_by_a_bend_and_has_a_wide_interval():
    knee = calibrate(facts(48).assign(context_loss=0.0))
    assert knee.gain < 0.2
    assert knee.high - knee.low > 4


def test_refusals_of_a_calibration():
    with pytest.raises(DataError, match="a threshold needs 24 facts or more; 23 of 23 rows"):
        calibrate(bent(23, -7))
    with pytest.raises(SettingError, match="n_resamples=0 must be above 0"):
        calibrate(bent(24, -7), n_resamples=0)
    with pytest.raises(DataError, match="5 different values of log_p_before"):
        calibrate(bent(30, -7).assign(log_p_before=lambda table: np.arange(len(table)) % 5))
