"""Text sources: documents, split into train and test.

Example:
    >>> source = TextSource("pair", train=("One text.",), test=("Another text.",))
    >>> len(source.train), len(source.fingerprint())
    (1, 64)
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

from remanence.errors import DataError
from remanence.parts.windows import windows

__all__ = ["TextSource", "windows"]


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
