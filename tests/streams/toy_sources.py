"""Small sources and checks that several tests of this room share."""

import pytest
import torch

from remanence.errors import DataError
from remanence.streams import Source
from remanence.streams.known import find_set
from remanence.task import Data, Stream, Task, example_ids, origins

SIZES = {0: (6, 3), 2: (5, 2), 5: (7, 4), 9: (4, 2)}


def toy_source(sizes: dict[int, tuple[int, int]] | None = None, name: str = "toy", side: int = 4, channels: int = 1) -> Source:
    """A source with label -> (n train, n test) rows; every image is noise of its own."""
    sizes = SIZES if sizes is None else sizes
    labels = torch.tensor([label for label, counts in sizes.items() for _ in range(sum(counts))])
    is_test = torch.tensor([row >= n_train for n_train, n_test in sizes.values() for row in range(n_train + n_test)])
    images = torch.rand(len(labels), channels, side, side, generator=torch.Generator().manual_seed(0))
    return Source(name, images, labels, example_ids(name, torch.arange(len(labels))), is_test, {label: f"c{label}" for label in sizes})


def require_set(name: str) -> None:
    """Skip the calling test where a local set is absent."""
    try:
        find_set(name)
    except DataError as error:
        pytest.skip(str(error))


def tables(task: Task) -> list[Data]:
    return [table for table in (task.train, task.valid, task.test) if table is not None]


def same_task(first: Task, second: Task) -> bool:
    """Equal names, ids, labels and pixels."""
    pairs = list(zip(tables(first), tables(second), strict=True))
    return first.name == second.name and all(
        torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets) and torch.equal(a.inputs, b.inputs) for a, b in pairs
    )


def assert_no_leak(stream: Stream) -> None:
    """Nowhere in the stream is an image trained on, in any copy, that valid or test of any task or bystander shows."""
    trained = {int(row) for event in stream if event.task.train is not None for row in origins(event.task.train.ids)}
    held_out = {
        int(row)
        for task in (*(event.task for event in stream), *stream.bystanders)
        for table in (task.valid, task.test)
        if table is not None
        for row in origins(table.ids)
    }
    assert not trained & held_out
