"""State on disk: one safetensors file, its JSON in the header, written whole or not at all.

A state is a nested dict (or list) of tensors and JSON values. Tensors are flattened to paths; everything else goes as
JSON into the file's header, so that a checkpoint is a single file and a rename replaces it atomically.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as _to_bytes
from torch import Tensor

from remanence.errors import StateMismatchError

State = dict[str, Any]
_TENSOR = "__tensor__"


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part (temporary file, fsync, rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_state(value: Any) -> Any:
    """A deep copy that shares no memory with the original: tensors detached, cloned, contiguous."""
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: copy_state(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [copy_state(item) for item in value]
    return value


def state_bytes(value: Any) -> int:
    """Bytes of all tensors in a state; JSON values count nothing."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(state_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(state_bytes(item) for item in value)
    return 0


def states_equal(first: Any, second: Any) -> bool:
    """Whether two states agree bit for bit: same nesting, keys, values, dtypes and shapes; NaN equals NaN."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return (
            isinstance(first, Tensor)
            and isinstance(second, Tensor)
            and first.dtype == second.dtype
            and first.shape == second.shape
            and _same_numbers(first.cpu(), second.cpu())
        )
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(states_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(states_equal, first, second))
    return bool(first == second or (first != first and second != second))


def _same_numbers(first: Tensor, second: Tensor) -> bool:
    return bool(((first == second) | ((first != first) & (second != second))).all())


def all_finite(value: Any) -> bool:
    """Whether no tensor of a state holds a NaN or an infinity."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(all_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(all_finite, value))
    return True


def save_state(path: Path, state: State) -> None:
    """Save a state to one safetensors file.

    Args:
        path: the file; its folder is made when absent.
        state: nested dicts with string keys, lists, tensors of any device, and JSON values.

    Raises:
        TypeError: a leaf is neither a tensor nor a JSON value, or a key is not a string.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(state, "", tensors)
    write_whole(path, _to_bytes(tensors, metadata={"state": json.dumps(skeleton)}))


def load_state(path: Path) -> State:
    """Load what `save_state` wrote; tensors come to the CPU.

    Raises:
        StateMismatchError: the file is not a whole state file.
    """
    return _read(path, with_tensors=True)


def load_values(path: Path) -> State:
    """What `save_state` wrote with None for every tensor; only the file's header is read.

    Raises:
        StateMismatchError: the file is not a whole state file.
    """
    return _read(path, with_tensors=False)


def _read(path: Path, with_tensors: bool) -> State:
    try:
        with safe_open(path, framework="pt") as file:
            skeleton = json.loads((file.metadata() or {})["state"])
            tensors = {key: file.get_tensor(key) if with_tensors else None for key in file.keys()}  # noqa: SIM118
            loaded: State = _unflatten(skeleton, tensors)
            return loaded
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise StateMismatchError(f"{path} is not a whole remanence state ({error}). Delete it to begin again.") from error


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        while path in tensors:  # {"a/b": ...} beside {"a": {"b": ...}}
            path += "/"
        # safetensors refuses shared and non-contiguous memory
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: path}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} under '{path}' is not a string; a state's keys must survive JSON")
        return {key: _flatten(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_flatten(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"'{path}' holds a {type(value).__name__}; a state holds tensors and JSON values only")


def _unflatten(value: Any, tensors: Mapping[str, Tensor | None]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _unflatten(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    return value
