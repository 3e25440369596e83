"""The acceptance benchmark's own parts: its recipe, its re-derived formulas, its gates; and what the ledger quotes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from benchmark_files import load

from remanence.probes import metrics
from remanence.recipe import read_recipe
from remanence.streams import digits, split_classes

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def cases():
    return load("continual_cases")


@pytest.fixture(scope="module")
def benchmark(cases):
    return load("continual")


def test_metrics_gate_holds_and_can_fail(cases, monkeypatch):
    assert cases.check_metrics().passed
    monkeypatch.setattr(metrics, "forgetting_first", metrics.forgetting_step)
    assert not cases.check_metrics().passed


def test_the_three_forgettings_differ_where_a_task_gains(cases):
    rows = cases.GAIN.tolist()
    values = [cases.mammoth_forgetting(rows), cases.avalanche_forgetting(rows), cases.coda_forgetting(rows)]
    assert values == pytest.approx([0.2, 0.05, -0.025])


def test_prototype_gates_hold(cases, tiny_vit, tasks):
    gates = cases.check_prototypes(tiny_vit, list(tasks), n_orders=2)
    assert [gate.passed for gate in gates] == [True, True]


def test_shuffled_labels_keep_their_counts_and_spare_the_test_rows(cases):
    source = digits()
    other = cases.shuffled(source, 3)
    assert (other.labels[source.is_test] == source.labels[source.is_test]).all()
    assert np.array_equal(other.labels.sort().values, source.labels.sort().values)
    assert 0.05 < (other.labels == source.labels)[~source.is_test].double().mean() < 0.15


def test_tuning_never_reaches_test_rows(cases):
    split = split_classes(digits(), valid_share=0.2)
    tests = {number for event in split for number in event.task.test.ids.tolist()}
    for event in cases.on_valid(split):
        assert not tests & set(event.task.test.ids.tolist())
        assert event.task.valid is None


def test_tuning_gives_every_learner_the_same_rates(benchmark):
    recipe = benchmark.tuning_recipe(read_recipe(FOLDER / "continual.yaml"))
    rates = {}
    for name, call in recipe.tree["learners"].items():
        rates.setdefault(name.split(" lr ")[0], set()).add(call.get("lr"))
    assert {frozenset(values) for values in rates.values()} == {frozenset(benchmark.RATES), frozenset({None})}
    assert recipe.seeds[0] not in read_recipe(FOLDER / "continual.yaml").seeds


MISSED = {
    *(("M4", "head"), ("M4", "head + class token"), ("M9", "post-norm, copy"), ("G4", "mundane")),
    *(("H1", "ProtoNet"), ("H3", "large"), ("H3", "logits only"), ("H6", "gain with one"), ("H7", "for another")),
    *(("H2", "ProtoNet"), ("H5", "MAML"), ("C3", "ConstPN"), ("C4b", "NoCarry"), ("C6", "trained on 1 to 10")),
    ("A1", "Transformer-XL"),
}
"""Scientific bars that the committed run missed: (row, rival). LEDGER.md calls each of them not reproduced."""


def test_committed_results_passed_every_gate_but_the_known_ones_and_name_no_place():
    for path in sorted((FOLDER / "results").glob("*.json")):
        text = path.read_text(encoding="utf-8")
        result = json.loads(text)
        assert result["command"].startswith("python benchmarks/")
        assert result["environment"]["commit"] not in ("", "unknown")
        failed = {(gate["row"], gate["criterion"].split(":")[0].split(" - ")[1]) for gate in result.get("gates", []) if not gate["passed"]}
        assert failed <= MISSED, "exactness and cost must hold; a scientific bar may be missed when the ledger says so"
        assert failed or result.get("passed", True)
        assert not re.search(r'"/(work|tmp|home|root)/', text)


def _result(name):
    return json.loads((FOLDER / "results" / f"{name}.json").read_text(encoding="utf-8"))


def _value(stream, learner, metric):
    row = next(row for row in _result("continual")["rows"] if (row["stream"], row["learner"]) == (stream, learner))
    return "{mean:.1f} [{low:.1f}, {high:.1f}]".format(**{name: 100 * row[metric][name] for name in ("mean", "low", "high")})


def _difference(name):
    found = _result("continual")["differences"][name]
    return "{mean:+.1f} [{low:+.1f}, {high:+.1f}]".format(**{name: 100 * found[name] for name in ("mean", "low", "high")})


def _overhead(row):
    return "{ratio:.4f} [{ratio_low:.4f}, {ratio_high:.4f}]".format(**_result("harness_overhead")["rows"][row])


def _seen(part):
    return [gate["seen"] for gate in _result("continual")["gates"] if gate["row"] == part]


def _memory(part):
    return _result("memory_tokens")["parts"][part]


def _points(value, sign="+"):
    low, high = value["low"], value["high"]
    return f"{100 * value['mean']:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def _memory_minus(*others):
    return [_points(_memory("M4")["differences"][f"memory M=5 - {other}"]) for other in others]


def _memory_at(rate):
    return [_points(_memory("M4")["at_equal_rates"][f"memory M=5 - {other} @ {rate}"]) for other in ("head", "head + class token")]


def _memory_seen(part, word=""):
    return [gate["seen"] for gate in _memory(part)["gates"] if word in gate["criterion"]]


def _facts(row, word=""):
    return [gate["seen"] for gate in _result("facts")["gates"] if gate["row"] == row and word in gate["criterion"]]


def _hyper(row, word=""):
    found = [gate for gate in _result("hypertransformer")["gates"] if gate["row"] == row and word in gate["criterion"]]
    return [gate["seen"].split(" (")[0] for gate in found]


def _seen_in(name, word):
    return [gate["seen"].split(" (")[0] for gate in _result(name)["gates"] if word in gate["criterion"]]


def _melodi(row, word=""):
    found = [gate for gate in _result("melodi")["gates"] if gate["row"] == row and word in gate["criterion"]]
    return [gate["seen"].split(" (")[0] for gate in found]


def _tracing():
    return "{ratio:.3f} [{ratio_low:.3f}, {ratio_high:.3f}]".format(**_result("fact_tracing")["training"])


QUOTED = {
    "Fine-tuning on a stream": lambda: [_value("in turn", "fine-tuning", metric) for metric in ("average_accuracy", "forgetting_first")],
    "The same learner on the union": lambda: [_value("all at once", "joint", "average_accuracy")],
    "A small replay buffer": lambda: [_difference("replay - fine-tuning"), _difference("replay of one - fine-tuning")],
    "Without task names, EWC": lambda: [_difference("EWC - fine-tuning"), _value("in turn", "EWC", "average_accuracy")],
    "Class means on frozen features": lambda: _seen("C3"),
    "One adapter and head per task": lambda: [
        _value("told", "LoRA per task", metric) for metric in ("forgetting_first", "average_accuracy")
    ],
    "The harness costs": lambda: [_overhead("no probes (gated)"), _overhead("accuracy every 19 steps")],
    "Memory tokens under the mask": lambda: _memory_seen("M1"),
    "Memory tokens beat a head": lambda: [*_memory_minus("head", "head + class token"), *_memory_at("0.01"), *_memory_at("0.03")],
    "Beyond five memory tokens": lambda: _memory_minus("memory M=20"),
    "At equal trainable parameters": lambda: _memory_minus("LoRA rank 1", "VPT-deep M=5", "full fine-tuning"),
    "Memories trained apart": lambda: [_points(_memory("M5")["points_lost_by_first"][mask], "") for mask in ("table", "none")],
    "A task taken out": lambda: _memory_seen("M5", "middle of three"),
    "Many tasks in one pass": lambda: _memory_seen("M6"),
    "Memory does not transfer": lambda: [_points(_memory("M8")["extension - concatenation"])],
    "Facts that contradict what a model knows prime": lambda: _facts("G2"),
    "The keyword's probability": lambda: [
        *(seen for word in ("<=", "the same", "theme") for seen in _facts("G3", word)), *_facts("G8", "permuted")
    ],
    "Facts that contradict what a model knows last": lambda: [*_facts("G4", "outlandish - mundane: "), *_facts("G4", "scrambled")],
    "Ignoring the largest changes of": lambda: [*_facts("G5", "embeddings"), *_facts("G5", "_top 8 %"), *_facts("G5", "100 clean")],
    "Ignoring the largest changes inside": lambda: _facts("G6"),
    "A stepping stone": lambda: [*_facts("G7", "plain at P = 0.5"), *_facts("G7", "filler at P = 0.5 after its own")],
    "At equal memory a sparse update": lambda: _facts("E4"),
    "Tracing 100 facts": lambda: [_tracing()],
    "Several injection runs": lambda: [f"{_result('facts_together')['difference']:.1e}"],
    "One pass that writes a small CNN": lambda: _hyper("H1"),
    "At equal CPU time it is not worse": lambda: _hyper("H2"),
    "The smaller the CNN": lambda: _hyper("H3"),
    "One pass beats five steps": lambda: _hyper("H5"),
    "Unlabelled images help": lambda: _hyper("H6"),
    "The written kernels depend": lambda: _hyper("H7"),
    "Written weights remember": lambda: _hyper("C1"),
    "A continual HyperTransformer does not forget": lambda: _hyper("C2"),
    "It beats a constant embedding": lambda: _hyper("C3"),
    "Carrying weights helps": lambda: _hyper("C4b"),
    "Later examples of the same classes": lambda: _hyper("C5"),
    "It goes on beyond the tasks": lambda: _hyper("C6"),
    "A task costs one pass": lambda: _hyper("C7"),
    "Many tasks in one call": lambda: _hyper("speed"),
    "A compressed memory reads": lambda: _melodi("A1", "- Transformer-XL"),
    "It equals a Memorizing Transformer": lambda: [*_melodi("A1", "1.01 x"), *_melodi("A1", "memory: at most")],
    "Its memory carries bindings": lambda: _melodi("A2"),
    "Short-term and long-term memory": lambda: _melodi("A3"),
    "A window costs the same": lambda: [*_melodi("A5", "time per window"), *_melodi("A5", "resident memory")],
    "A pretrained language model can": lambda: _seen_in("melodi_attach", "below 0"),
    "Reading on takes no memory": lambda: _seen_in("melodi_stream", "resident memory"),
}


def test_the_ledger_quotes_the_result_files():
    lines = [line for line in (ROOT / "LEDGER.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")][2:]
    assert len(lines) == len(QUOTED)
    for line, (claim, quoted) in zip(lines, QUOTED.items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == 6
        assert cells[0].startswith(claim)
        assert [figure for figure in quoted() if figure not in cells[4]] == []
