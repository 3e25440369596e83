"""Taking knowledge out of the weights again: sparse multi-step updates, and the gradient methods they are compared with."""

from typing import TYPE_CHECKING, Any

from remanence.erasure._run import Erasing, ErasureOutcome
from remanence.erasure._selection import Granularity, Selection
from remanence.erasure.certificate import MEANINGS, Certificate, Measure, Value
from remanence.erasure.certifying import certify
from remanence.erasure.checkpoint import sparse_checkpoint, write_checkpoint
from remanence.erasure.delta import Delta, apply_delta, remove_delta
from remanence.erasure.erasing import erase, finish, median_log_p, uniform_log_p
from remanence.erasure.gradient import CleanFineTuning, Eraser, GradientAscent, GradientDifference
from remanence.erasure.hashes import data_hash, model_hash, tokenizer_hash
from remanence.erasure.relearning import relearning_steps
from remanence.erasure.scope import Scope, default_scope
from remanence.erasure.sparse import drift_table, sparse_delta, sparse_mask
from remanence.erasure.update import SparseUpdate

if TYPE_CHECKING:
    from remanence.erasure.trainer import SparseUpdateCallback

__all__ = [
    "MEANINGS",
    "Certificate",
    "CleanFineTuning",
    "Delta",
    "Eraser",
    "Erasing",
    "ErasureOutcome",
    "GradientAscent",
    "GradientDifference",
    "Granularity",
    "Measure",
    "Scope",
    "Selection",
    "SparseUpdate",
    "SparseUpdateCallback",
    "Value",
    "apply_delta",
    "certify",
    "data_hash",
    "default_scope",
    "drift_table",
    "erase",
    "finish",
    "median_log_p",
    "model_hash",
    "relearning_steps",
    "remove_delta",
    "sparse_checkpoint",
    "sparse_delta",
    "sparse_mask",
    "tokenizer_hash",
    "uniform_log_p",
    "write_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name == "SparseUpdateCallback":  # its parent class takes seconds to import
        from remanence.erasure.trainer import SparseUpdateCallback

        return SparseUpdateCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
