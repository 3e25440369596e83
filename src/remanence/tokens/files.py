"""Memories on disk: one safetensors file per task, kilobytes each, written whole or not at all.

    save_task(memory, "flowers", "flowers.safetensors")
    load_task(another_memory, "flowers.safetensors")            # same backbone, another machine

Each file names the backbone it belongs to by a fingerprint, so that it is never read on top of another one.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as _to_bytes
from torch import nn

from remanence.errors import SettingError, StateMismatchError
from remanence.state import write_whole
from remanence.tokens.memory import MemoryViT, TaskMemory

_FORMAT = 1


def fingerprint(model: nn.Module) -> str:
    """sha256 over the names and bytes of a model's parameters and buffers; the first 16 hex digits."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()[:16]


def save_task(memory: MemoryViT, name: str, path: str | Path) -> Path:
    """Write what one task owns; returns the file's path.

    Raises:
        SettingError: there is no such task.
    """
    task, path = memory.task(name), Path(path)
    header = {
        "format": _FORMAT,
        "name": name,
        "classes": task.classes,
        "layers": list(task.layers),
        "parents": list(task.parents),
        "norm": task.norm,
        "backbone": fingerprint(memory.view.trunk),
        "shape": {"layers": len(memory.view.layers), "width": memory.view.width, "heads": memory.view.n_heads},
    }
    tensors = {key: value.detach().cpu().contiguous() for key, value in task.state_dict().items()}
    write_whole(path, _to_bytes(tensors, metadata={"memory": json.dumps(header)}))
    return path


def load_task(memory: MemoryViT, path: str | Path, name: str | None = None) -> str:
    """Read one task's file onto a backbone; returns the task's name.

    Args:
        name: what to call it here; its own name by default.

    Raises:
        StateMismatchError: the file is no memory, or belongs to another backbone; both fingerprints are shown.
        SettingError: the name is taken, or a parent is not loaded yet.
    """
    header, tensors = _read(Path(path))
    found = fingerprint(memory.view.trunk)
    if header["backbone"] != found:
        here = {"layers": len(memory.view.layers), "width": memory.view.width, "heads": memory.view.n_heads}
        raise StateMismatchError(
            f"{path} was trained on backbone {header['backbone']} ({header['shape']}), this one is {found} ({here}). "
            f"Load it onto the backbone it belongs to."
        )
    name = name or header["name"]
    missing = [parent for parent in header["parents"] if parent not in memory.tasks]
    if missing:
        raise SettingError(f"'{name}' reads from {missing}, which are not loaded; load those first. Here: {memory.tasks}.")
    made = memory.add_task(name, header["classes"], tokens=0, mode="class", parents=header["parents"], norm=header["norm"])
    _fill(made, header, tensors)
    return name


def save_pretrained(memory: MemoryViT, folder: str | Path) -> list[Path]:
    """Write all memories (not the backbone) into a folder, one file a task, numbered in order of arrival."""
    folder = Path(folder)
    return [save_task(memory, name, folder / f"{index:03d}.safetensors") for index, name in enumerate(memory.tasks)]


def from_pretrained(model: nn.Module, *folders: str | Path) -> MemoryViT:
    """A backbone with the memories of one or several folders; tasks trained apart stand side by side.

    Raises:
        StateMismatchError: as `load_task`, or a folder holds no memory.
    """
    memory = MemoryViT(model)
    for folder in map(Path, folders):
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise StateMismatchError(f"{folder} holds no .safetensors file; give a folder that save_pretrained wrote.")
        for path in files:
            load_task(memory, path)
    return memory


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["memory"])
            return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, FileNotFoundError, json.JSONDecodeError) as error:
        raise StateMismatchError(f"{path} is not the file of a memory ({error}); save_task writes one.") from error


def _fill(made: TaskMemory, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    like = made.head.weight
    made.layers = tuple(header["layers"])
    made.memory = nn.Parameter(tensors["memory"].to(like))
    made.class_token = nn.Parameter(tensors["class_token"].to(like)) if "class_token" in tensors else None
    with torch.no_grad():
        made.head.weight.copy_(tensors["head.weight"])
        made.head.bias.copy_(tensors["head.bias"])
