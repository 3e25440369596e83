"""One line for everything that a recipe can name."""

import inspect
import re
from importlib import import_module
from typing import TYPE_CHECKING

import yaml

from remanence.artifact import Artifact
from remanence.facts import fact_stream
from remanence.learner import Learner
from remanence.probe import Probe
from remanence.recipes import shipped

if TYPE_CHECKING:
    from rich.table import Table

_LEARNER_ROOMS = ("weights", "tokens", "generated", "context")
_ARTIFACT_ROOMS = ("parts", "generated", "context")


def listing() -> "Table":
    """Recipes, streams, learners and probes as a table: what, import path, first sentence of its docstring."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for column, style in (("kind", "bold"), ("name", "cyan"), ("what", "")):
        table.add_column(column, style=style, no_wrap=column != "what")
    for kind, entries in _entries().items():
        for index, (name, sentence) in enumerate(entries):
            table.add_row(kind if index == 0 else "", name, sentence)
        table.add_row()
    return table


def _entries() -> dict[str, list[tuple[str, str]]]:
    recipes = [
        (name, _first_sentence(yaml.safe_load(path.read_text(encoding="utf-8")).get("about", ""))) for name, path in shipped().items()
    ]
    return {
        "recipes": recipes,
        "streams": [*_public("remanence.streams", object), ("remanence.facts.fact_stream", _doc(fact_stream))],
        "learners": [entry for room in _LEARNER_ROOMS for entry in _public(f"remanence.{room}", Learner)],
        "artifacts": [entry for room in _ARTIFACT_ROOMS for entry in _public(f"remanence.{room}", Artifact)],
        "probes": _public("remanence.probes", Probe),
    }


def _public(module_name: str, kind: type) -> list[tuple[str, str]]:
    module = import_module(module_name)
    found = [(name, getattr(module, name)) for name in module.__all__]
    chosen = [(name, item) for name, item in found if kind is object or (inspect.isclass(item) and issubclass(item, kind))]
    return [(f"{module_name}.{name}", _doc(item)) for name, item in chosen]


def _doc(item: object) -> str:
    return _first_sentence(inspect.getdoc(item) or "")


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"\.\s+(?=[A-Z])", paragraph)[0].rstrip(".") + "." if paragraph else ""
