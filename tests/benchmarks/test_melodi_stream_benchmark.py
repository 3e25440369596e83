"""The streaming benchmark's own parts: its gates hold on a short document, and each can fail."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmark_files import load

from remanence.environment import resident_bytes


@pytest.fixture(scope="module")
def benchmark():
    load("continual_cases")
    return load("melodi_stream")


@pytest.fixture(scope="module")
def found(benchmark, tmp_path_factory):
    """A short document, read as the benchmark reads a long one."""
    if resident_bytes() is None:
        pytest.skip("this system does not tell the resident memory of a process")
    model = benchmark.tiny_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "WARM", 5000)
        patch.setattr(benchmark, "python_sources", lambda: type("Source", (), {"train": ("def f(): pass\n" * 300,)}))
        reading, restored, watch = benchmark.read(model, 20_000, tmp_path_factory.mktemp("stream"))
    return benchmark.begin_reading(model), reading, restored, watch


def test_every_token_is_read_once_and_memory_is_seen_after_each_call(found):
    _, reading, restored, watch = found
    assert reading.n_tokens == restored.n_tokens == 20_000
    assert len(watch.seen) == 20 - 4
    assert len(watch.tenths) == 10
    assert watch.tenths[-1]["n_tokens"] == 20_000


def test_gates_hold_and_each_can_fail(benchmark, found):
    begun, reading, restored, watch = found

    def verdicts(**changes):
        now = {"reading": reading, "restored": restored, "watch": watch, "begun": begun} | changes
        return [gate.passed for gate in benchmark.judge(**now)]

    assert verdicts()[1:] == [True, True]
    flat, grown = benchmark.Watch(10), benchmark.Watch(10)
    flat.seen, grown.seen = [1000, 1010, 990], [1000, 1011]
    assert verdicts(watch=flat) == [True, True, True]
    assert verdicts(watch=grown) == [False, True, True]
    wide = replace(begun, state=replace(begun.state, tail=torch.cat([begun.state.tail, begun.state.tail], 1)))
    assert verdicts(watch=flat, begun=wide) == [True, False, True]
    other = replace(restored, state=replace(restored.state, short=restored.state.short + 1e-7))
    assert verdicts(watch=flat, restored=other) == [True, True, False]
    assert verdicts(watch=flat, restored=replace(restored, nats=restored.nats + 1e-9)) == [True, True, False]


def test_committed_figures_are_of_ten_million_tokens_and_passed():
    result = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "melodi_stream.json").read_text(encoding="utf-8"))
    assert result["n_tokens"] == 10_000_000
    assert result["passed"]
    assert result["resident_bytes_most"] <= 1.01 * result["resident_bytes_warm"]
