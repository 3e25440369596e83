"""Sparse multi-step updates: of what a window of training steps changed, keep only some entries.

    erased = sparse_delta(before, after, select="ignore_top", fraction=0.08)
    print(drift_table(before, after, erased))

For each tensor, delta = after - before; a mask chooses entries by their rank among |delta|; chosen entries keep the new value,
all others get the old one back. Values are copied, never summed and never rescaled, so that every entry of the result has the
bits of one of the two states.

What lies outside the scope (biases, norms, embeddings; see `default_scope`) has no mask. By default it keeps its new value, as
long as anything keeps it; a rule that keeps nothing at all (ignore_top with fraction 1, keep_top with fraction 0, an empty
band) returns the whole state to the window's start, so that both ends of the scale are exact. `others` forces either.

Source: ignore_top after Sun et al. 2025 (arXiv 2504.09522); keep_top is the trim step of Yadav et al. 2023 (TIES, arXiv
2306.01708). ours: exact counts, ties by index, bits copied where the papers write a sum.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from remanence.erasure._selection import Granularity, Rule, Selection, change, kept_of, order_keys, select_kept
from remanence.erasure.scope import Scope, StateDict, default_scope, scoped_names, tied_names
from remanence.errors import SettingError, StateMismatchError, nearest

if TYPE_CHECKING:
    import pandas as pd

Others = Literal["auto", "after", "before"]
Row = dict[str, object]


def sparse_mask(delta: Tensor, select: Selection = "ignore_top", fraction: float = 0.08, signed: bool = False) -> Tensor:
    """Where a tensor keeps its new value.

    Args:
        delta: the change, of any shape and floating dtype; ranked in float32.
        select: "ignore_top": all but the largest entries; "keep_top": only those; ("band", lo, hi): the entries whose rank
            among |delta| (0 the smallest), as a share of all entries, lies in [lo, hi).
        fraction: how many are largest: exactly floor(fraction * numel) of them, ties going to the lower index. An entry that is
            zero is never among them, so there may be fewer. A band ignores this.
        signed: largest means largest value, not largest magnitude.

    Returns:
        bool tensor of the shape of `delta`; True = keep the new value. O(n) time.

    Raises:
        SettingError: a setting is out of range.
        DataError: an entry is NaN or infinite.

    Example:
        >>> sparse_mask(torch.tensor([3.0, -4.0, 0.0, 1.0]), fraction=0.5)
        tensor([False, False,  True,  True])
        >>> sparse_mask(torch.ones(4), "keep_top", 0.5)
        tensor([ True,  True, False, False])
    """
    return kept_of(Rule(select, fraction, signed), order_keys(delta, signed)).view(delta.shape)


def sparse_delta(
    before: StateDict,
    after: StateDict,
    select: Selection = "ignore_top",
    fraction: float = 0.08,
    granularity: Granularity = "tensor",
    *,
    scope: Scope | None = None,
    include_embeddings: bool = False,
    signed: bool = False,
    others: Others = "auto",
) -> dict[str, Tensor]:
    """The state after a window of training, with only the selected entries of the window's change.

    Use it to take out what a training run wrote ("ignore_top"), given the weights from before it.

    Args:
        before: parameter name -> tensor of any shape, at the start of the window. A narrower float dtype than that of `after`
            is widened, which loses nothing.
        after: same names and shapes, at its end. Tied tensors (one storage under two names) are masked once and stay tied; copied
            tensor by tensor, they have lost their tie, and count twice where one ranking covers both.
        select, fraction, signed: see `sparse_mask`.
        granularity: what one ranking covers: each "tensor"; a "layer", which is all tensors whose names agree up to the first
            number in them; or everything ("global"). Ties go to the first name in alphabetical order, then to the lower index.
        scope: (name, tensor) -> whether it is masked; default: `default_scope(include_embeddings=...)`.
        include_embeddings: mask embeddings and the output layer as well; without effect when `scope` is given.
        others: tensors outside the scope keep the value "after", or return to "before"; "auto": "after", except when the rule
            keeps nothing.

    Returns:
        A new state with the names, order and dtypes of `after` that shares no memory with either. Guarantee, bit for bit:
        ignore_top with fraction 0 is `after`, with fraction 1 `before`; keep_top the reverse.

    Raises:
        StateMismatchError: names or shapes differ, or a dtype of `before` does not fit into that of `after`.
        SettingError: a setting is out of range, nothing is in scope, or weights are quantised or those of an adapter.
        DataError: a change in scope is NaN or infinite.

    Example:
        >>> before, after = {"w": torch.zeros(1, 4)}, {"w": torch.tensor([[1.0, 5.0, 2.0, 3.0]])}
        >>> sparse_delta(before, after, fraction=0.25)["w"]
        tensor([[1., 0., 2., 3.]])
    """
    rule = Rule(select, fraction, signed, granularity)
    require_same_names(before, after)
    fitted = {name: fit(name, before[name], after[name]) for name in after}
    tied = tied_names(fitted, after)
    names = scoped_names(after, scope or default_scope(include_embeddings=include_embeddings), tied)
    result = {kept.name: kept.merge() for kept in select_kept(rule, names, lambda name: (fitted[name], after[name]))}
    rest = fitted if others_return(others, rule) else after
    for name in after:
        if name not in result and name not in tied:
            result[name] = rest[name].detach().clone()
    return {name: result[tied.get(name, name)].detach() for name in after}


def others_return(others: Others, rule: Rule) -> bool:
    """Whether tensors outside the scope return to the start of the window.

    Raises:
        SettingError: `others` is unknown.
    """
    if others not in ("auto", "after", "before"):
        raise SettingError(f"others={others!r} is unknown.{nearest(others, ('auto', 'after', 'before'))}")
    return others == "before" or (others == "auto" and rule.keeps_none)


def require_same_names(before: Mapping[str, object], after: Mapping[str, object]) -> None:
    """Refuse two states of different models.

    Raises:
        StateMismatchError: a name is in one of them only.
    """
    lost, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    if lost or new:
        raise StateMismatchError(
            f"the states before and after hold different tensors: {len(lost)} only before (first three: {lost[:3]}), {len(new)} only after "
            f"(first three: {new[:3]}). Take both from one model; save both with save_pretrained so that names agree."
        )


def fit(name: str, before: Tensor, after: Tensor) -> Tensor:
    """`before` in the dtype and on the device of `after`.

    Raises:
        StateMismatchError: shapes differ, or the dtype of `after` cannot hold all values of `before`.
    """
    if before.shape != after.shape:
        raise StateMismatchError(
            f"'{name}' has shape {tuple(before.shape)} before and {tuple(after.shape)} after; take both states from one model "
            "(a vocabulary resized during training changes the embeddings)."
        )
    if before.dtype != after.dtype and torch.promote_types(before.dtype, after.dtype) != after.dtype:
        raise StateMismatchError(
            f"'{name}' is {before.dtype} before and {after.dtype} after: the old values would be rounded. "
            f"Convert the later state to {before.dtype} first."
        )
    return before.detach().to(after)


def drift_table(before: StateDict, after: StateDict, erased: StateDict | None = None) -> "pd.DataFrame":
    """How much each tensor moved, and how much of that an erasure took back.

    Args:
        before, after: states at the two ends of the window.
        erased: what `sparse_delta` made of them.

    Returns:
        One row per tensor, tied ones once, largest drift first. `name`, `module` (the name without its last part), `n_entries`,
        `n_changed`; `share_of_change`: its part of the squared norm of the whole change; with `erased` also `n_removed` (entries
        that moved and are no longer as in `after`), `share_of_removed` (its part of all removed entries) and `change_removed`
        (part of its own squared change that those entries carried). Shares of nothing are 0.

    Raises:
        StateMismatchError: names, shapes or dtypes do not fit.

    Example:
        >>> before, after = {"a.w": torch.zeros(2), "b.w": torch.zeros(2)}, {"a.w": torch.ones(2), "b.w": torch.zeros(2)}
        >>> drift_table(before, after).share_of_change.tolist()
        [1.0, 0.0]
    """
    require_same_names(before, after)
    if erased is not None:
        require_same_names(erased, after)
    tied = tied_names(before, after)
    rows = []
    for name in after:
        if name not in tied:
            rows.append(drift_row(name, fit(name, before[name], after[name]), after[name], None if erased is None else erased[name]))
    return drift_frame(rows)


def drift_row(name: str, before: Tensor, after: Tensor, erased: Tensor | None) -> Row:
    """Counts and squared norms of one tensor, for `drift_frame`."""
    delta, moved = change(before, after), before != after
    row: Row = {"name": name, "module": name.rpartition(".")[0], "n_entries": after.numel(), "n_changed": int(moved.sum())}
    row["change"] = _squared_norm(delta)
    if erased is not None:
        removed = moved & (fit(name, erased, after) != after)
        row |= {"n_removed": int(removed.sum()), "removed": _squared_norm(delta[removed])}
    return row


def _squared_norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def drift_frame(rows: list[Row]) -> "pd.DataFrame":
    """Rows of `drift_row` with the counts turned into shares; largest drift first."""
    import pandas as pd

    table = pd.DataFrame(rows)
    table.insert(4, "share_of_change", (table["change"] / table["change"].sum()).fillna(0.0))
    if "removed" in table:
        table["share_of_removed"] = (table["n_removed"] / table["n_removed"].sum()).fillna(0.0)
        table["change_removed"] = (table["removed"] / table["change"]).fillna(0.0)
    ordered = table.drop(columns=["change", "removed"], errors="ignore").sort_values("share_of_change", ascending=False, kind="stable")
    return ordered.reset_index(drop=True)
