"""What is trained before a stream begins and then only read.

An artifact is built once, resumably, under a lock, and cached as a folder named after the hash of its settings and its
data. The folder appears whole or not at all; its header.json lists which examples it saw, so that overlap with a stream's
test data can be refused.
"""

import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock
from torch import Tensor

from remanence.errors import DataError
from remanence.learner import Progress
from remanence.state import write_whole
from remanence.task import Data, Stream, origins, source_bits


class TrainingSource(Protocol):
    """Where an artifact's data comes from; `remanence.streams.Source` is one."""

    name: str

    @property
    def train(self) -> Data: ...
    @property
    def test(self) -> Data: ...
    def fingerprint(self) -> str: ...


class Artifact(ABC):
    """Something pretrained.

    Attributes:
        kind: first part of the cache folder's name.
        version: raised whenever `build` comes to make something else of the same settings, so that no old folder is read.
    """

    kind: str
    version: int = 1

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that the result depends on, as JSON values, the data's fingerprint included."""

    @abstractmethod
    def seen(self) -> Tensor:
        """(N,) int64 ids of all examples that the artifact is trained on."""

    @abstractmethod
    def build(self, folder: Path) -> Iterator[Progress]:
        """Train, and leave the result's files in `folder`; resumes from what an interrupted build left there."""

    @abstractmethod
    def sketch(self, folder: Path) -> None:
        """Leave an untrained stand-in in `folder`, of the same shape: settings are checked against it before any training."""

    def header(self) -> dict[str, Any]:
        """What a reader of the folder needs besides the files."""
        return {}

    def fingerprint(self) -> str:
        """Hash of the settings; equal fingerprints mean equal artifacts."""
        content = json.dumps({"kind": self.kind, "version": self.version, **self.settings()}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class GivenFolder(Artifact):
    """An artifact that somebody else made: a folder that is only read, such as a Hugging Face model.

    Args:
        path: the folder. What it was trained on is known only if it bears a header.json of ours.

    Raises:
        DataError: there is no such folder.
    """

    kind = "given"

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        if not self.path.is_dir():
            raise DataError(f"there is no folder {self.path}; give a folder that save_pretrained wrote.")

    def settings(self) -> dict[str, Any]:
        files = sorted(file for file in self.path.iterdir() if file.suffix in (".json", ".safetensors"))
        return {"files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}}

    def seen(self) -> Tensor:
        return torch.tensor(self.header().get("saw", []), dtype=torch.int64)

    def header(self) -> dict[str, Any]:
        path = self.path / "header.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def sketch(self, folder: Path) -> None:
        folder.symlink_to(self.path, target_is_directory=True)

    def build(self, folder: Path) -> Iterator[Progress]:
        yield from ()


def cache_folder() -> Path:
    """Where artifacts live: `REMANENCE_CACHE`, else ~/.cache/remanence."""
    return Path(os.environ.get("REMANENCE_CACHE") or Path.home() / ".cache" / "remanence").expanduser()


def materialise(artifact: Artifact, on_progress: Callable[[Progress], None] | None = None, cache: Path | None = None) -> Path:
    """The artifact's folder, built first if it is not there yet; a second process waits for the first.

    Args:
        on_progress: called after every building step.
        cache: folder of all artifacts; `cache_folder()` by default.
    """
    if isinstance(artifact, GivenFolder):
        return artifact.path
    cache = cache or cache_folder()
    folder = cache / f"{artifact.kind}-{artifact.fingerprint()}"
    if (folder / "header.json").exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{folder.name}.lock"):
        if not (folder / "header.json").exists():
            partial = cache / f".{folder.name}.partial"
            partial.mkdir(exist_ok=True)
            for progress in artifact.build(partial):
                if on_progress is not None:
                    on_progress(progress)
            header = {"kind": artifact.kind, "settings": artifact.settings(), "saw": sorted(artifact.seen().tolist()), **artifact.header()}
            write_whole(partial / "header.json", json.dumps(header))
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
    return folder


def refuse_overlap(saw: Tensor, name: str, stream: Stream, n_events: int = 64) -> None:
    """Refuse a stream whose test data an artifact is trained on; transformed copies count as the same example.

    Args:
        saw: (N,) int64 ids of the artifact's training examples.
        name: of the artifact, for the message.
        n_events: of a stream of independent tasks (episodes), how many are looked at.

    Raises:
        DataError: at least one test example was seen.
    """
    known = origins(saw)
    tasks = stream.subjects or tuple(event.task for event in stream[:n_events])
    for task in (*tasks, *stream.bystanders):
        n_seen = int(torch.isin(origins(task.test.ids), known).sum())
        if n_seen:
            raise DataError(
                f"{n_seen} of {len(task.test)} test examples of '{task.name}' (stream '{stream.name}') are in the training data of "
                f"artifact '{name}'. Pretrain on another part of the source."
            )


def shared_knowledge(artifact: Artifact, name: str, stream: Stream) -> str:
    """A sentence on what an artifact already knows of a stream's tasks; empty when nothing.

    Training examples and, within one source, classes may overlap, but a reader of the figures must know of it.
    """
    trains = [task.train for task in stream.subjects if task.train is not None and len(task.train)]
    if not trains:
        return ""
    saw, ids = artifact.seen(), torch.cat([train.ids for train in trains])
    n_examples = int(torch.isin(origins(ids), origins(saw)).sum())
    is_one_source = bool(torch.isin(source_bits(ids), source_bits(saw)).any())
    taught = {label for train in trains for label in torch.unique(train.targets).tolist()}
    classes = sorted(taught & set(artifact.header().get("classes", ()))) if is_one_source else []
    if not n_examples and not classes:
        return ""
    return f"artifact '{name}' already saw {n_examples} training examples and {len(classes)} classes of stream '{stream.name}'."
