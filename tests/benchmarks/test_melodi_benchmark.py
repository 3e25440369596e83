"""The parts of the MELODI benchmark: the recall task, its curriculum, resuming cells, and gates that hold and fail."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmark_files import load

IN_ORDER = ("continual_cases", "hypertransformer_cells", *(f"melodi_{part}" for part in ("arms", "cells", "sizes", "recall", "language")))


@pytest.fixture(scope="module")
def files():
    found = {name.removeprefix("melodi_"): load(name) for name in (*IN_ORDER, "melodi_gates", "melodi_experiments", "melodi")}
    return SimpleNamespace(**found)


# --- the recall task -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0, 1, 5])
def test_window_0_holds_the_answers_and_nothing_else_does(files, gap):
    task = files.recall
    tokens, answers, places = task.samples(64, gap, "test")
    assert tokens.shape == (64, task.WINDOW * (gap + 2))
    first, rest = tokens[:, : task.WINDOW], tokens[:, task.WINDOW :]
    is_pair = first < task.NOISE
    assert (is_pair.sum(1) == task.N_PAIRS).all()
    assert (rest >= task.NOISE).all()
    assert (tokens < task.ANSWER).all(), "an answer is never an input"
    keys, values = (part.view(64, -1) for part in divmod_of(first[is_pair], task.N_VALUES))
    asked = tokens.gather(1, places) - task.ASKED
    told = (asked[:, :, None] == keys[:, None]).long()
    assert (told.sum(-1) == 1).all(), "every key asked for was written once"
    assert torch.equal((told * values[:, None]).sum(-1) + task.ANSWER, answers)
    assert (places >= task.WINDOW * (gap + 1)).all()
    assert (asked.sort(1).values.diff(dim=1) == 0).any(), "keys are drawn with replacement"


def divmod_of(tokens, n):
    return tokens // n, tokens % n


def test_samples_depend_on_their_key_alone(files):
    first, second, other = (files.recall.samples(4, 1, *key) for key in (("a", 1), ("a", 1), ("a", 2)))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not torch.equal(first.tokens, other.tokens)


def test_chance_levels(files):
    task = files.recall
    made = task.samples(20_000, 0, "test")
    table = torch.stack([made.answers == task.ANSWER + value for value in range(task.N_VALUES)], -1).double().mean((0, 1))
    assert table.tolist() == pytest.approx([task.CHANCE] * task.N_VALUES, abs=0.01)
    pairs = made.tokens[:, : task.WINDOW]
    values = (pairs[pairs < task.NOISE] % task.N_VALUES).view(-1, task.N_PAIRS)
    most_frequent = values.mode(1).values[:, None] + task.ANSWER
    assert (made.answers == most_frequent).double().mean().item() == pytest.approx(task.UNBOUND, abs=0.01)
    assert abs(task.UNBOUND - 0.453) < 1e-3


class Oracle(torch.nn.Module):
    """Reads the pairs from the tokens; answers with the sample's first value where it is not allowed to know the keys."""

    def __init__(self, task, binds):
        super().__init__()
        self.task, self.binds = task, binds

    def forward(self, tokens):
        task = self.task
        is_pair = tokens < task.NOISE
        pairs = tokens[is_pair].view(len(tokens), task.N_PAIRS)
        keys, values = divmod_of(pairs, task.N_VALUES)
        asked = (tokens - task.ASKED)[:, :, None] == keys[:, None]
        found = (asked * values[:, None]).sum(-1) if self.binds else values[:, :1].expand(tokens.shape)
        return torch.nn.functional.one_hot(found + task.ANSWER, task.VOCABULARY).double(), None


def test_accuracy_tells_who_binds_from_who_does_not(files):
    assert set(files.recall.accuracies(Oracle(files.recall, binds=True), 64).values()) == {1.0}
    without = files.recall.accuracies(Oracle(files.recall, binds=False), 256)
    assert set(without) == {str(gap) for gap in files.recall.GAPS}
    assert all(0.35 < value < 0.5 for value in without.values())


def test_the_curriculum_climbs_when_it_is_sure_and_remembers_where_it_was(files):
    curriculum = files.recall.Curriculum(seed=0)
    for step in range(9):
        curriculum.note(0, 1.0, step)
    assert curriculum.stage == 0
    curriculum.note(0, 0.9, 9)
    assert (curriculum.stage, curriculum.began) == (1, [0, 10])
    for step in range(10, 40):
        curriculum.note(0, 1.0, step)  # an easier batch says nothing about this stage
        curriculum.note(1, 0.89, step)
    assert curriculum.stage == 1
    other = files.recall.Curriculum(seed=0)
    other.load(json.loads(json.dumps(curriculum.state())))
    assert other.state() == curriculum.state()


def test_three_batches_in_ten_are_easier(files):
    curriculum = files.recall.Curriculum(seed=0)
    assert {curriculum.gap(step) for step in range(50)} == {0}
    curriculum.stage = len(files.recall.STAGES) - 1
    drawn = [curriculum.gap(step) for step in range(2000)]
    assert set(drawn) == set(range(11))
    assert np.mean([gap < 10 for gap in drawn]) == pytest.approx(0.3, abs=0.04)
    assert drawn[:20] == [curriculum.gap(step) for step in range(20)]


# --- cells ---------------------------------------------------------------------------------------------------------------

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
RECALL_CELL = {"arm": "xl", "model": "TransformerXL", "config": TINY | {"cache": 32}, "seed": 0, "n_test": 4}


def test_a_recall_cell_that_was_killed_ends_as_one_that_was_not(files, tmp_path, monkeypatch):
    monkeypatch.setattr(files.recall, "_CHECKPOINT_STEPS", 2)
    whole = files.recall.recall(tmp_path / "whole", steps=5, **RECALL_CELL)
    files.recall.recall(tmp_path / "part", steps=3, **RECALL_CELL)  # its last checkpoint is of step 2
    resumed = files.recall.recall(tmp_path / "part", steps=5, **RECALL_CELL)
    assert resumed["accuracy"] == whole["accuracy"]
    assert resumed["steps"] == whole["steps"] == 5
    assert set(whole["accuracy"]) == {str(gap) for gap in files.recall.GAPS}


def test_the_rate_falls_along_the_last_steps_and_the_training_ends_with_them(files, tmp_path):
    task = files.recall
    model = files.arms.make("TransformerXL", TINY | {"cache": 32, "window": 32, "vocab_size": task.VOCABULARY}, 0)
    training = task.Training(model, 0, 2000, tmp_path)
    assert training.rate == task.LR / task.WARM_UP
    training.step = 500
    assert (training.rate, training.end) == (task.LR, 2000)
    training.step = 1999
    assert training.rate == pytest.approx(task.LR / task.FINAL)
    training.curriculum.stage, training.curriculum.began = len(task.STAGES) - 1, [0, 700]
    training.step = 1000
    assert (training.rate, training.end) == (task.LR / 2, 1300)
    training.step = 1300
    training.run()
    assert training.step == 1300


def test_a_language_cell_keeps_the_bits_of_every_document(files, tmp_path, monkeypatch):
    texts = [torch.arange(3000) % 7, torch.arange(2000) % 5]
    documents = files.language.Documents(texts, texts, torch.ones(257, dtype=torch.int64))
    monkeypatch.setattr(files.language, "documents", lambda *_: documents)
    settings = {"arm": "xl", "model": "TransformerXL", "config": TINY, "seed": 0, "corpus": "books", "vocabulary": 257}
    settings |= {"n_train_bytes": 0, "n_test_bytes": 0}
    found = files.language.language(tmp_path, steps=2, lr=8e-3, rows=2, segment=64, **settings)
    assert found["n_bytes"] == [3000, 2000]
    assert [len(bits) for bits in found["bits"]] == [3, 2]
    assert len(found["bits_by_place_in_window"]) == 64
    rate = sum(map(sum, found["bits"])) / 5000
    assert 2 < rate < 20
    assert files.gates.bits_per_byte([found]).shape == (1, 2)
    again = files.language.language(tmp_path, steps=2, lr=8e-3, rows=2, segment=64, **settings)
    assert again["bits"] == found["bits"]
    assert again["cpu_seconds_per_step"] is None


def test_a_finished_cell_leaves_its_figures_and_no_checkpoint(files, tmp_path, monkeypatch):
    monkeypatch.setattr(files.recall, "_CHECKPOINT_STEPS", 1)
    cell = files.cells.Cell("recall", RECALL_CELL | {"steps": 1})
    files.cells.run_cell(cell, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{cell.key}.json"]
    assert files.cells.Bench(tmp_path, 1).result(cell)["settings"]["steps"] == 1


def test_equal_cells_of_two_experiments_are_one(files):
    size = files.sizes.Size("books")
    names = ("A0", "A1", "A1-long", "A2", "A3", "A3-once", "A4")
    keys = {name: {cell.key for cell in files.experiments.EXPERIMENTS[name].cells(size)} for name in names}
    assert [len(keys[name]) for name in keys] == [24, 12, 4, 7, 9, 11, 5]
    assert len(keys["A3-once"] & keys["A4"]) == 1, "the full model with one seed"
    assert not keys["A1"] & keys["A3"]


@pytest.mark.parametrize("group", ["COMPARED", "COMPARED_ONCE", "ABLATED", "ABLATED_ONCE", "RECALL", "RECALL_ONCE"])
def test_every_arm_can_be_made(files, group):
    for arm in getattr(files.arms, group).values():
        window = {"window": 32} if group.startswith("RECALL") else {}
        model = files.arms.make(arm.model, arm.config | window, 0)
        assert model.config.num_hidden_layers == 4


def test_memories_are_those_of_the_specification(files):
    arms = files.arms.COMPARED | {"equal": files.arms.COMPARED_ONCE["transformer-xl, equal memory"]}
    floats = {name: files.arms.make(*arm, 0).init_state(1).nbytes("kv") // 4 for name, arm in arms.items()}
    assert list(floats.values()) == [137_216, 65_536, 1_097_728, 131_072]


def test_bits_of_a_token_count_where_it_begins(files):
    bits, n_bytes = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64), torch.tensor([1020, 10, 1000, 30])
    assert files.language.in_bins(bits, n_bytes) == [3.0, 12.0, 0.0]


def test_text_is_cut_into_byte_pairs_of_the_training_side_and_kept(files, tmp_path, monkeypatch):
    import remanence.streams as streams

    eaters = ("Ann", "Bob", "Cid", "Dot", "Eve", "Fay")
    source = streams.TextSource("toy", tuple(f"{name} ate the apple. " * 40 for name in eaters), ("Fin. é",))
    monkeypatch.setattr(streams, "books", lambda: source)
    found = files.language.documents("books", 300, 200, 100, "test", tmp_path)
    assert [int(found.n_bytes[ids].sum()) for ids in found.train] == [200] * 6
    assert int(found.n_bytes[found.test[0]].sum()) == len("Fin. é".encode())
    monkeypatch.setattr(streams, "books", None)  # the second time nothing is read anew
    valid = files.language.documents("books", 300, 200, 100, "valid", tmp_path)
    assert (len(valid.train), len(valid.test)) == (2, 4)


# --- statistics and gates ------------------------------------------------------------------------------------------------


def test_documents_that_seeds_share_are_drawn_with_them(files):
    documents = np.array([-1.0, 1.0, 2.0, -2.0, 0.5, 0.2])
    one, three = files.sizes.bound(documents[None], 0.95), files.sizes.bound(np.repeat(documents[None], 3, 0), 0.95)
    assert one == pytest.approx(three, abs=0.02)
    assert files.sizes.bound(np.full((3, 4), -0.5), 0.95) == pytest.approx(-0.5)
    assert files.sizes.bound(documents[None], 0.05) < documents.mean() < one


def language_result(rate, kv=8, places=64, **changes):
    """Figures of a cell with `rate` bits per byte in each of 8 bins of two documents; the second is half a bit harder."""
    bits = [[(rate + harder) * 1024] * 8 for harder in (0.0, 0.5)]
    return {
        "bits": bits, "n_bytes": [8192, 8192], "bits_by_place_in_window": [rate] * places, "memory_bytes": {"kv": kv, "stored": kv},
        "parameters": 1, "steps": 1, "n_trained_tokens": 1, "cpu_seconds_per_step": 1.0,
    } | changes  # fmt: skip


class Told:
    """A bench whose cells have these figures, by arm."""

    def __init__(self, **results):
        self.results = results

    def result(self, cell):
        found = self.results.get(cell.settings["arm"].replace(" ", "_").replace(",", "").replace("-", "_"), self.results["other"])
        return found(cell.settings) if callable(found) else found


@pytest.mark.parametrize(
    ("melodi", "memorizing", "kv", "passed"),
    [(2.0, 2.0, 8, [True, True, True]), (2.2, 2.3, 8, [False, True, True]), (2.0, 1.9, 9, [True, False, False])],
)
def test_a1_compares_and_weighs(files, melodi, memorizing, kv, passed):
    ours, theirs = language_result(melodi, kv=kv), language_result(memorizing, kv=64)
    bench = Told(melodi=ours, memorizing=theirs, other=language_result(2.1, places=32))
    figures, gates = files.gates.a1(bench, files.sizes.Size("books"))
    assert [gate.passed for gate in gates] == passed
    assert figures["arms"]["melodi"]["bits_per_byte"] == pytest.approx(melodi + 0.25)
    assert figures["differences"]["melodi - windowed"]["mean"] == pytest.approx(melodi - 2.1, abs=1e-4)
    assert figures["gap"]["transformer-xl"]["growth"] == {"mean": 0.0, "lower": 0.0, "upper": 0.0}
    assert files.gates.a1(bench, files.sizes.Size("books", **files.sizes.QUICK))[1] == []


def recall_result(accuracy):
    scores = {str(gap): accuracy(gap) for gap in (0, 1, 2, 4, 8, 10, 12, 16)}
    return {"accuracy": scores, "stages": {"0": 0}, "steps": 1, "cpu_seconds": 1.0, "parameters": 1}


def test_a2_wants_every_seed_and_rivals_at_chance(files):
    forgets = recall_result(lambda gap: 0.95 if gap <= 4 else 0.13)
    never, always = recall_result(lambda gap: 0.125), recall_result(lambda gap: 0.95)
    one_seed = lambda settings: forgets if settings["seed"] == 2 else always  # noqa: E731
    size = files.sizes.Size("books")
    good = files.gates.a2(Told(melodi=always, transformer_xl=forgets, other=never), size)
    assert [gate.passed for gate in good[1]] == [True] * 4
    assert good[0]["arms"]["melodi"]["accuracy"]["16"] == [0.95] * 3
    bad = files.gates.a2(Told(melodi=one_seed, transformer_xl=always, other=forgets), size)
    assert [gate.passed for gate in bad[1]] == [False] * 4


def test_a3_fails_only_when_the_full_model_is_worse_beyond_noise(files):
    noisy = lambda settings: language_result(2.0 + 0.1 * (settings["seed"] - 1))  # noqa: E731
    size = files.sizes.Size("books")
    bench = Told(melodi=noisy, short_only=language_result(1.97), long_only=language_result(1.5), other=language_result(2.0))
    figures, gates = files.gates.a3(bench, size)
    assert [gate.passed for gate in gates] == [True, False]
    assert len(figures["arms"]) == 3
    once, none = files.gates.a3_once(bench, size)
    assert (len(once["arms"]), none) == (11, [])
    better, gates = files.gates.a3(Told(melodi=language_result(1.0), other=noisy), size)
    assert [gate.passed for gate in gates] == [True, True]
    assert better["differences"]["melodi - short only"]["upper"] < 0


def test_a4_is_reported(files):
    figures, gates = files.gates.a4(Told(full_attention=language_result(1.5), other=language_result(2.0)), files.sizes.Size("books"))
    assert gates == []
    assert figures["differences"]["melodi - full attention at 0.008"]["mean"] == pytest.approx(0.5)


def test_positions_and_ends_of_uneven_documents(files):
    result = language_result(1.0, bits=[[1024.0] * 5 + [2 * 476.0]], n_bytes=[5 * 1024 + 476])
    assert files.gates.bits_per_byte([result], 0, 4).tolist() == [[1.0]]
    assert files.gates.bits_per_byte([result], -1).tolist() == [[2.0]]
    assert files.gates.by_position([result]) == [1.0, pytest.approx((1024 + 952) / 1500, abs=1e-3)]


def test_results_of_one_experiment_leave_the_others(files, tmp_path):
    path = tmp_path / "melodi.json"
    path.write_text(json.dumps({"parts": {"A3": {"gates": [1]}, "A1": {"gates": [2]}}}), encoding="utf-8")
    merged = files.melodi.merge(path, "A1", {"gates": [3]})
    assert list(merged["parts"]) == ["A1", "A3"]
    assert merged["gates"] == [3, 1]


def test_a_rate_must_be_the_best_and_inside_the_range(files):
    def gate(found):
        return files.gates._best_rate("melodi", found)

    assert files.arms.CHOSEN["melodi"] == 1.6e-2
    assert gate({8e-3: 2.1, 1.6e-2: 2.0, 3.2e-2: 2.2}).passed
    assert not gate({8e-3: 1.9, 1.6e-2: 2.0, 3.2e-2: 2.2}).passed, "another is better"
    assert not gate({8e-3: 2.1, 1.6e-2: 2.0}).passed, "a higher one might be better"
