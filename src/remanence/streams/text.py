"""Real text: documents from Python's own documentation, a folder of files or a `datasets` dataset, split into train and test.

`windows` packs documents into next-token windows; `TokenDataset` walks those in a seeded, resumable order.

Example:
    >>> source = TextSource("pair", train=("One text.",), test=("Another text.",))
    >>> len(source.train), len(source.fingerprint())
    (1, 64)
"""

import gzip
import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from remanence.errors import DataError, MissingExtra, SettingError, nearest
from remanence.keys import generator
from remanence.parts.windows import windows
from remanence.streams._documentation import documentation
from remanence.streams._token_dataset import TokenDataset

__all__ = ["TextSource", "TokenDataset", "python_documentation", "text_dataset", "text_folder", "windows"]


@dataclass(frozen=True)
class TextSource:
    """Documents to train a language model on, and others to test it on.

    The split is by document: windows of one document on both sides would let a model look its test up.

    Args:
        name: shown in reports, and part of the windows' ids.
        train: documents that may be learned; each a text of any length.
        test: documents that only probes read.

    Raises:
        DataError: a side is empty, a document is not a str, or stands on both sides.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        for side, documents in (("train", self.train), ("test", self.test)):
            if isinstance(documents, str):
                raise DataError(f"text source '{self.name}': {side} is one str; give a tuple of documents.")
            if not documents:
                raise DataError(f"text source '{self.name}' has no {side} documents; give at least one.")
            wrong = [(index, type(item).__name__) for index, item in enumerate(documents) if not isinstance(item, str)]
            if wrong:
                raise DataError(f"text source '{self.name}': {side} document {wrong[0][0]} is a {wrong[0][1]}, not a str; decode it first.")
            object.__setattr__(self, side, tuple(documents))
        shared = sorted(set(self.train) & set(self.test))
        if shared:
            raise DataError(
                f"text source '{self.name}': {len(shared)} documents stand in train and in test; the first begins {shared[0][:60]!r}. "
                f"Take them out of one side."
            )

    def fingerprint(self) -> str:
        """Hex sha256 of the name, the documents and their split; computed once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.name, len(self.train), len(self.test))).encode())
        for document in (*self.train, *self.test):
            content = document.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8, "big") + content)
        return digest.hexdigest()


def python_documentation(test_share: float = 0.1) -> TextSource:
    """Python's own documentation, about 0.7 MB of real English that is on every machine: language reference and docstrings.

    Only paragraphs of prose are kept, each once. The text depends on the version of Python, and on nothing else.

    Args:
        test_share: share of the documents (chapters and modules) that is test, in (0, 1).

    Raises:
        SettingError: the share lies outside (0, 1).
    """
    return _divided("Python documentation", documentation(), test_share)


def text_folder(path: str | Path, pattern: str = "**/*.txt", test_share: float = 0.1) -> TextSource:
    """The text files of a folder, a document each, in the order of their paths.

    Blank files are skipped, and of equal ones the first is kept. A byte order mark is dropped, and line ends become "\\n".

    Args:
        path: the folder; "~" is understood. Its name becomes the source's name.
        pattern: glob of the files, UTF-8; the same names with ".gz" after them are read too.
        test_share: share of the documents that is test, in (0, 1); which ones is drawn from the folder's name.

    Raises:
        SettingError: the share lies outside (0, 1).
        DataError: there is no such folder, a file is no UTF-8 or cannot be unpacked, or fewer than two documents remain.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"there is no folder '{path}' (looked at {root.absolute()}). Give the folder that holds the text files.")
    files = sorted({*root.glob(pattern), *root.glob(f"{pattern}.gz")}, key=lambda file: file.relative_to(root).as_posix())
    texts = [_read(file) for file in files if file.is_file()]
    if not texts:
        raise DataError(f"no file in {root} matches '{pattern}' or '{pattern}.gz'; give another pattern or another folder.")
    return _divided(root.resolve().name, texts, test_share)


def text_dataset(path: str | Path, column: str = "text", test_share: float = 0.1) -> TextSource:
    """A `datasets` dataset that `save_to_disk` wrote, a document each row.

    A DatasetDict with "train" and "test" keeps its own split; of its test rows, those that stand in train too are dropped.
    Blank rows are skipped, and of equal ones the first is kept.

    Args:
        path: the folder that `save_to_disk` wrote; "~" is understood. Its name becomes the source's name.
        column: where the text stands.
        test_share: share of the rows that is test, in (0, 1); only used where there is no split.

    Raises:
        MissingExtra: `datasets` is not installed.
        SettingError: the share lies outside (0, 1).
        DataError: there is no such dataset or column, a row is no str, a DatasetDict has other splits, or too little remains.
    """
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise MissingExtra("text_dataset reads with `datasets`, which is not installed: pip install 'remanence[hf]'.") from error
    root = Path(path).expanduser()
    try:
        loaded = load_from_disk(str(root))
    except FileNotFoundError as error:
        raise DataError(f"{root.absolute()} is no dataset on disk ({error}). Give a folder that save_to_disk wrote.") from error
    name = root.resolve().name
    if not isinstance(loaded, DatasetDict):
        return _divided(name, _column(loaded, column, name), test_share)
    if not {"train", "test"} <= loaded.keys():
        raise DataError(f"'{name}' has the splits {sorted(loaded)}; 'train' and 'test' are needed. Rename them, or save one split alone.")
    train = _distinct(_column(loaded["train"], column, f"{name} train"))
    known = frozenset(train)
    test = [text for text in _distinct(_column(loaded["test"], column, f"{name} test")) if text not in known]
    return TextSource(name, tuple(train), tuple(test))


def _read(file: Path) -> str:
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read ({error}). Repair or remove it.") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x} ({error.reason}). Convert it, or remove it."
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _column(dataset: Any, column: str, name: str) -> list[str]:
    if column not in dataset.column_names:
        raise DataError(f"'{name}' has no column '{column}'.{nearest(column, dataset.column_names)}")
    texts = list(dataset[column])
    wrong = next((index for index, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise DataError(f"'{name}': row {wrong} of column '{column}' is a {type(texts[wrong]).__name__}, not a str; name a column of text.")
    return texts


def _distinct(texts: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text.strip()]


def _divided(name: str, texts: Iterable[str], test_share: float) -> TextSource:
    """A fixed share of the distinct documents as test, drawn from the name; both sides keep the order."""
    if not 0 < test_share < 1:
        raise SettingError(f"test_share: {test_share} lies outside (0, 1).")
    documents = _distinct(texts)
    if len(documents) < 2:
        raise DataError(
            f"'{name}' has {len(documents)} documents that are not blank and differ; two are needed, to train and to test. "
            f"Split a long text into a file per chapter."
        )
    n_test = min(max(round(test_share * len(documents)), 1), len(documents) - 1)
    drawn = set(torch.randperm(len(documents), generator=generator("documents", name))[:n_test].tolist())
    train, test = (tuple(text for row, text in enumerate(documents) if (row in drawn) is side) for side in (False, True))
    return TextSource(name, train, test)
