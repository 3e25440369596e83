"""`remanence context bytes`: what one document's memory takes, part by part, beside a full key-value cache."""

import argparse
from typing import TYPE_CHECKING, Any

import torch

from remanence.commands._common import say
from remanence.commands._context_models import load_byte_model, settings_of
from remanence.errors import SettingError
from remanence.progress import terminal

if TYPE_CHECKING:
    from rich.table import Table

_FORMULAS = {
    "remanence-melodi": {"short": "n S d", "long": "M Q L d"},
    "remanence-transformer-xl": {"keys": "n C d", "values": "n C d"},
    "remanence-memorizing-transformer": {
        "keys": "(n - 1) C d", "values": "(n - 1) C d", "memory_keys": "N d", "memory_values": "N d",
    },
    "remanence-block-recurrent": {"keys": "n C d", "values": "n C d", "states": "R d"},
}  # fmt: skip
_LETTERS = {
    "num_hidden_layers": "n", "hidden_size": "d", "short": "S", "long_windows": "Q", "long_per_window": "L", "cache": "C", "memory": "N",
    "states": "R",
}  # fmt: skip
_LENGTHS = {"4k": 4096, "64k": 65_536, "1M": 1_000_000}
_DERIVED = ("long",)
"""Embeddings that keys and values are derived from; papers count both."""


def memory_bytes(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    model = _model(arguments)
    state = model.init_state(1)
    console = terminal()
    console.print(_memory(model.config.model_type, state))
    config = model.config
    say(console, [_sizes(config), ""])
    console.print(_full_caches(2 * config.num_hidden_layers * config.hidden_size * 4, state.nbytes("stored"), state.nbytes("kv")))
    return 0


def _model(arguments: argparse.Namespace) -> Any:
    if arguments.folder is not None:
        if arguments.overrides:
            raise SettingError(f"{arguments.folder} has settings of its own; give a folder, or --set, and not both.")
        return load_byte_model(arguments.folder)
    kind, config = settings_of(arguments.model, arguments.overrides)
    with torch.device("meta"):  # shapes alone: any size is counted at once
        return kind(config)


def _memory(model_type: str, state: Any) -> "Table":
    table = _columns("memory of a document", "floats", "shape", "stored bytes", "kv bytes")
    fields = {name: value for name, value in state.memory().items() if value.is_floating_point()}
    for name, value in fields.items():
        stored = value.numel() * value.element_size()
        shape = " x ".join(str(size) for size in value.shape[1:])
        table.add_row(name, _FORMULAS[model_type][name], shape, f"{stored:,}", f"{stored * (2 if name in _DERIVED else 1):,}")
    table.add_row("all", "", "", f"{state.nbytes('stored'):,}", f"{state.nbytes('kv'):,}")
    return table


def _sizes(config: Any) -> str:
    found = {letter: getattr(config, name) for name, letter in _LETTERS.items() if hasattr(config, name)}
    if hasattr(config, "long_layers"):
        found["M"] = len(config.long_layers)
    return f"{', '.join(f'{letter} = {value}' for letter, value in found.items())}; 4 bytes a float"


def _full_caches(per_token: int, stored: int, kv: int) -> "Table":
    table = _columns("full key-value cache of", "2 n d T floats", "", "times stored", "times kv")
    for name, length in _LENGTHS.items():
        whole = per_token * length
        shares = (f"{whole / each:,.1f}" if each else "-" for each in (stored, kv))
        table.add_row(f"T = {name} tokens", f"{whole:,} bytes", "", *shares)
    return table


def _columns(*names: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < 2 else "right")
    return table
