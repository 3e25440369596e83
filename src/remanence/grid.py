"""The cells of a recipe: checked before any training, then run in parallel processes, each in its own folder.

A run folder holds run.json (the resolved recipe, the environment, the list of cells) and cells/CELL/ with a ledger, a
checkpoint and a lock. The same recipe gives the same folder, so that the same command resumes.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from remanence.artifact import Artifact, GivenFolder, materialise, refuse_overlap, shared_knowledge
from remanence.calls import build
from remanence.environment import environment
from remanence.errors import RecipeError, RemanenceError, SettingError, StateMismatchError
from remanence.learner import Learner, Progress
from remanence.probe import Probe
from remanence.recipe import Recipe
from remanence.runner import CellRunner, is_finished, require_pair
from remanence.state import write_whole
from remanence.task import Stream


@dataclass(frozen=True)
class Cell:
    """One stream, one learner, one seed."""

    stream: str
    learner: str
    seed: int

    @property
    def folder(self) -> str:
        return "--".join(re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") for name in (self.stream, self.learner)) + f"--{self.seed}"


class Builder:
    """Builds the objects of a recipe; sources are read once, artifacts are folders.

    Args:
        recipe: what to build from.
        folders: artifact name -> its folder.
    """

    def __init__(self, recipe: Recipe, folders: dict[str, Path]) -> None:
        self.recipe, self.folders = recipe, folders
        self._sources: dict[str, Any] = {}

    def source(self, name: str) -> Any:
        if name not in self._sources:
            self._sources[name] = build(self.recipe.tree["sources"][name], self.source, {})
        return self._sources[name]

    def artifact(self, name: str) -> Artifact:
        entry = self.recipe.tree["artifacts"][name]
        made = GivenFolder(Path(entry)) if isinstance(entry, str) else build(entry, self.source, {})
        if not isinstance(made, Artifact):
            raise self.recipe.fail(("artifacts", name), f"gives a {type(made).__name__}, not an Artifact.")
        return made

    def stream(self, name: str, seed: int) -> Stream:
        made = build(self.recipe.tree["streams"][name], lambda part: self._named(part, seed), {"order_seed": seed})
        if not isinstance(made, Stream):
            raise self.recipe.fail(("streams", name), f"gives a {type(made).__name__}, not a Stream.")
        return made

    def learner(self, name: str, seed: int) -> Learner:
        supplied = {"seed": seed, "device": resolve_device(self.recipe.device)}
        made = build(self.recipe.tree["learners"][name], lambda part: self._named(part, seed), supplied)
        if not isinstance(made, Learner):
            raise self.recipe.fail(("learners", name), f"gives a {type(made).__name__}, not a Learner.")
        return made

    def probes(self) -> list[Probe]:
        made = [build(call, self.source, {}) for call in self.recipe.tree["probes"]]
        names = [probe.name for probe in made]
        if len(set(names)) < len(names):
            raise self.recipe.fail(("probes",), f"a probe stands twice: {names}; their rows would have one key.")
        return made

    def _named(self, name: str, seed: int) -> Any:
        tree = self.recipe.tree
        if name in (tree.get("sources") or {}):
            return self.source(name)
        if name in (tree.get("artifacts") or {}):
            return str(self.folders[name])
        return self.stream(name, seed)


def resolve_device(name: str) -> str:
    """The device as accelerate finds it; "cpu" needs no look, "auto" takes the best there is.

    Raises:
        SettingError: the device is not there.
    """
    if name == "cpu":
        return name
    from accelerate import PartialState

    found = str(PartialState().device.type)
    if name not in ("auto", found):
        raise SettingError(f"device: '{name}' is not available, accelerate finds '{found}'. Set device: {found}, cpu or auto.")
    return found


def cells_of(recipe: Recipe) -> list[Cell]:
    """All cells in recipe order: pair by pair, seed by seed."""
    cells = [Cell(stream, learner, seed) for stream, learner in recipe.grid() for seed in recipe.seeds]
    folders = [cell.folder for cell in cells]
    for cell in cells:
        if folders.count(cell.folder) > 1:
            raise RecipeError(f"{recipe.path}: two cells share the folder '{cell.folder}'; give streams and learners plainer names.")
    return cells


def check(recipe: Recipe) -> list[str]:
    """Build everything once with untrained stand-ins for the artifacts, and refuse what cannot work.

    Returns:
        What a reader of the figures must know: which artifacts already saw training examples or classes of a stream.

    Raises:
        RemanenceError: a setting is out of range, a pair is impossible, an artifact saw a stream's test data.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folders: dict[str, Path] = {}
        artifacts: dict[str, Artifact] = {}
        builder = Builder(recipe, folders)
        for name in recipe.tree.get("artifacts") or {}:
            artifacts[name] = builder.artifact(name)
            folders[name] = Path(scratch) / name
            artifacts[name].sketch(folders[name])
        builder.probes()
        streams = {name: builder.stream(name, recipe.seeds[0]) for name in recipe.tree["streams"]}
        for artifact_name, artifact in artifacts.items():
            for stream in streams.values():
                refuse_overlap(artifact.seen(), artifact_name, stream)
        used = [streams[name] for name in dict.fromkeys(name for name, _ in recipe.grid())]
        known = [shared_knowledge(artifact, name, stream) for name, artifact in artifacts.items() for stream in used]
        for stream_name, learner_name in recipe.grid():
            try:
                require_pair(streams[stream_name], builder.learner(learner_name, recipe.seeds[0]))
            except RemanenceError as error:
                raise recipe.fail(("learners", learner_name), f"on stream '{stream_name}': {error}") from error
    cells_of(recipe)
    return [sentence for sentence in known if sentence]


def prepare(
    recipe: Recipe,
    run: Path,
    command: str = "",
    on_artifact: Callable[[str, Progress], None] = lambda name, progress: None,
    notes: Sequence[str] = (),
) -> dict[str, Path]:
    """Build the artifacts and write run.json; returns the artifacts' folders.

    Args:
        run: the run folder; made when absent.
        command: what the user typed.
        on_artifact: told the name and each step of an artifact that is built.
        notes: what `check` found that a reader must know.

    Raises:
        StateMismatchError: the run folder belongs to another recipe or other data.
    """
    builder = Builder(recipe, {})
    sources = {name: builder.source(name) for name in recipe.tree.get("sources") or {}}
    data = {name: source.fingerprint() for name, source in sources.items() if hasattr(source, "fingerprint")}
    artifacts = {name: builder.artifact(name) for name in recipe.tree.get("artifacts") or {}}
    identity = {"run": recipe.run, "data": data, "artifacts": {name: made.fingerprint() for name, made in artifacts.items()}}
    manifest = {
        "name": recipe.name,
        **identity,
        "command": command,
        "seeds": recipe.seeds,
        "cells": [cell.folder for cell in cells_of(recipe)],
        "environment": environment(),
        "notes": list(notes),
        "recipe": recipe.tree,
    }
    if (run / "run.json").exists():
        _require_same(run, identity)
    with one_thread():
        folders = {name: materialise(made, partial(on_artifact, name)) for name, made in artifacts.items()}
    if not (run / "run.json").exists():
        write_whole(run / "run.json", json.dumps(manifest, indent=1))
    return folders


def _require_same(run: Path, identity: dict[str, Any]) -> None:
    known = json.loads((run / "run.json").read_text(encoding="utf-8"))
    for key, value in identity.items():
        if known[key] != value:
            raise StateMismatchError(
                f"{run} was begun with another {'recipe' if key == 'run' else key} ({known[key]}, now {value}). "
                f"Give another --out, or delete the folder to begin again."
            )


def run_cells(
    recipe: Recipe,
    folders: dict[str, Path],
    run: Path,
    jobs: int = 1,
    on_event: Callable[[Cell, int, int], None] = lambda cell, done, total: None,
) -> None:
    """Run every cell; the one place that knows about processes.

    Args:
        jobs: processes; each computes on one thread, so that results do not depend on their number.
        on_event: told (cell, events done, events in all); with several processes once per cell, when it is done.
    """
    cells = cells_of(recipe)
    if jobs == 1 or len(cells) == 1:
        with one_thread():
            for cell in cells:
                _run_cell(recipe, folders, run, cell, partial(on_event, cell))
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    with _thread_environment(), ProcessPoolExecutor(min(jobs, len(cells)), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(_run_cell, recipe, folders, run, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                n_events = future.result()
                on_event(futures[future], n_events, n_events)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run_cell(
    recipe: Recipe, folders: dict[str, Path], run: Path, cell: Cell, on_event: Callable[[int, int], None] = lambda done, total: None
) -> int:
    builder = _builder(json.dumps(recipe.tree), recipe.path, tuple(folders.items()))
    stream = builder.stream(cell.stream, cell.seed)
    folder = run / "cells" / cell.folder
    if not is_finished(folder, len(stream)):
        names = (recipe.run, cell.stream, cell.learner)
        make = lambda: builder.learner(cell.learner, cell.seed)  # noqa: E731
        CellRunner(stream, make, builder.probes(), folder, names, cell.seed, on_event=on_event).run()
    return len(stream)


@lru_cache(maxsize=2)
def _builder(tree: str, path: Path, folders: tuple[tuple[str, Path], ...]) -> Builder:
    """One builder per process and recipe, so that a worker reads each source once."""
    return Builder(Recipe(path.stem, json.loads(tree), path), dict(folders))


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, as every worker does: sums then agree whatever the number of processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _thread_environment() -> Iterator[None]:
    """Workers read OMP_NUM_THREADS when they import torch; two threads each on two cores run ten times slower."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
