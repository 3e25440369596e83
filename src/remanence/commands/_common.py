"""What the commands share: overrides of a recipe, checks of options, text to train and to measure on, lines on the terminal."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remanence.errors import RecipeError, SettingError

if TYPE_CHECKING:
    from rich.console import Console

    from remanence.facts.records import FactSet
    from remanence.streams.text import TextSource
    from remanence.task import Data

_LEAST_LENGTH, _MOST_LENGTH = 40, 128
_RULER_WINDOWS = 64


def overrides(settings: Iterable[str]) -> dict[str, str]:
    """What `--set KEY=VALUE` gave: dotted key -> YAML value.

    Raises:
        RecipeError: a setting has no `=`.
    """
    for setting in settings:
        if "=" not in setting:
            raise RecipeError(f"--set {setting}: write it as KEY=VALUE, for example --set seeds=[0,1].")
    return dict(setting.split("=", 1) for setting in settings)


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Options that are given must be above 0.

    Raises:
        SettingError: one is not.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise SettingError(f"--{name.replace('_', '-')} {value} must be above 0.")


def text_source(folder: Path | None) -> "TextSource":
    """A folder of text files, or Python's documentation."""
    from remanence.streams.text import python_documentation, text_folder

    return python_documentation() if folder is None else text_folder(folder)


def row_length(model: Any, tokenizer: Any, facts: "FactSet") -> int:
    """Tokens of a row: room for the longest fact, between 40 and 128, and no more than the model reads."""
    longest = max(len(tokenizer(fact.text)["input_ids"]) for fact in facts)
    most = getattr(model.config, "max_position_embeddings", None) or _MOST_LENGTH
    return int(min(max(longest, _LEAST_LENGTH), _MOST_LENGTH, most))


def ruler(texts: Iterable[str], tokenizer: Any, length: int, name: str) -> "Data":
    """Windows whose loss is measured; few, so that measuring stays cheap."""
    import torch

    from remanence.streams.text import windows

    held_out = windows(texts, tokenizer, length, name)
    return held_out.select(torch.arange(min(len(held_out), _RULER_WINDOWS)))


def duration(seconds: float) -> str:
    """For people.

    Example:
        >>> duration(90), duration(3000)
        ('90 s', '50 min')
    """
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def say(console: "Console", lines: Iterable[str]) -> None:
    """Plain lines: nothing in them is markup."""
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
