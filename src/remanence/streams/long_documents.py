"""Long documents: whole books, and the large source files of Python's own library.

    source = books()                                  # a local set
    source = python_sources()                         # on every machine
    documents = [byte_ids(text) for text in source.train]

Each is a `TextSource` that is split by document, so that nothing of a test document was ever read.
"""

import gzip
import hashlib
import json
import platform

import numpy as np
import torch
from torch import Tensor

from remanence.errors import SettingError
from remanence.keys import generator
from remanence.streams._documentation import module_files
from remanence.streams.known import find_set
from remanence.streams.text import TextSource
from remanence.task import example_ids

BYTE_BOS = 256
"""The id that begins a document of bytes."""

IDS_EVERY = 64
"""Places of a document that share one id, as in `place_ids`."""


def books(n_test: int = 8, seed: int = 0) -> TextSource:
    """36 public-domain books, 35 million characters: 0.14 to 3.2 million each, chapters parted by blank lines.

    They lie in a local set, books/books.jsonl.gz: see `remanence.streams.known`.

    Args:
        n_test: books that are test, in 1..35.
        seed: key of which ones.

    Raises:
        SettingError: `n_test` is out of range.
        DataError: the file is absent or is not the one that is known.

    Source: Standard Ebooks' editions, whose mark-up and editing are CC0.
    """
    with gzip.open(find_set("books"), "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return _held_out("books", ["\n\n".join(chapter["text"] for chapter in record["chapters"]) for record in records], n_test, seed)


def python_sources(min_bytes: int = 30_000, n_test: int = 8, seed: int = 0) -> TextSource:
    """The large source files of Python's standard library: about 80, of 30 to 230 kB, 5 MB in all, on every machine.

    They depend on the version of Python, which the source's name tells, and on nothing else: tests, and modules that some machines lack,
    are left out. So are the tables of character sets, which resemble one another so much that train would tell what test says.

    Args:
        min_bytes: least size of a file, in UTF-8.
        n_test: files that are test.
        seed: key of which ones.

    Raises:
        SettingError: no file is test, or none remains to train on.
    """
    files = [file for module, file in module_files() if module != "encodings" and file.stat().st_size >= min_bytes]
    texts = [text for file in files if len((text := file.read_text(encoding="utf-8")).encode()) >= min_bytes]
    return _held_out(f"Python {platform.python_version()} sources", texts, n_test, seed)


def _held_out(name: str, texts: list[str], n_test: int, seed: int) -> TextSource:
    documents = list(dict.fromkeys(texts))
    if not 1 <= n_test < len(documents):
        raise SettingError(
            f"{name}: n_test={n_test} of {len(documents)} documents; train and test need one each. Choose fewer for test, or get more "
            f"documents (a lower min_bytes)."
        )
    drawn = set(torch.randperm(len(documents), generator=generator(seed, "held out", name))[:n_test].tolist())
    train, test = (tuple(text for row, text in enumerate(documents) if (row in drawn) is side) for side in (False, True))
    return TextSource(name, train, test)


def byte_ids(text: str) -> Tensor:
    """The UTF-8 bytes of a text as ids 0 to 255, (n,) int64: a vocabulary that needs no training and loses nothing.

    Example:
        >>> byte_ids("né").tolist()
        [110, 195, 169]
    """
    return torch.from_numpy(np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int64))


def document_name(document: Tensor) -> str:
    """A name that follows from a document's ids alone, so that it is known again whoever reads it."""
    return f"document {hashlib.sha256(document.to(torch.int64).numpy().tobytes()).hexdigest()}"


def place_ids(document: Tensor, places: Tensor) -> Tensor:
    """Ids of places in a document, for leak checks: whoever reads the same document finds the same ones.

    Args:
        document: its ids (n,).
        places: (N,) int64, positions in it; 64 neighbouring ones share an id.

    Returns:
        (N,) int64, see `remanence.task.example_ids`.
    """
    return example_ids(document_name(document), places // IDS_EVERY)
