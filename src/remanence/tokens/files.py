"""Memories on disk: one safetensors file per task, kilobytes each, written whole or not at all.

    save_task(memory, "flowers", "flowers.safetensors")
    load_task(another_memory, "flowers.safetensors")            # same backbone, another machine

Each file names the backbone it belongs to by a fingerprint, so that it is never read on top of another one.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as _to_bytes
from torch import nn

from remanence.errors import NonFiniteLoss, SettingError, StateMismatchError
from remanence.state import all_finite, write_whole
from remanence.tokens.memory import MemoryViT
from remanence.tokens.task_memory import TaskMemory

_FORMAT = 1

Tensors = dict[str, torch.Tensor]


def fingerprint(model: nn.Module) -> str:
    """sha256 over the names and bytes of a model's parameters and buffers; the first 16 hex digits."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()[:16]


def save_task(memory: MemoryViT, name: str, path: str | Path) -> Path:
    """Write what one task owns; returns the file's path.

    Raises:
        SettingError: there is no such task.
        NonFiniteLoss: its tensors hold a NaN or an infinity.
    """
    return _save(memory, name, Path(path), fingerprint(memory.view.trunk))


def _save(memory: MemoryViT, name: str, path: Path, backbone: str) -> Path:
    task = memory.task(name)
    broken = [key for key, value in task.state_dict().items() if not all_finite(value)]
    if broken:
        raise NonFiniteLoss(f"{broken} of task '{name}' hold a NaN or an infinity; train it again at a lower rate before saving it.")
    header = {
        "format": _FORMAT,
        "name": name,
        "classes": task.classes,
        "layers": list(task.layers),
        "parents": list(task.parents),
        "norm": task.norm,
        "backbone": backbone,
        "image": list(memory.view.image_shape),
        "shape": {"layers": len(memory.view.layers), "width": memory.view.width, "heads": memory.view.n_heads},
    }
    tensors = {key: value.detach().cpu().contiguous() for key, value in task.state_dict().items()}
    write_whole(path, _to_bytes(tensors, metadata={"memory": json.dumps(header)}))
    return path


def load_task(memory: MemoryViT, path: str | Path, name: str | None = None, parents: Mapping[str, str] | None = None) -> str:
    """Read one task's file onto a backbone; returns the task's name.

    Args:
        name: what to call it here; its own name by default.
        parents: names here of the tasks that it reads from, where those were renamed.

    Raises:
        StateMismatchError: the file is no memory, or belongs to another backbone; both fingerprints are shown.
        SettingError: the name is taken, or a parent is not loaded yet.
    """
    header, tensors = _read(Path(path))
    return _load(memory, Path(path), header, tensors, name or header["name"], parents or {}, fingerprint(memory.view.trunk))


def _load(
    memory: MemoryViT, path: Path, header: dict[str, Any], tensors: Tensors, name: str, renamed: Mapping[str, str], found: str
) -> str:
    if header["backbone"] != found:
        here = {"layers": len(memory.view.layers), "width": memory.view.width, "heads": memory.view.n_heads}
        raise StateMismatchError(
            f"{path} was trained on backbone {header['backbone']} ({header['shape']}), this one is {found} ({here}). "
            f"Load it onto the backbone it belongs to."
        )
    parents = [renamed.get(parent, parent) for parent in header["parents"]]
    missing = [parent for parent in parents if parent not in memory.tasks]
    if missing:
        raise SettingError(f"'{name}' reads from {missing}, which are not loaded; load those first. Here: {memory.tasks}.")
    made = memory.add_task(name, header["classes"], tokens=0, mode="class", parents=parents, norm=header["norm"])
    _fill(made, header, tensors)
    return name


def save_pretrained(memory: MemoryViT, folder: str | Path) -> list[Path]:
    """Write all memories (not the backbone) into a folder, one file a task, numbered in order of arrival.

    Raises:
        SettingError: the folder holds memories already; forgotten tasks must not come back from it.
    """
    folder, backbone = Path(folder), fingerprint(memory.view.trunk)
    left = sorted(folder.glob("*.safetensors"))
    if left:
        raise SettingError(f"{folder} holds {len(left)} memories already ({left[0].name}, ...); give an empty or a new folder.")
    return [_save(memory, name, folder / f"{index:06d}.safetensors", backbone) for index, name in enumerate(memory.tasks)]


def from_pretrained(model: nn.Module, *folders: str | Path) -> MemoryViT:
    """A backbone with the memories of one or several folders; tasks trained apart stand side by side.

    A name that is taken gets a number: the second "flowers" is called "flowers (2)".

    Raises:
        StateMismatchError: as `load_task`, or a folder holds no memory.
    """
    memory = MemoryViT(model)
    backbone = fingerprint(memory.view.trunk)
    for folder in map(Path, folders):
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise StateMismatchError(f"{folder} holds no .safetensors file; give a folder that save_pretrained wrote.")
        here: dict[str, str] = {}
        for path in files:
            header, tensors = _read(path)
            here[header["name"]] = _free(header["name"], memory.tasks)
            _load(memory, path, header, tensors, here[header["name"]], here, backbone)
    return memory


def _free(name: str, taken: list[str]) -> str:
    """The name itself, or the first numbered one that is not taken."""
    return next(option for option in (name, *(f"{name} ({n})" for n in range(2, len(taken) + 3))) if option not in taken)


def _read(path: Path) -> tuple[dict[str, Any], Tensors]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["memory"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, OSError, json.JSONDecodeError) as error:
        raise StateMismatchError(f"{path} is not the file of a memory ({error}); save_task writes one.") from error
    if header.get("format") != _FORMAT:
        raise StateMismatchError(f"{path} is of format {header.get('format')}, this version reads {_FORMAT}; read it with what wrote it.")
    return header, tensors


def _fill(made: TaskMemory, header: dict[str, Any], tensors: Tensors) -> None:
    like = made.head.weight
    made.layers = tuple(header["layers"])
    made.memory = nn.Parameter(tensors["memory"].to(like))
    made.class_token = nn.Parameter(tensors["class_token"].to(like)) if "class_token" in tensors else None
    with torch.no_grad():
        made.head.weight.copy_(tensors["head.weight"])
        made.head.bias.copy_(tensors["head.bias"])
