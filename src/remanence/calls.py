"""Calls in YAML: `{call: import.path, key: value}` becomes the object that the callee gives."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from remanence.errors import MissingExtra, RecipeError, nearest


def build(call: Any, named: Callable[[str], Any], supplied: Mapping[str, Any]) -> Any:
    """Turn a checked part of a recipe into the object it describes.

    Args:
        call: a mapping with `call`, or any YAML value.
        named: what `$name` stands for.
        supplied: arguments for callees that take them and were not told otherwise (seed, order_seed, device).
    """
    if isinstance(call, str) and call.startswith("$"):
        return named(call[1:])
    if isinstance(call, list):
        return [build(item, named, supplied) for item in call]
    if not (isinstance(call, dict) and "call" in call):
        return call
    target = find(call["call"])
    parameters = inspect.signature(target).parameters
    arguments = {
        key: typed(target, key, value) if is_plain(value) else build(value, named, supplied) for key, value in call.items() if key != "call"
    }
    return target(**{key: value for key, value in supplied.items() if key in parameters} | arguments)


def find(path: str) -> Callable[..., Any]:
    """The object at a dotted import path; modules in the working directory are found too.

    Raises:
        RecipeError: nothing is there; names the nearest public name of the module.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise RecipeError(f"'{path}' is no import path; write package.module.Name.")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except MissingExtra:
        raise
    except ImportError as error:
        raise RecipeError(f"cannot import '{module_name}' for '{path}': {error}. Is the file in the working directory?") from error
    found: Any = getattr(module, name, None)
    if not callable(found):
        public = getattr(module, "__all__", [key for key in vars(module) if not key.startswith("_")])
        raise RecipeError(f"'{module_name}' has no '{name}'.{nearest(name, public)}")
    return found  # type: ignore[no-any-return]


def is_plain(value: Any) -> bool:
    """Whether a value holds neither a call nor a reference."""
    if isinstance(value, dict):
        return "call" not in value and all(is_plain(item) for item in value.values())
    if isinstance(value, list):
        return all(is_plain(item) for item in value)
    return not (isinstance(value, str) and value.startswith("$"))


def typed(target: Callable[..., Any], name: str, value: Any) -> Any:
    """A YAML value as the type that the parameter is annotated with: 1e-3 becomes a float, a list a tuple."""
    from jsonargparse import ArgumentError, ArgumentParser

    annotation = get_type_hints(target.__init__ if inspect.isclass(target) else target).get(name)
    if annotation is None:
        return value
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=annotation)
    try:
        return parser.parse_object({"value": value}).value
    except ArgumentError as error:
        shown = getattr(annotation, "__name__", annotation) if inspect.isclass(annotation) else annotation
        raise RecipeError(f"must be {shown}, got {value!r}.") from error
