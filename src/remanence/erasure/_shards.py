"""Folders of safetensors: read by name wherever the shard lies, overwritten in place, and made whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from remanence.errors import DataError, SettingError
from remanence.state import sync

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")
_OF_THE_RUN = ("trainer_state.json", _INDEX, _WHOLE)


class Shards:
    """The tensors of a checkpoint folder, read one at a time; a context manager that closes its files.

    Raises:
        DataError: the folder holds no safetensors checkpoint, or its index names a file that is absent.
        SettingError: the checkpoint is quantised.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files_of(folder)
        _refuse_quantised(folder)
        self._opened: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.clear()
        self._stack.close()

    def __getitem__(self, name: str) -> Tensor:
        file = self.files[name]
        if file not in self._opened:
            self._opened[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
        tensor: Tensor = self._opened[file].get_tensor(name)
        return tensor


def shard_files(folder: Path) -> list[str]:
    """Names of the files that hold the weights, the index included where there is one."""
    return sorted({*_files_of(folder).values()} | ({_INDEX} if (folder / _INDEX).is_file() else set()))


def _files_of(folder: Path) -> dict[str, str]:
    """Name of a tensor -> name of its file."""
    if (folder / _INDEX).is_file():
        files: dict[str, str] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        lost = sorted({file for file in files.values() if not (folder / file).is_file()})
        if lost:
            raise DataError(f"{folder / _INDEX} names {len(lost)} files that are absent (first: {lost[0]}); fetch the checkpoint again.")
        return files
    if (folder / _WHOLE).is_file():
        return dict.fromkeys(layout(folder / _WHOLE), _WHOLE)
    if (folder / "adapter_config.json").is_file():
        raise DataError(f"{folder} holds a LoRA adapter; merge it into its base (peft's merge_and_unload) and save the whole model.")
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) if folder.is_dir() else "no such folder"
    raise DataError(f"{folder} holds neither {_WHOLE} nor {_INDEX} ({there or 'it is empty'}); save the model with save_pretrained.")


def _refuse_quantised(folder: Path) -> None:
    config = folder / "config.json"
    if config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
        raise SettingError(f"{config} declares quantised weights; a sparse update needs them as plain floats.")


def layout(path: Path) -> dict[str, int]:
    """Name of a tensor -> where its bytes begin in a safetensors file.

    The format: eight bytes with the header's length, the header as JSON, then the bytes of the tensors.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


class Overwriter:
    """Puts tensors into copied shards; same shapes and dtypes as what stands there."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self._folder, self._files = folder, files
        self._layouts: dict[str, dict[str, int]] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            return
        file = self._files[name]
        if file not in self._layouts:
            self._layouts[file] = layout(self._folder / file)
        with (self._folder / file).open("r+b") as stream:
            stream.seek(self._layouts[file][name])
            stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def copy_beside_weights(source: Path, target: Path) -> None:
    """Copy what is no weight and no state of a training run: configs, tokenizer files, chat templates.

    Files that `target` has already stay as they are; folders within `source` are not followed.
    """
    for path in sorted(source.iterdir()):
        is_wanted = path.is_file() and path.suffix not in _WEIGHTS and path.name not in _OF_THE_RUN and not path.name.startswith(".")
        if is_wanted and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, which takes the name `out` when the block ends well and vanishes when it does not.

    A reader sees the folder whole or not at all. A process that is killed leaves the hidden folder behind, never `out`.

    Raises:
        DataError: `out` exists and is not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} exists already; nothing is ever overwritten. Name a new folder, or remove this one.")
    out.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp"))
    try:
        probe = hidden / "mode"
        probe.mkdir()  # mkdtemp makes folders that only their owner may read; this one has the usual mode
        hidden.chmod(probe.stat().st_mode & 0o777)
        probe.rmdir()
        yield hidden
        for path in (*hidden.rglob("*"), hidden):
            sync(path)
        hidden.replace(out)
        sync(out.parent)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
