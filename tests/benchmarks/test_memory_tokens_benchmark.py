"""The memory-token benchmark's own parts: its reference, its fairness, its gates, and how its file is put together."""

import json
from pathlib import Path

import pytest
import torch
from benchmark_files import load

FOLDER = Path(__file__).parents[2] / "benchmarks"
PARTS = ("arms", "reference", "exact", "joining", "cost", "learning")
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


@pytest.fixture(scope="module")
def parts():
    """Every file of the benchmark by its last name; loaded in the order of their imports."""
    load("continual_cases")
    return {part: load(f"memory_tokens_{part}") for part in PARTS}


@pytest.fixture(scope="module")
def benchmark(parts):
    return load("memory_tokens")


@pytest.fixture
def exact(parts):
    return parts["exact"]


def test_side_stream_equals_the_reference_and_a_mutation_is_noticed(exact, monkeypatch):
    monkeypatch.setattr(exact, "SHAPES", {"digits (D 64, L 4, n 17)": TINY})
    _, gates = exact.against_the_mask(True)
    assert [gate.passed for gate in gates] == [True, True, True]
    # a reference that lets the backbone see new tokens everywhere must fail the gate of M2's rival, M3
    real = exact.masked_pass
    monkeypatch.setattr(exact, "masked_pass", lambda memory, pixels, mask: real(memory, pixels, "table"))
    assert [gate.passed for gate in exact.against_the_mask(True)[1]] == [True, True, False]


@pytest.mark.parametrize("mask", ["new sees new", "none"])
def test_reference_differs_under_every_other_mask(exact, parts, mask):
    model = exact.classifier(TINY)
    memory, pixels = exact.with_graph(model), exact.images(model, 2)
    masked_pass = parts["reference"].masked_pass
    table, other = masked_pass(memory, pixels, "table"), masked_pass(memory, pixels, mask)
    assert max(float((table.logits[name] - other.logits[name]).abs().max()) for name in memory.tasks) > 1e-3


def test_old_answers_are_counted_equal_and_a_moved_backbone_is_noticed(exact, monkeypatch):
    equal, moved = exact._count_equal(exact.classifier(TINY), {1, 20}, (1, 7))
    assert equal == [True] * 4
    assert moved
    train = exact.train_briefly

    def careless(memory, name, pixels):
        train(memory, name, pixels)
        with torch.no_grad():
            memory.view.final_norm.bias += 1e-6

    monkeypatch.setattr(exact, "train_briefly", careless)
    assert not all(exact._count_equal(exact.classifier(TINY), {20}, (1,))[0])


def test_table_of_the_paper_would_be_missed_if_the_print_changed(exact, monkeypatch):
    assert exact.tables_agree()
    monkeypatch.setattr(exact.MemoryViT, "mask_table", lambda self: "a b c d e\nyes yes - - -\n" * 2)
    assert not exact.tables_agree()


def test_every_arm_has_four_rates_and_equal_steps(parts, tiny_vit):
    arms = parts["arms"]
    assert {len(set(arms.rates_of(arm))) for arm in arms.ALL_ARMS} == {4}
    n_steps = set()
    for arm in arms.ARMS:
        learner = arms.make(arm, tiny_vit, 675, 0, 1e-2)
        n_steps.add((learner.epochs, learner.batch_size))
    assert n_steps == {(28, 64)}


def test_tuning_reads_no_test_row(parts):
    final, tuning = parts["arms"].task_of("digits"), parts["arms"].task_of("digits", on_valid=True)
    assert not set(tuning.test.ids.tolist()) & set(final.test.ids.tolist())
    assert set(tuning.test.ids.tolist()) <= set(final.train.ids.tolist())
    assert parts["arms"].TUNING_SEED not in range(10)


def test_backbone_saw_neither_class_nor_row_of_the_new_task(parts):
    arms = parts["arms"]
    old, new = arms.source_of("digits", "old"), arms.task_of("digits")
    assert not set(old.classes) & set(new.classes)
    assert not set(old.ids.tolist()) & set(new.test.ids.tolist())


def test_few_draws_the_asked_number_of_each_class_anew_for_every_seed(parts):
    arms = parts["arms"]
    first, second = (arms.few_of(arms.task_of("digits"), 20, seed) for seed in (0, 1))
    assert torch.bincount(first.train.targets)[5:].tolist() == [20] * 5
    assert set(first.train.ids.tolist()) != set(second.train.ids.tolist())


def test_paired_difference_by_hand(parts):
    found = parts["learning"].paired([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    assert found["mean"] == pytest.approx(2)
    assert found["standard_error"] == pytest.approx(3**-0.5)
    assert found["one_sided_low"] == pytest.approx(2 - 2.919986 * 3**-0.5, abs=1e-5)


def test_gates_of_the_comparison_can_fail(parts):
    learning = parts["learning"]
    sizes = {learning.OURS: 1000, "VPT-deep M=5": 900, "LoRA rank 1": 790}
    rows = [{"arm": arm, "trainable_parameters": size} for arm, size in sizes.items()]
    assert not learning.size_gate({"rows": rows}, "M4").passed
    rows[2]["trainable_parameters"] = 1190
    value = {"mean": 0.02, "standard_error": 0.005, "low": 0.01, "high": 0.03, "n": 10.0}
    none = value | {"mean": 0.01}
    control = {"mean": 0.31, "low": 0.3, "high": 0.32}
    differences = {f"{learning.OURS} - head": value, f"{learning.OURS} - head + class token": none}
    part = {"rows": rows, "differences": differences, "shuffled_labels": control}
    assert [gate.passed for gate in learning.digits_gates(part, judged=True)] == [True, True, False, False]


def test_cost_law_fails_for_a_pass_that_grows_too_fast(parts):
    cost = parts["cost"]
    found = {"base": 1.0, "T=1": 1.1, "T=4": 1.2, "separate": 4.4}
    rows = cost._rows({name: {"seconds": seconds, "flops": 1.0} for name, seconds in found.items()}, 50)
    assert [gate.passed for gate in cost._gates(rows)] == [True, True]
    found |= {"T=1": 1.2, "T=4": 2.5}
    rows = cost._rows({name: {"seconds": seconds, "flops": 1.0} for name, seconds in found.items()}, 50)
    assert [gate.passed for gate in cost._gates(rows)] == [False, False]


def test_cost_is_measured_with_the_base_and_the_separate_passes_in_turn(parts, monkeypatch):
    cost = parts["cost"]
    memory = cost.build(TINY, 4)
    calls = cost.contenders(memory, cost.images(memory.model, 2))
    found = cost.measure(calls, memory, 2)
    assert list(found) == ["base", "T=1", "T=4", "separate"]
    assert found["base"]["flops"] < found["T=1"]["flops"] < found["T=4"]["flops"] < found["separate"]["flops"]


def _part(passed):
    return lambda quick, jobs: ({"seeds": [0]}, [load("continual_cases").Gate("M1", "holds", "seen", passed)])


def test_parts_are_merged_into_one_file_and_a_failing_gate_ends_with_one(benchmark, monkeypatch, tmp_path, capsys):
    path = tmp_path / "result.json"
    monkeypatch.setitem(benchmark.PARTS, "M6", _part(True))
    monkeypatch.setitem(benchmark.PARTS, "M1", _part(True))
    assert benchmark.main(["--only", "M6", "--out", str(path)]) == 0
    assert benchmark.main(["--only", "M1", "--out", str(path)]) == 0
    assert list(json.loads(path.read_text())["parts"]) == ["M1", "M6"]
    monkeypatch.setitem(benchmark.PARTS, "M6", _part(False))
    assert benchmark.main(["--only", "M6", "--out", str(path)]) == 1
    result = json.loads(path.read_text())
    assert [gate["passed"] for gate in result["gates"]] == [True, False]
    assert result["parts"]["M6"]["command"] == "python benchmarks/memory_tokens.py --only M6"
    assert "FAILS" in capsys.readouterr().out


def test_quick_leaves_the_committed_figures_alone(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "RESULT", tmp_path / "result.json")
    monkeypatch.setitem(benchmark.PARTS, "M1", _part(True))
    assert benchmark.main(["--only", "M1", "--quick"]) == 0
    assert not benchmark.RESULT.exists()


def test_the_interval_of_one_seed_becomes_null(benchmark):
    found = {"rows": [(0.5, float("nan"))], "n": 1, "gates": []}
    assert benchmark.plain(found) == {"rows": [[0.5, None]], "n": 1, "gates": []}
