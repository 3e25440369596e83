"""Every learner that ships passes the contract."""

import time

import pytest

from remanence.errors import DataError
from remanence.testing import check_learner, tiny_tasks

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


def test_two_tasks_of_different_names_are_needed(makers):
    with pytest.raises(DataError, match="two tasks of different names"):
        check_learner(makers["prototypes"], tiny_tasks(1))
    task = tiny_tasks(1)[0]
    with pytest.raises(DataError, match="two tasks of different names"):
        check_learner(makers["prototypes"], [task, task])
