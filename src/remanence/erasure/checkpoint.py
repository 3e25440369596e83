"""Checkpoints on disk: a sparse update without loading a model, and the writing of an erased model.

    table = sparse_checkpoint("base", "tuned", "erased", select="ignore_top", fraction=0.08)

The new folder has the shards of the later checkpoint, byte for byte but for the masked weights; configs and tokenizer files are
copied along. It appears under its name whole, or not at all, and no folder that exists is ever written to.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from remanence.erasure._selection import Granularity, Kept, Pair, Rule, Selection, select_kept
from remanence.erasure._shards import Overwriter, Shards, copy_beside_weights, shard_files, whole_folder
from remanence.erasure.scope import Scope, default_scope, scoped_names
from remanence.erasure.sparse import Others, Row, drift_frame, drift_row, fit, others_return, require_same_names
from remanence.parts.hosts import no_progress_bar

if TYPE_CHECKING:
    import pandas as pd


def sparse_checkpoint(
    before: str | Path,
    after: str | Path,
    out: str | Path,
    select: Selection = "ignore_top",
    fraction: float = 0.08,
    granularity: Granularity = "tensor",
    *,
    scope: Scope | None = None,
    include_embeddings: bool = False,
    signed: bool = False,
    others: Others = "auto",
) -> "pd.DataFrame":
    """`sparse_delta` from folder to folder, one tensor at a time.

    Memory: one tensor of each checkpoint and a few of its size for the ranking, however large the model. A granularity above
    "tensor" reads both checkpoints three times.

    Args:
        before: checkpoint from before the training; sharded in any way, or not.
        after: checkpoint from after it; the new one has its shards, dtypes and other files.
        out: the new folder; absent, or empty.
        select, fraction, granularity, scope, include_embeddings, signed, others: see `sparse_delta`; without `scope`, embeddings are
            told by their names.

    Returns:
        `drift_table` of the three checkpoints.

    Raises:
        DataError: a folder holds no safetensors checkpoint, `out` exists, or a change is NaN or infinite.
        StateMismatchError: names or shapes differ, or a dtype of `before` does not fit into that of `after`.
        SettingError: a setting is out of range, nothing is in scope, or weights are quantised.
    """
    rule = Rule(select, fraction, signed, granularity)
    returns = others_return(others, rule)
    with Shards(Path(before)) as old, Shards(Path(after)) as new, whole_folder(Path(out)) as hidden:
        require_same_names(old.files, new.files)
        names = _scoped(new, scope or default_scope(include_embeddings=include_embeddings))
        for file in shard_files(new.folder):
            shutil.copyfile(new.folder / file, hidden / file)
        copy_beside_weights(new.folder, hidden)
        target = Overwriter(hidden, new.files)

        def load(name: str) -> Pair:
            tensor = new[name]
            return fit(name, old[name], tensor), tensor

        def write(kept: Kept) -> Row:
            merged = kept.merge()
            target.put(kept.name, merged)
            return drift_row(kept.name, kept.before, kept.after, merged)

        def pass_on(name: str) -> Row:
            earlier, later = load(name)
            if returns:
                target.put(name, earlier)
            return drift_row(name, earlier, later, earlier if returns else later)

        rows = [*map(write, select_kept(rule, names, load)), *map(pass_on, sorted(new.files.keys() - {*names}))]
        return drift_frame(rows)


def _scoped(shards: Shards, scope: Scope) -> list[str]:
    """Names in scope; the tensors are read one at a time, and only their kind is kept."""
    kinds = {}
    for name in shards.files:
        tensor = shards[name]
        kinds[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    # a file never holds one storage twice
    return scoped_names(kinds, scope, tied={})


def write_checkpoint(model: Any, like: str | Path, out: str | Path) -> None:
    """Write a model in memory to a new folder, whole or not at all.

    Args:
        model: a transformers model, with `save_pretrained`.
        like: the checkpoint that it was loaded from: tokenizer files come from there; where it is sharded, the size of its largest
            shard is the limit of the new ones.
        out: the new folder; absent, or empty.

    Raises:
        DataError: `like` holds no safetensors checkpoint, or `out` exists.
    """
    source = Path(like)
    sizes = [(source / file).stat().st_size for file in shard_files(source)]
    limit = {"max_shard_size": max(sizes)} if len(sizes) > 1 else {}
    with whole_folder(Path(out)) as hidden, no_progress_bar():
        model.save_pretrained(hidden, **limit)
        copy_beside_weights(source, hidden)
