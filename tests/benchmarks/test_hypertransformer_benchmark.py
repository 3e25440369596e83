"""The parts of the HyperTransformer's benchmark that need no training: bounds, cells, halves of a task, accuracy tables."""

import json
import sys
from pathlib import Path

import pytest
import torch

from remanence.generated import UNLABELED, EpisodeSampler, HyperTransformer, SequenceSampler
from remanence.keys import generator
from remanence.streams import digits

FOLDER = Path(__file__).parents[2] / "benchmarks"
RATES = {"ht": 1e-3, "proto": 8e-3, "maml": 2e-2, "cht": 1e-3, "constpn": 8e-3}


@pytest.fixture(scope="module", autouse=True)
def _on_path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def test_a_bound_lies_below_the_mean_and_above_the_least():
    from hypertransformer_sizes import beats, lower_bound

    differences = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert 1.0 < lower_bound(differences) < 3.0
    assert lower_bound([2.0, 2.0]) == 2.0
    assert beats("H1", "a - b: accuracy", differences).passed
    assert not beats("H1", "a - b: accuracy", [-1.0, 1.0, 3.0]).passed
    assert not beats("C1", "a - b: accuracy", differences, least=20.0).passed


def test_equal_cells_of_two_experiments_are_one():
    from hypertransformer_experiments import EXPERIMENTS
    from hypertransformer_sizes import FULL

    def keys(name):
        return {cell.key for cell in EXPERIMENTS[name].cells(FULL, RATES)}

    assert keys("H1") < keys("H2")
    assert keys("C2") < keys("C3")
    assert keys("H7") < keys("H3")
    assert len(keys("H1")) == 2 * len(FULL.seeds)
    assert not keys("C1") & keys("C5")


def test_a_cell_depends_on_its_budget():
    from hypertransformer_cells import Cell

    plain = Cell("few-shot", {"arm": "proto", "seed": 0})
    other = Cell("few-shot", {"arm": "ht", "seed": 0})
    assert len({plain.key, other.key, Cell(plain.kind, plain.settings, other).key}) == 3


@pytest.mark.parametrize("arm", ["ht", "ht-delta", "ht-logits", "ht-written", "ht-paper", "proto", "maml"])
def test_every_arm_can_be_made_and_asked(arm):
    from hypertransformer_few_shot import make

    model = make(arm, 2, 3)
    episode = EpisodeSampler(_large_digits(), 3, 1, queries=2, tasks=2).sample(0)
    assert model(episode).shape == (2, 6, 3)
    if isinstance(model, HyperTransformer):
        assert bool(model.written) == ("logits" not in arm)


def test_half_a_task_keeps_its_slots():
    from hypertransformer_continual import halves

    episode = EpisodeSampler(digits(), 4, 1, queries=3, tasks=2).sample(0)
    first, second = halves(episode)
    assert first.support_y.tolist() == [[0, 1]] * 2
    assert second.support_y.tolist() == [[2, 3]] * 2
    assert torch.equal(torch.cat([first.query_x, second.query_x], 1), episode.query_x)
    assert first.n_max == second.n_max == 4


def test_only_unlabelled_images_are_thinned():
    from hypertransformer_few_shot import thinned

    episode = EpisodeSampler(digits(), 3, 2, queries=1, unlabeled=4, tasks=3).sample(0)
    labelled = episode.support_y != UNLABELED
    assert torch.equal(thinned(episode, 1.0, generator(0)).support_mask, labelled)
    assert thinned(episode, 0.0, generator(0)).support_mask.all()
    some = thinned(episode, 0.5, generator(0)).support_mask
    assert some[labelled].all()
    assert 0 < int(some[~labelled].sum()) < int((~labelled).sum())


def test_accuracy_after_each_task_among_all_classes_and_among_the_tasks_own():
    from hypertransformer_continual import table

    sequence = SequenceSampler(digits(), n_tasks=2, ways=2, shots=1, queries=1, sequences=1).sample(0)
    right = torch.tensor([[[5.0, 0.0, 9.0, 0.0], [0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0], [0.0, 0.0, 0.0, 5.0]]])
    answers = [right[:, :2, :2], right]
    among_all, among_own = (table(answers, sequence, within).tolist() for within in (False, True))
    assert among_all[0][0] == among_own[0][0] == 1.0
    assert among_all[1] == [0.5, 1.0]  # the first query goes to a class of the second task
    assert among_own[1] == [1.0, 1.0]


def test_an_experiment_that_is_made_anew_leaves_the_others(tmp_path):
    from hypertransformer import merge

    path = tmp_path / "figures.json"
    path.write_text(json.dumps(merge(path, "C2", {"gates": [{"row": "C2"}]}, RATES)))
    found = merge(path, "H1", {"gates": [{"row": "H1"}]}, RATES)
    assert list(found["parts"]) == ["H1", "C2"]
    assert [gate["row"] for gate in found["gates"]] == ["H1", "C2"]


def _large_digits():
    from hypertransformer_continual import _enlarged

    return _enlarged(digits())
