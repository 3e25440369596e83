"""A small recipe that works, to be broken one line at a time; its classes live here, outside the package."""

from remanence.parts import PretrainedViT
from remanence.streams import Source, turned
from remanence.task import example_ids
from remanence.testing import tiny_tasks

GOOD = """\
name: tiny
sources:
  old: {call: recipe_files.shapes, name: old}
  new: {call: recipe_files.shapes}
artifacts:
  backbone: {call: remanence.parts.PretrainedViT, source: $old, width: 16, depth: 1, heads: 2, patch: 4, epochs: 1, batch_size: 8}
streams:
  in turn: {call: remanence.streams.split_classes, source: $new, per_task: 2}
learners:
  tuned: {call: remanence.weights.FineTuning, backbone: $backbone, epochs: 1, lr: 1e-3}
  means: {call: remanence.weights.Prototypes, backbone: $backbone}
cells:
  - {stream: in turn}
probes:
  - {call: remanence.probes.Accuracy, at: log}
seeds: [0, 1]
"""


def shapes(name: str = "new") -> Source:
    """Forty 8 x 8 images of four classes."""
    import torch

    tables = [table for task in tiny_tasks(2, n_train=20, n_test=10) for table in (task.train, task.test)]
    images, labels = torch.cat([table.inputs for table in tables]), torch.cat([table.targets for table in tables])
    is_test = torch.cat([torch.full((len(table),), bool(index % 2)) for index, table in enumerate(tables)])
    return Source(name, images, labels, example_ids(name, torch.arange(len(labels))), is_test, {k: f"c{k}" for k in range(4)})


def no_artifact(source: Source) -> Source:
    return source


__all__ = ["GOOD", "PretrainedViT", "no_artifact", "shapes", "turned"]


def large() -> Source:
    """Images of another size."""
    import torch

    source = shapes("large")
    return Source("large", torch.zeros(len(source.labels), 1, 12, 12), source.labels, source.ids, source.is_test, source.class_names)


def swapped() -> Source:
    """The old images, with train and test exchanged."""
    source = shapes("old")
    return Source("old", source.images, source.labels, source.ids, ~source.is_test, source.class_names)
