"""Recipes that ship with the package: each states its command, its time and its result."""

from importlib.resources import files
from pathlib import Path

from remanence.errors import RecipeError, nearest


def shipped() -> dict[str, Path]:
    """Name -> file of every shipped recipe."""
    folder = Path(str(files("remanence.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_path(name: str) -> Path:
    """The file of a recipe: a path as it is, or a shipped name.

    Raises:
        RecipeError: it is neither.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    known = shipped()
    if name not in known:
        raise RecipeError(f"no shipped recipe and no file is named '{name}'.{nearest(name, known)}")
    return known[name]
