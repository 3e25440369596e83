"""The contract that every learner keeps, as one call: put your own learner through it.

    from remanence.testing import check_learner
    check_learner(lambda seed: MyLearner(seed=seed))

Runs in seconds on tiny data. The first broken rule raises an AssertionError that names the rule, the place, and what
would be right. A learner that passes can be interrupted, resumed, copied and read by the harness without a special case.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from remanence.errors import DataError
from remanence.keys import generator
from remanence.learner import Learner
from remanence.state import copy_state
from remanence.task import Data, Task
from remanence.testing._bench import Bench, demand_same, global_rng, set_global_rng, state_difference, tables
from remanence.testing._rules import RULES

__all__ = ["check_learner", "state_difference", "tiny_tasks"]


def check_learner(make_learner: Callable[[int], Learner], tasks: Sequence[Task] | None = None, exact_forget: bool | None = None) -> None:
    """Put a learner through the contract of `remanence.learner`.

    Args:
        make_learner: seed -> a learner that has learned nothing. Give it settings under which a task takes 2 to 8 steps:
            resuming is tried at each of them.
        tasks: two tasks of the learner's kind, of different names; by default `tiny_tasks()`.
        exact_forget: True claims that learn(a), learn(b), forget(a) leaves bit for bit what learn(b) alone leaves;
            otherwise forgetting need only be honest.

    Raises:
        AssertionError: a rule is broken.
        DataError: fewer than two tasks, or tasks of one name.

    Example:
        >>> from remanence.weights import Prototypes
        >>> from transformers import ViTConfig, ViTModel
        >>> size = dict(image_size=8, num_channels=1, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> vit = ViTModel(ViTConfig(**size, intermediate_size=8), add_pooling_layer=False)
        >>> check_learner(lambda seed: Prototypes(vit, seed=seed, batch_size=5), exact_forget=True)
    """
    chosen = tuple(tiny_tasks() if tasks is None else tasks)
    if len(chosen) < 2 or chosen[0].name == chosen[1].name or not (chosen[0].train and chosen[1].train):
        raise DataError(f"check_learner needs two tasks of different names with train sets; got {[task.name for task in chosen]}.")
    before = global_rng()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(make_learner, chosen[0], chosen[1], Path(scratch) / "state.safetensors", bool(exact_forget))
        tensors = [*tables(bench.first), *tables(bench.second)]
        copies = copy_state(tensors)
        for rule in RULES:
            _try_rule(rule, bench)
            demand_same(copies, tensors, "broken rule: the tasks' tensors stay as they are. Something wrote into them")
    set_global_rng(before)


def _try_rule(rule: Callable[[Bench], None], bench: Bench) -> None:
    promise = (rule.__doc__ or "").strip()
    try:
        rule(bench)
    except AssertionError as error:
        raise AssertionError(f"broken rule: {promise} {error}") from error
    except Exception as error:
        raise AssertionError(f"broken rule: {promise} Instead it raised {type(error).__name__}: {error}") from error


def tiny_tasks(n_tasks: int = 2, n_train: int = 10, n_test: int = 32, side: int = 8) -> tuple[Task, ...]:
    """Synthetic image tasks of two classes each: noise with one bright row per class.

    Returns:
        Tasks "task 0", "task 1", ...; task i has the classes 2i and 2i + 1, images are (1, side, side).
    """
    return tuple(
        Task(f"task {i}", _images(2 * i, n_train, 1000 * i, side), _images(2 * i, n_test, 1000 * i + 500, side)) for i in range(n_tasks)
    )


def _images(label: int, n: int, first_id: int, side: int) -> Data:
    targets = torch.arange(n) % 2 + label
    images = 0.5 * torch.rand(n, 1, side, side, generator=generator("tiny", first_id))
    images[torch.arange(n), 0, targets % side] += 0.5
    return Data(images, targets, torch.arange(first_id, first_id + n))
