"""A comparison as a YAML file: which sources, artifacts, streams, learners, probes and seeds.

    name: digits
    sources:   {digits: {call: remanence.streams.digits}}
    artifacts: {backbone: {call: remanence.parts.PretrainedViT, source: $digits}}
    streams:   {in turn: {call: remanence.streams.split_classes, source: $digits, per_task: 2}}
    learners:  {fine-tuning: {call: remanence.weights.FineTuning, backbone: $backbone}}
    probes:    [{call: remanence.probes.Accuracy, at: log}]
    seeds:     [0, 1, 2]

`call` names anything importable, also from a file of your own in the working directory; the keys beside it are its
arguments, and may be calls themselves. `$name` is a source, an artifact's folder or a stream defined above. An artifact
may also be the path of a folder that exists, such as a Hugging Face ViT (`--set artifacts.backbone=path/to/vit`). Every
argument is checked against the callee's signature before anything is built.

A recipe of `sources` and one artifact alone is a training: `remanence meta-train` reads it, and `remanence run` does not.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from remanence.calls import find, is_plain, typed
from remanence.errors import RecipeError, nearest

Tree = dict[str, Any]
Where = tuple[str | int, ...]

_SECTIONS = {"sources": dict, "artifacts": dict, "streams": dict, "learners": dict, "probes": list, "seeds": list, "cells": list}
_TEXTS = {"name": str, "about": str, "device": str, "minutes": (int, float), "command": str, "expect": list}
_REQUIRED = ("streams", "learners", "probes", "seeds")
_TRAINING = ("sources", "artifacts")
_SUPPLIED = ("seed", "order_seed", "device")


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read and checked, but of which nothing is built yet.

    Args:
        name: names the run's folder.
        tree: the resolved content, overrides applied.
        path: the file it came from.
        lines: line of every key, for messages.
        is_stated: no override was given, so that what the recipe states about its result applies.
    """

    name: str
    tree: Tree
    path: Path
    lines: Mapping[Where, int] = field(repr=False, default_factory=dict)
    is_stated: bool = True

    @property
    def run(self) -> str:
        """Hash of all that decides the result: equal runs have equal ledgers."""
        described = ("about", "minutes", "command", "expect")
        content = {key: value for key, value in self.tree.items() if key not in described}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def device(self) -> str:
        return str(self.tree.get("device", "cpu"))

    @property
    def seeds(self) -> list[int]:
        return list(self.tree.get("seeds", ()))

    def grid(self) -> list[tuple[str, str]]:
        """The (stream, learner) pairs to run: those of `cells`, or every pair."""
        learners = list(self.tree["learners"])
        chosen = self.tree.get("cells") or [{"stream": stream, "learners": learners} for stream in self.tree["streams"]]
        return [(cell["stream"], learner) for cell in chosen for learner in cell.get("learners", learners)]

    def fail(self, where: Where, message: str) -> RecipeError:
        """An error that names the place in the file."""
        known = [where[:size] for size in range(len(where), 0, -1) if where[:size] in self.lines]
        line = f", line {self.lines[known[0]]}" if known else ""
        return RecipeError(f"{self.path}{line}: {'.'.join(map(str, where)) or 'recipe'}: {message}")


def read_recipe(path: Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe file, apply overrides, and check every key, name, import path and argument type.

    Args:
        path: the YAML file.
        overrides: dotted key -> YAML value, as `remanence run --set key=value` gives them.

    Raises:
        RecipeError: anything is wrong; names key, file, line and the nearest right key.
    """
    recipe = _read(path, overrides or {})
    if recipe.tree.get("artifacts") and not any(recipe.tree.get(key) for key in _REQUIRED):
        raise RecipeError(f"{path} trains an artifact and compares nothing: it is for `remanence meta-train`.")
    _check(recipe, _REQUIRED)
    return Recipe(str(recipe.tree.get("name", path.stem)), recipe.tree, path, recipe.lines, recipe.is_stated)


def read_training(path: Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe of `sources` and one artifact, with the checks of `read_recipe`.

    Args:
        path: the YAML file.
        overrides: dotted key -> YAML value, as `remanence meta-train --set key=value` gives them.

    Raises:
        RecipeError: anything is wrong, the recipe compares learners, or it has another number of artifacts than one.
    """
    recipe = _read(path, overrides or {})
    if recipe.tree.get("streams") or recipe.tree.get("learners"):
        raise RecipeError(f"{path} compares learners: it is for `remanence run`.")
    foreign = [key for key in recipe.tree if key in _SECTIONS and key not in _TRAINING]
    if foreign:
        raise recipe.fail((foreign[0],), f"a recipe that trains has no '{foreign[0]}'; it has sources and one artifact.")
    _check(recipe, ("artifacts",))
    artifacts = recipe.tree["artifacts"]
    if len(artifacts) != 1:
        raise recipe.fail(("artifacts",), f"a recipe that trains has one artifact, this one {len(artifacts)}: {', '.join(artifacts)}.")
    return Recipe(str(recipe.tree.get("name", path.stem)), recipe.tree, path, recipe.lines, recipe.is_stated)


def _read(path: Path, overrides: Mapping[str, str]) -> Recipe:
    """The file with its overrides; nothing is checked but that it is a mapping."""
    if not path.exists():
        raise RecipeError(f"no recipe at {path}. Give a YAML file, or a name that `remanence list` shows.")
    text = path.read_text(encoding="utf-8")
    try:
        node, tree = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    recipe = Recipe(path.stem, tree, path, dict(_lines(node, ())), is_stated=not overrides)
    if not isinstance(tree, dict):
        raise recipe.fail((), f"a recipe is a mapping with the keys {', '.join(_REQUIRED)}; got {type(tree).__name__}.")
    for key, value in overrides.items():
        _override(recipe, key, value)
    return recipe


def _check(recipe: Recipe, required: tuple[str, ...]) -> None:
    """Refuse a recipe whose keys, names or calls are wrong."""
    _check_sections(recipe, required)
    _check_names(recipe)
    for section in ("sources", "artifacts", "streams", "learners"):
        for name, call in (recipe.tree.get(section) or {}).items():
            if section != "artifacts" or not isinstance(call, str):  # text is the folder of an artifact that exists
                _check_call(recipe, (section, name), call)
    for index, call in enumerate(recipe.tree.get("probes") or ()):
        _check_call(recipe, ("probes", index), call)


def _lines(node: yaml.Node | None, where: Where) -> Iterator[tuple[Where, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*where, key.value)
            yield place, key.start_mark.line + 1
            yield from _lines(value, place)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*where, index), value.start_mark.line + 1
            yield from _lines(value, (*where, index))


def _override(recipe: Recipe, key: str, value: str) -> None:
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {key}: {value!r} is not valid YAML: {' '.join(str(error).split())}") from error
    *path, last = key.split(".")
    place: Any = recipe.tree
    for depth, part in enumerate(path):
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict) and part in place:
            place = place[part]
        else:
            known = place if isinstance(place, dict) else map(str, range(len(place))) if isinstance(place, list) else ()
            raise RecipeError(f"--set {key}: {recipe.path} has no '{'.'.join(path[: depth + 1])}'.{nearest(part, known)}")
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise RecipeError(f"--set {key}: '{'.'.join(path)}' of {recipe.path} has no keys; it is {place!r}.")


def _check_sections(recipe: Recipe, required: tuple[str, ...]) -> None:
    known = {**_SECTIONS, **_TEXTS}
    for key, value in recipe.tree.items():
        if key not in known:
            raise recipe.fail((key,), f"unknown key.{nearest(str(key), known)}")
        if not isinstance(value, known[key]):  # type: ignore[arg-type]
            kind = known[key]
            names = [one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,))]
            raise recipe.fail((key,), f"must be a {' or '.join(names)}, got {value!r}.")
    for key in required:
        if not recipe.tree.get(key):
            raise recipe.fail((), f"the key '{key}' is missing or empty.")
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in recipe.seeds) or len(set(recipe.seeds)) < len(recipe.seeds):
        raise recipe.fail(("seeds",), f"must be different whole numbers, got {recipe.seeds}.")


def _check_names(recipe: Recipe) -> None:
    sections = [recipe.tree.get(section) or {} for section in ("sources", "artifacts", "streams")]
    for section in ("sources", "artifacts", "streams", "learners"):
        for name in recipe.tree.get(section) or {}:
            if not isinstance(name, str):
                raise recipe.fail((section, str(name)), f"a name must be text, got {name!r}; put it in quotes.")
    names = [name for section in sections for name in section]
    for name in names:
        if names.count(name) > 1:
            raise recipe.fail((name,), f"'{name}' stands twice among sources, artifacts and streams; give each a name of its own.")
    for index, cell in enumerate(recipe.tree.get("cells") or ()):
        if not isinstance(cell, dict) or "stream" not in cell or set(cell) - {"stream", "learners"}:
            raise recipe.fail(("cells", index), f"a cell is {{stream: name, learners: [names]}}, got {cell!r}.")
        if cell["stream"] not in recipe.tree["streams"]:
            raise recipe.fail(("cells", index), f"no stream '{cell['stream']}'.{nearest(cell['stream'], recipe.tree['streams'])}")
        for learner in cell.get("learners") or ():
            if learner not in recipe.tree["learners"]:
                raise recipe.fail(("cells", index), f"no learner '{learner}'.{nearest(learner, recipe.tree['learners'])}")


def _check_call(recipe: Recipe, where: Where, call: Any) -> None:
    if not (isinstance(call, dict) and isinstance(call.get("call"), str)):
        raise recipe.fail(where, f"needs a `call:` with an import path, got {call!r}.")
    try:
        target = find(call["call"])
    except RecipeError as error:
        raise recipe.fail((*where, "call"), str(error)) from error
    parameters = inspect.signature(target).parameters
    for key, value in call.items():
        if key != "call":
            if key not in parameters:
                raise recipe.fail((*where, key), f"{call['call']} has no setting '{key}'.{nearest(str(key), parameters)}")
            _check_argument(recipe, (*where, key), target, value)
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if name not in call and name not in _SUPPLIED
    ]
    if missing:
        raise recipe.fail(where, f"{call['call']} needs {', '.join(missing)}.")


def _check_argument(recipe: Recipe, where: Where, target: Callable[..., Any], value: Any) -> None:
    if isinstance(value, str) and value.startswith("$"):
        names = [name for section in ("sources", "artifacts", "streams") for name in recipe.tree.get(section) or {}]
        if value[1:] not in names:
            raise recipe.fail(where, f"nothing is named '{value[1:]}'.{nearest(value[1:], names)}")
    elif isinstance(value, dict) and "call" in value:
        _check_call(recipe, where, value)
    elif isinstance(value, list) and not is_plain(value):
        for index, item in enumerate(value):
            _check_argument(recipe, (*where, index), target, item)
    elif is_plain(value) and isinstance(where[-1], str):
        try:
            typed(target, where[-1], value)
        except RecipeError as error:
            raise recipe.fail(where, str(error)) from error
