"""What the `context` commands share: kinds of models and their settings, models and bytes from disk."""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remanence.commands._common import overrides
from remanence.errors import DataError, RecipeError, RemanenceError, SettingError, nearest

if TYPE_CHECKING:
    from torch import Tensor

# those of remanence.context.kinds, spelled out so that `--help` need not load torch
KINDS = ("melodi", "transformer-xl", "memorizing", "block-recurrent", "windowed")
_BYTES = {"vocab_size": 257, "bos_token_id": 256}


def settings_of(kind: str, given: Iterable[str]) -> tuple[Any, Any]:
    """A kind's model class, and its configuration with what `--set KEY=VALUE` gave.

    Raises:
        RecipeError: a setting is unknown, no YAML or of the wrong type.
        SettingError: a setting is out of range, or may not be changed.
    """
    from remanence.context import kinds

    model, own = kinds.KINDS[kind]
    fixed = _BYTES | own
    owners = _owners(model.config_class)
    values = {}
    for key, value in overrides(given).items():
        if key in fixed:
            raise SettingError(f"--set {key}={value}: {key} is {fixed[key]} here, for this kind or for bytes; leave it out.")
        if key not in owners:
            raise RecipeError(f"--set {key}={value}: a {kind} model has no setting '{key}'.{nearest(key, owners.keys() - fixed.keys())}")
        values[key] = _value(owners[key], key, value)
    return model, model.config_class(**fixed, **values)


def _owners(config_class: Any) -> dict[str, Any]:
    """Which class of the hierarchy has each setting."""
    ours = [each for each in reversed(config_class.__mro__) if each.__module__.startswith("remanence.") and "__init__" in vars(each)]
    skipped = {"self", "others"}
    return {name: each for each in ours for name in inspect.signature(each.__init__).parameters if name not in skipped}


def _value(owner: Any, key: str, text: str) -> Any:
    import yaml

    from remanence.calls import typed

    try:
        return typed(owner, key, yaml.safe_load(text))
    except (yaml.YAMLError, RecipeError) as error:
        raise RecipeError(f"--set {key}={text}: {' '.join(str(error).split())}") from error


def load_byte_model(folder: Path) -> Any:
    """A context model that reads bytes, where the computing is done.

    Raises:
        DataError: the folder holds no such model, or it cannot be read.
    """
    import torch

    from remanence.context import load_context_model
    from remanence.parts.hosts import no_progress_bar

    unfinished = (folder / "training.json").exists() and not (folder / "config.json").exists()
    if unfinished:
        raise DataError(f"the training in {folder} has not come to its end; give the command again that began it.")
    try:
        with no_progress_bar():
            model = load_context_model(folder)
    except RemanenceError:
        raise
    except Exception as error:  # safetensors, json and transformers each have errors of their own for broken files
        raise DataError(f"the model in {folder} cannot be read ({type(error).__name__}: {error}). Save it anew.") from error
    seen = {name: getattr(model.config, name) for name in _BYTES}
    if seen != _BYTES:
        raise DataError(f"{folder} holds a model with {seen}; this command reads bytes, which need {_BYTES}.")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def file_bytes(path: Path) -> "Tensor":
    """The bytes of a file as ids, (n,) uint8.

    Raises:
        DataError: there is no such file, or it is empty.
    """
    import numpy as np
    import torch

    require_file(path)
    content = np.fromfile(path, dtype=np.uint8)
    if not len(content):
        raise DataError(f"{path} is empty; there is nothing to read.")
    return torch.from_numpy(content)


def require_file(path: Path) -> None:
    """A file, or something else that can be read, must be there.

    Raises:
        DataError: it is not.
    """
    if path.is_dir() or not path.exists():
        raise DataError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; give a file.")


def memory_said(model: Any) -> str:
    """Bytes of one document's memory, for people."""
    state = model.init_state(1)
    return f"{state.nbytes('stored'):,} bytes stored, {state.nbytes('kv'):,} with keys and values counted"
