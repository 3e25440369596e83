"""The parts of the speed benchmark: turns, drift, gates that hold and fail, a tiny run of everything, and a package that is missing."""

import json
from types import SimpleNamespace

import pytest
from benchmark_files import load

IN_ORDER = (
    "continual_cases", "hypertransformer_cells", "melodi_arms", "melodi_cells", "melodi_sizes", "melodi_speed_readers",
    "melodi_speed_rival", "melodi_speed",
)  # fmt: skip
BODY = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
MELODI = {"short": 2, "long_per_window": 1, "long_windows": 2, "long_layers": [1]}


@pytest.fixture(scope="module")
def files():
    return SimpleNamespace(**{name.removeprefix("melodi_"): load(name) for name in IN_ORDER})


@pytest.fixture(scope="module")
def plan(files):
    return files.speed_readers.Plan(
        lengths=(16, 32, 48), compared=(16, 48), rows=2, segment=16, rounds=1, block=1, train_rounds=1, train_block=1, window=8, body=BODY
    )


@pytest.fixture(scope="module")
def measured(files, plan):
    arms = {"melodi": files.arms.Arm("MelodiLM", MELODI), "transformer-xl": files.arms.Arm("TransformerXL", {"cache": 8})}
    return files.speed.measure(plan, arms)


def test_every_reader_is_timed_at_everything(files, measured):
    figures, _ = measured
    json.dumps(figures, allow_nan=False)
    trained, reads = figures["training, tokens per second"], figures["reading, tokens per second by tokens read before"]
    assert set(trained) >= {"melodi", "transformer-xl", files.speed.BY_WINDOW}
    assert set(trained["melodi"]) == {"float32", "bfloat16 products"}
    assert set(reads["transformer-xl"]) == {"16", "48", "16, bfloat16 products"}
    assert set(figures["writing, ms per token"]["melodi"]) == {f"{n} read, {rows} rows" for n in (16, 48) for rows in (1, 2)}
    assert set(figures["one call's gain over a call for each window"]) == {
        "training, tokens per second: float32",
        "training, tokens per second: bfloat16 products",
        "reading, tokens per second by tokens read before: 16",
    }


def test_the_state_has_the_same_bytes_at_every_length(measured):
    figures, gates = measured
    sizes = figures["MELODI along a document"]["bytes of the state"]
    assert sizes["16"] == sizes["32"] == sizes["48"]
    assert sizes["16"]["kv"] == 4 * (3 * 2 * 8 + 2 * 1 * 2 * 8)
    assert [gate.row for gate in gates] == ["A5"] * 3
    assert gates[1].passed


def test_a_call_is_timed_from_where_its_length_was_read(files, plan):
    reader = files.speed.Reader(files.arms.Arm("MelodiLM", MELODI), plan)
    reader.read_document(plan.lengths, plan.segment)
    assert {length: state.n_tokens.tolist() for length, state in reader.states.items()} == {16: [16], 32: [32], 48: [48]}
    assert reader.at(32, 2).n_windows.tolist() == [4, 4]
    before = reader.at(32, 2).short
    reader.reading(32)()
    write = reader.writing(32, 2)
    for _ in range(9):
        write()
    assert reader.at(32, 2).short.equal(before), "what was read is the start of every call that is timed"


def test_rivals_take_turns_and_first_calls_do_not_count(files, monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(files.speed.time, "perf_counter", lambda: now[0])

    def call(name, first, later):
        def run():
            now[0] += first if not calls or calls[-1] != name else later
            calls.append(name)

        return run

    times = files.speed.take_turns({"a": call("a", 9.0, 1.0), "b": call("b", 9.0, 2.0)}, rounds=2, block=2)
    assert "".join(calls) == "aaabbbaaabbb"
    assert times == {"a": [[1.0, 1.0]] * 2, "b": [[2.0, 2.0]] * 2}
    assert files.speed.rates(times, 4) == {"a": 4, "b": 2}


def test_drift_is_told_from_a_machine_that_grows_slower(files):
    slower = {8: [[1.0], [2.0], [3.0]], 16: [[1.0], [2.0], [3.0]], 32: [[1.0], [2.0], [3.0]]}
    assert files.speed.drift(slower) == {8: 0.0, 16: 0.0, 32: 0.0}
    longer = {8: [[1.0], [2.0]], 16: [[1.0], [2.0]], 32: [[1.2], [2.4]]}
    assert files.speed.drift(longer)[32] == pytest.approx(0.2)


@pytest.mark.parametrize(("late", "passed"), [(0.04, True), (0.06, False), (-0.06, False)])
def test_the_time_of_a_window_must_stay(files, late, passed):
    assert files.speed.drift_gate({8: 0.0, 16: late}, "8 to 16 tokens").passed is passed


@pytest.mark.parametrize(("late", "passed"), [(40, True), (41, False)])
def test_the_bytes_of_the_state_must_stay(files, late, passed):
    sizes = {16: {"kv": 8, "all": 40}, 32: {"kv": 8, "all": late}}
    assert files.speed.bytes_gate(sizes, "16 to 32 tokens").passed is passed


@pytest.mark.parametrize(("late", "passed"), [(1009, True), (1011, False)])
def test_resident_memory_must_stay(files, late, passed):
    assert files.speed.resident_gate([1000, 1000, late], "16 to 32 tokens").passed is passed


def test_resident_memory_that_the_system_does_not_tell_is_no_failure(files):
    assert files.speed.resident_gate([0, 0], "16 to 32 tokens").passed


# --- the other package -------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_said_and_not_fatal(files, plan, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(files.speed_rival, "import_module", missing)
    reader, said = files.speed_rival.TheirReader.of(plan)
    assert reader is None
    assert said["unavailable"].startswith("ImportError: No module named 'memorizing_transformers_pytorch'. To time it: pip install")


def test_what_the_package_cannot_do_stands_in_the_table(files):
    def fails():
        raise TypeError("Got unsupported ScalarType BFloat16")

    table = {}
    name = files.speed_rival.NAME
    left = files.speed.working({"melodi": fails, name: fails}, "bfloat16 products", table)
    assert list(left) == ["melodi"], "our own failures are not hidden"
    assert table == {(name, "bfloat16 products"): "fails: TypeError: Got unsupported ScalarType BFloat16"}


def test_the_package_reads_writes_and_trains(files, plan):
    pytest.importorskip("memorizing_transformers_pytorch", reason="memorizing-transformers-pytorch is not installed; it is optional")
    reader, said = files.speed_rival.TheirReader.of(plan)
    assert set(said) == {"version", "faiss-cpu"}
    before = [parameter.clone() for parameter in reader.model.parameters()]
    reader.training(16, autocast=False)()
    assert any(not old.equal(new) for old, new in zip(before, reader.model.parameters(), strict=True))
    reader.reading(16)()
    reader.writing(16, 1)()
    assert set(reader.memories) == {1, 2}


def test_a_quick_run_judges_nothing(files, measured, monkeypatch):
    monkeypatch.setattr(files.speed, "measure", lambda plan: measured if plan == files.speed.QUICK else ({}, [1]))
    size = files.sizes.Size("books", **files.sizes.QUICK)
    assert files.speed.judge(None, size) == (measured[0], [])
    assert files.speed.judge(None, files.sizes.Size("books")) == ({}, [1])
