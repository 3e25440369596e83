"""Every learner that ships passes the contract; those of causal language models do so in tests/weights."""

import time

import pytest
import torch

from remanence.context import MelodiConfig, MelodiLM, MelodiReader
from remanence.errors import DataError
from remanence.keys import generator, keyed_rng
from remanence.task import Data, Task
from remanence.testing import check_learner, tiny_tasks
from remanence.weights import DynamicEvaluation

NAMES = [
    "fine-tuning",
    "fine-tuning local",
    "replay",
    "EWC",
    "LoRA prototype",
    "LoRA oracle",
    "prototypes",
    "prototypes cosine",
    "linear probe",
    "memory tokens prototype",
    "memory tokens energy",
    "memory tokens confidence",
    "memory tokens oracle",
    "VPT prototype",
    "VPT oracle",
    "HyperTransformer",
    "continual HyperTransformer",
]
EXACT = ("LoRA", "prototypes", "memory tokens", "VPT", "HyperTransformer", "continual")


def test_every_learner_is_listed(makers):
    assert list(makers) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_learner_keeps_the_contract(name, makers):
    began = time.perf_counter()
    check_learner(makers[name], exact_forget=True if name.startswith(EXACT) else None)
    assert time.perf_counter() - began < 60, "the contract is meant to run in seconds"


@pytest.fixture(scope="module")
def tiny_melodi():
    size = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "window": 4}
    with keyed_rng("tiny melodi"):
        return MelodiLM(MelodiConfig(**size, short=2, long_per_window=2, long_windows=6, long_layers=(1,)))


READERS = {
    "MELODI, replay": (lambda model, seed: MelodiReader(model, snapshot_every=2, seed=seed), True),
    "MELODI, slots": (lambda model, seed: MelodiReader(model, "slots", seed=seed), True),  # a whole document goes exactly
    "dynamic evaluation": (lambda model, seed: DynamicEvaluation(model, lr=0.1, seed=seed), None),
}


def tiny_document(name, first_id, n_train, n_test=3):
    ids = torch.randint(16, (n_train + n_test, 5), generator=generator("tiny document", name))
    table = Data(ids[:, :-1].clone(), ids[:, 1:].clone(), torch.arange(first_id, first_id + len(ids)), ordered=True)
    rows = torch.arange(len(ids))
    return Task(name, table.select(rows[:n_train]), table.select(rows[n_train:]), answer="tokens")


@pytest.mark.parametrize("name", READERS)
def test_a_reader_of_documents_keeps_the_contract(name, tiny_melodi):
    make, exact_forget = READERS[name]
    documents = [tiny_document("first", 0, 6), tiny_document("second", 100, 4)]
    check_learner(lambda seed: make(tiny_melodi, seed), documents, exact_forget)


def test_two_tasks_of_different_names_are_needed(makers):
    with pytest.raises(DataError, match="two tasks of different names"):
        check_learner(makers["prototypes"], tiny_tasks(1))
    task = tiny_tasks(1)[0]
    with pytest.raises(DataError, match="two tasks of different names"):
        check_learner(makers["prototypes"], [task, task])
