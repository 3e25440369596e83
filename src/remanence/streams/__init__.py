"""Real images and text, and the ways of cutting them into a stream of tasks.

A *source* is a labelled set: `digits`, `omniglot`, `fashion_mnist`, `image_folder`; `turned` makes new classes of one and
`part` keeps rows apart for pretraining. A *scenario* cuts a source into a stream: `split_classes`, `domains`, `permuted`,
`episodes`. A *schedule* presents a stream anew: `joint`, `online`, `alone`, `learn_then_forget`.

A *text source* is documents, some to learn and some to test on: `python_documentation`, `text_folder`, `text_dataset`, and two of
long documents, `books` and `python_sources`, which `documents` turns into a stream. `windows` packs them into next-token windows, which a
`TokenDataset` walks in a seeded, resumable order; `byte_ids` is the vocabulary that needs no training.

Example:
    >>> stream = learn_then_forget(split_classes(part(digits(), "stream"), per_task=5), forget=[1])
    >>> [(event.verb, event.task.name) for event in stream]
    [('learn', 'classes 0, 2, 5, 6, 9'), ('learn', 'classes 1, 3, 4, 7, 8'), ('forget', 'classes 1, 3, 4, 7, 8')]
"""

from remanence.streams.documents import documents
from remanence.streams.episodic import episodes
from remanence.streams.folder import image_folder
from remanence.streams.known import digits, fashion_mnist, omniglot
from remanence.streams.long_documents import books, byte_ids, python_sources
from remanence.streams.scenarios import domains, permuted, split_classes
from remanence.streams.schedules import alone, joint, learn_then_forget, online
from remanence.streams.source import Source, part, turned
from remanence.streams.text import TextSource, TokenDataset, python_documentation, text_dataset, text_folder, windows

__all__ = [
    "Source",
    "TextSource",
    "TokenDataset",
    "alone",
    "books",
    "byte_ids",
    "digits",
    "documents",
    "domains",
    "episodes",
    "fashion_mnist",
    "image_folder",
    "joint",
    "learn_then_forget",
    "omniglot",
    "online",
    "part",
    "permuted",
    "python_documentation",
    "python_sources",
    "split_classes",
    "text_dataset",
    "text_folder",
    "turned",
    "windows",
]
