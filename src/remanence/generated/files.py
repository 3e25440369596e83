"""A HyperTransformer as two files: `model.safetensors`, its parameters, and `hypertransformer.json`, all else.

    save_hypertransformer(model, Path("ht"), about={"license": "MIT"})
    model = load_hypertransformer(Path("ht"))           # evaluation mode, no gradients

The JSON names the class, the fields of its `TargetNet`, its settings, and the hash of the tensors that belong to it. It is written
last, so that a folder with a JSON is whole. Nothing is pickled.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _from_bytes
from safetensors.torch import save as _to_bytes
from torch import Tensor

from remanence.errors import DataError, SettingError, StateMismatchError
from remanence.generated.continual import ContinualHyperTransformer
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.target import TargetNet
from remanence.keys import keyed_rng
from remanence.state import write_whole

FORMAT = 1
TENSORS, DESCRIPTION = "model.safetensors", "hypertransformer.json"
_CLASSES = {kind.__name__: kind for kind in (HyperTransformer, ContinualHyperTransformer)}


def save_hypertransformer(model: HyperTransformer, folder: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a model so that a reader finds it whole or not at all; other files of the folder stay.

    Args:
        model: a `HyperTransformer` or `ContinualHyperTransformer`, of any device.
        folder: made when absent; a model that lies there is replaced.
        about: JSON values for readers: origin and licence of the data, say.

    Raises:
        StateMismatchError: a subclass, which no reader could make again.
    """
    if type(model).__name__ not in _CLASSES:
        raise StateMismatchError(f"a {type(model).__name__} cannot be saved; the file format knows {', '.join(_CLASSES)}.")
    tensors = _to_bytes(_tensors(model))
    description = {
        "format": FORMAT, "class": type(model).__name__, "target": asdict(model.target), "settings": model.settings,
        "sha256": hashlib.sha256(tensors).hexdigest(), "about": dict(about or {}),
    }  # fmt: skip
    text = json.dumps(description, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)  # never an old description beside new tensors
    write_whole(folder / TENSORS, tensors)
    write_whole(folder / DESCRIPTION, text)


def load_hypertransformer(folder: Path) -> HyperTransformer | ContinualHyperTransformer:
    """The model that `save_hypertransformer` wrote: on the CPU, in evaluation mode, without gradients.

    Tensors of a narrower dtype are widened.

    Raises:
        DataError: a file is missing or no JSON.
        StateMismatchError: the two files do not belong together, or this version cannot make such a model.
    """
    folder = Path(folder)
    description = describe_hypertransformer(folder)
    model = _make(folder, description)
    tensors = _read_tensors(folder, description["sha256"])
    wanted = _tensors(model)
    wrong = sorted(
        name for name in wanted.keys() | tensors.keys()
        if name not in wanted or name not in tensors or wanted[name].shape != tensors[name].shape
    )  # fmt: skip
    if wrong:
        raise StateMismatchError(
            f"{folder}: {len(wrong)} tensors are missing, unknown or of another shape (first three: {wrong[:3]}); "
            f"the model was saved by another version."
        )
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def shipped_hypertransformer() -> Path:
    """The folder of the HyperTransformer that comes with the package.

    16 channels, 28 x 28 grey images, up to 20 ways, every query answered by itself; `remanence meta-train hypertransformer` makes it
    anew. Its licence and what it was trained on stand in its README.md.
    """
    return Path(__file__).parent / "pretrained"


def describe_hypertransformer(folder: Path) -> dict[str, Any]:
    """What a folder's hypertransformer.json says, checked for the keys that loading needs.

    Raises:
        DataError: the file is missing or no JSON.
        StateMismatchError: it says less than it must, or is of a later format.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise DataError(f"{folder} holds no {DESCRIPTION}; give a folder that save_hypertransformer or `remanence meta-train` wrote.")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); save the model anew.") from error
    needed = ("format", "class", "target", "settings", "sha256")
    missing = [key for key in needed if not isinstance(description, dict) or key not in description]
    if missing:
        raise StateMismatchError(f"{path} lacks {', '.join(missing)}; save the model anew.")
    if description["format"] != FORMAT:
        found = description["format"]
        raise StateMismatchError(f"{path} is of format {found!r}, this version reads {FORMAT}; use the version that wrote it.")
    return dict(description)


def model_fingerprint(model: HyperTransformer) -> str:
    """Hash of a model's class, target, settings and parameters: what is made under one model fits no other.

    Example:
        >>> model = HyperTransformer(TargetNet(image_size=8, n_layers=2))
        >>> model_fingerprint(model) == model_fingerprint(model)
        True
    """
    described = json.dumps([type(model).__name__, asdict(model.target), model.settings], sort_keys=True)
    return hashlib.sha256(described.encode() + _to_bytes(_tensors(model))).hexdigest()[:16]


def _tensors(model: HyperTransformer) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}


def _make(folder: Path, description: Mapping[str, Any]) -> HyperTransformer:
    kind = _CLASSES.get(description["class"])
    if kind is None:
        raise StateMismatchError(f"{folder} holds a '{description['class']}'; this version knows {', '.join(_CLASSES)}.")
    try:
        with keyed_rng("load"):  # the numbers are replaced; the caller's generator must not move
            return kind(TargetNet(**description["target"]), **description["settings"])
    except (TypeError, SettingError) as error:
        raise StateMismatchError(f"{folder / DESCRIPTION} describes no {kind.__name__} of this version: {error}") from error


def _read_tensors(folder: Path, sha256: str) -> dict[str, Tensor]:
    path = folder / TENSORS
    if not path.is_file():
        raise DataError(f"{path} is missing; copy both files of the model.")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise StateMismatchError(f"{path} is not the file that {DESCRIPTION} was written with (sha256 {found[:12]}, not {sha256[:12]}).")
    try:
        tensors = _from_bytes(content)
    except SafetensorError as error:
        raise StateMismatchError(f"{path} is no safetensors file ({error}).") from error
    return {name: value.float() if value.dtype in (torch.float16, torch.bfloat16) else value for name, value in tensors.items()}
