"""Taking knowledge out of the weights again: sparse multi-step updates, and the gradient methods they are compared with."""

from typing import TYPE_CHECKING, Any

from remanence.erasure.checkpoint import sparse_checkpoint, write_checkpoint
from remanence.erasure.delta import Delta, apply_delta, remove_delta
from remanence.erasure.scope import default_scope
from remanence.erasure.sparse import drift_table, sparse_delta, sparse_mask
from remanence.erasure.update import SparseUpdate

if TYPE_CHECKING:
    from remanence.erasure.trainer import SparseUpdateCallback

__all__ = [
    "Delta",
    "SparseUpdate",
    "SparseUpdateCallback",
    "apply_delta",
    "default_scope",
    "drift_table",
    "remove_delta",
    "sparse_checkpoint",
    "sparse_delta",
    "sparse_mask",
    "write_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name == "SparseUpdateCallback":  # its parent class takes seconds to import
        from remanence.erasure.trainer import SparseUpdateCallback

        return SparseUpdateCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
