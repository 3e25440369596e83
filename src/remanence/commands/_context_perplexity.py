"""`remanence context perplexity`: bits per byte by position in the document."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from remanence.commands._context_models import file_bytes, load_byte_model
from remanence.context import bits_by_position, document_losses
from remanence.progress import terminal

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

_ROWS, _WINDOWS = 8, 8


def perplexity(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    documents = [file_bytes(path) for path in arguments.files]
    model = load_byte_model(arguments.folder)
    losses = document_losses(model, documents, model.config.bos_token_id, _ROWS, _WINDOWS * model.config.window)
    longest = max(map(len, documents))
    table, whole = bits_by_position(losses, edges(longest)), bits_by_position(losses, [0, longest])
    if arguments.json:
        content = {"model": model.config.model_type, "documents": len(documents), "by_position": _records(table)}
        print(json.dumps(content | {"all": _records(whole)[0]}, indent=1))
    else:
        terminal().print(_table(_records(table), _records(whole)[0]))
    return 0


def edges(longest: int) -> list[int]:
    """0, 1 k, 4 k, 16 k and so on, up to the longest document.

    Example:
        >>> edges(5000), edges(10)
        ([0, 1024, 4096, 5000], [0, 10])
    """
    found = [0]
    edge = 1024
    while edge < longest:
        found.append(edge)
        edge *= 4
    return [*found, longest]


def _records(table: "pd.DataFrame") -> list[dict[str, Any]]:
    rows = table.itertuples(index=False, name=None)
    return [
        {"from": int(first), "to": int(to), "n_bytes": int(n), "bits_per_byte": float(bits), "perplexity_per_byte": float(2**bits)}
        for first, to, n, bits in rows
    ]


def _table(rows: list[dict[str, Any]], whole: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("position in document", "bytes", "bits per byte", "perplexity per byte"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(f"{row['from']:,} to {row['to'] - 1:,}", *_cells(row))
    table.add_row("all", *_cells(whole))
    return table


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['n_bytes']:,}", f"{row['bits_per_byte']:.4f}", f"{row['perplexity_per_byte']:.4f}"
