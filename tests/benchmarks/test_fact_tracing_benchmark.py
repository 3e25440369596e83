"""Both sides of the tracing benchmark train alike, and each of its limits can fail."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def tracing():
    if "fact_tracing" not in sys.modules:
        spec = importlib.util.spec_from_file_location("fact_tracing", FOLDER / "fact_tracing.py")
        sys.modules["fact_tracing"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["fact_tracing"])
    return sys.modules["fact_tracing"]


@pytest.fixture
def small(tracing, monkeypatch):
    for name, value in (("BLOCK", 2), ("BATCH", 2), ("LENGTH", 12)):
        monkeypatch.setattr(tracing, name, value)
    return tracing.Size(8, 1)


def test_both_sides_end_with_the_same_weights(tracing, small, tmp_path):
    row = tracing.race(small, 2, tmp_path)
    assert row["same_weights"]
    assert row["pairs"] == 2
    assert row["bound"] > row["ratio"] > 0
    assert (tmp_path / "trace.jsonl").exists()


def test_a_tracer_that_changes_weights_would_be_noticed(tracing, small, tmp_path, monkeypatch):
    step = tracing.FactTracer.step

    def meddle(self, model, *rest):
        model.lm_head.weight.data.mul_(1.01)
        return step(self, model, *rest)

    monkeypatch.setattr(tracing.FactTracer, "step", meddle)
    assert not tracing.race(small, 1, tmp_path)["same_weights"]


LIMITS = [(1.04, True, 0.1, 0), (1.06, True, 0.1, 1), (1.04, False, 0.1, 1), (1.04, True, 0.3, 1)]


@pytest.mark.parametrize(("bound", "same", "alone", "code"), LIMITS)
def test_exit_code_follows_the_limits(tracing, monkeypatch, tmp_path, capsys, bound, same, alone, code):
    names = ("plain_ms_per_step", "probe_ms", "ratio", "ratio_low", "ratio_high", "wall_ratio", "pairs", "parameters")
    row = dict.fromkeys(names, 1.0) | {"bound": bound, "same_weights": same}
    monkeypatch.setattr(tracing, "race", lambda *_: row)
    monkeypatch.setattr(tracing, "probe_seconds", lambda *_: alone)
    assert tracing.main(["--quick", "--out", str(tmp_path / "result.json")]) == code
    assert json.loads((tmp_path / "result.json").read_text())["passed"] == (code == 0)
    assert ("DOES NOT HOLD" in capsys.readouterr().out) == (code == 1)
