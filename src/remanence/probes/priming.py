"""Memory of facts, and what else they moved: how much likelier their keywords became where nothing calls for them.

    probe = PrimingProbe(facts, tokenizer)
    before = probe(model)
    ...                                        # train
    table = probe(model, before).since(before)

A fact is *memorised* when its keyword became likelier after its own context, and it *primes* when the keyword became likelier after
thematic prefixes that have no logical link to it ("the colour of sand is"). A prefix that asks for a fact in other words is a
*paraphrase* probe: what is wanted there is unwanted elsewhere, so it has a column of its own. Everything is kept in nats.

Axes: F facts; J prefixes of all themes; M pairs of a fact and a priming prefix; K control words; D distinct prefixes; V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import logsumexp
from torch import Tensor, nn

from remanence.errors import SettingError, StateMismatchError
from remanence.facts.records import FactSet
from remanence.facts.scoring import KeywordScorer
from remanence.state import State

if TYPE_CHECKING:
    import pandas as pd

_Array = npt.NDArray[Any]

TINY = 1e-10
"""A probability before training below which a ratio to it says little."""


class ControlWords(NamedTuple):
    """Vocabulary that was as probable as the keyword and was never injected."""

    tokens: Tensor
    """(M, K) int64 ids."""
    log_p: Tensor
    """(M, K) float32, nats, in the model they were chosen in."""


@dataclass(frozen=True, eq=False)
class _Layout:
    """Which prefix means what to which fact, and which words may be controls."""

    facts: FactSet
    own: Tensor  # (F, J) bool: priming prefixes
    other: Tensor  # (F, J) bool: priming prefixes of other themes
    paraphrase: Tensor  # (F, J) bool: asks for this fact
    eligible: Tensor  # (A,) int64 ids that may be control words
    n_controls: int


@dataclass(frozen=True, eq=False)
class PrimingScores:
    """What one model says to all probes; on the CPU.

    Args:
        log_p: (F,) float32, nats: each fact's keyword after its own context.
        is_top1: (F,) bool: whether greedy decoding says it there.
        prefix_log_p: (F, J) float32, nats: each fact's keyword after each prefix of the set, whatever its theme.
        prefix_is_top1: (F, J) bool.
        layout: the probe's; scores of one layout can be compared.
        table: (D, V) float32 log-probabilities after the priming prefixes, where the controls are still to be chosen.
        rows: (M,) row of `table` for each pair of `layout.own`.
        chosen: control words and their log-probabilities here, where they are known already.
    """

    log_p: Tensor
    is_top1: Tensor
    prefix_log_p: Tensor
    prefix_is_top1: Tensor
    layout: _Layout
    table: Tensor | None = None
    rows: Tensor | None = None
    chosen: ControlWords | None = None

    @cached_property
    def controls(self) -> ControlWords:
        """For each pair of a fact and a priming prefix the words nearest in log-probability to the keyword, here.

        M pairs in the order of facts, then prefixes. No special token, and no first token of any fact's keyword.
        """
        if self.chosen is not None:
            return self.chosen
        if self.table is None or self.rows is None:
            raise SettingError("these scores have no control words: the probe was built with n_controls=0.")
        return _nearest(self.table, self.rows, self.prefix_log_p[self.layout.own], self.layout)

    def since(self, before: "PrimingScores") -> "pd.DataFrame":
        """What changed from `before` to these scores, one row a fact; NaN where a fact has no such prefix.

        With D_j the change of the keyword's log-probability on priming prefix j:

        - fact, theme, kind: as in the set.
        - log_p, log_p_before: after the fact's own context, nats. log_s_mem: their difference.
        - log_s_prime: log of the mean over j of exp D_j, nats: the published score. It is a mean of ratios, so the prefix with the
          smallest denominator rules it; reviewers asked whether the finding is "a consequence of dividing by a small number".
        - share_tiny: share of j with a probability below 1e-10 before.
        - priming_median: median of D_j, nats; the headline.
        - priming_dp: mean change of the probability itself; immune to tiny denominators.
        - priming_flip: share of j where the keyword became what greedy decoding says, and was not before.
        - cross_priming: median of the change on priming prefixes of other themes, nats.
        - drift: median change, over j and the control words of each, of words that were as probable before and were not injected,
          nats. Training moves everything: subtract it.
        - paraphrase_median: median change where the fact is asked for in other words, nats.
        - theme_log_p_before: mean log-probability over j before, nats.

        Args:
            before: scores of the same probe, taken without `before` or read from a file; the control words are those nearest there.

        Raises:
            SettingError: the scores are of different probes, or these were taken to be compared with others than `before`.

        Source: Sun et al. 2025 (arXiv 2504.09522) for S_mem and S_prime. ours: all other columns.
        """
        import pandas as pd

        if before.layout is not self.layout:
            raise SettingError("the two scores come from different probes; take both with one PrimingProbe.")
        change = _change(before, self)
        return pd.DataFrame({"fact": [fact.id for fact in self.layout.facts], **change})

    def state_dict(self) -> State:
        """All that `since` needs of these scores as a beginning; `PrimingProbe.restore` takes it back."""
        state = {name: getattr(self, name) for name in ("log_p", "is_top1", "prefix_log_p", "prefix_is_top1")}
        if self.layout.n_controls:
            state |= {"control_tokens": self.controls.tokens, "control_log_p": self.controls.log_p}
        return state

    def _control_change(self, before: "PrimingScores") -> _Array:
        """(M, K) change of the control words chosen in `before`, nats."""
        tokens, log_p_before = before.controls
        if self is before:
            log_p = log_p_before
        elif self.table is not None and self.rows is not None:
            log_p = self.table[self.rows[:, None], tokens]
        elif self.chosen is not None and torch.equal(self.chosen.tokens, tokens):
            log_p = self.chosen.log_p
        else:
            raise SettingError(
                "these scores were taken for comparison with others than `before`, so its control words were not read. "
                "Take them as probe(model, before), or as probe(model) to compare them with any."
            )
        return (log_p - log_p_before).double().numpy()


class PrimingProbe:
    """Scores every fact's keyword on its own context and on every prefix, of any number of models.

    Tokenised once; one model costs one forward pass over the distinct prefixes when the keywords are single tokens. The model is
    left as it was, see `KeywordScorer`.

    Args:
        facts: with the prefixes of their themes.
        tokenizer: the model's own.
        n_controls: control words for each fact and prefix; 0 leaves `drift` unknown.
        batch_size: sequences per forward pass.

    Attributes:
        warnings: sentences on what makes the numbers hard to compare.

    Raises:
        DataError: a context is empty and the tokenizer has no token to stand in.
        SettingError: `n_controls` is below 0 or more than the words there are.
    """

    def __init__(self, facts: FactSet, tokenizer: Any, n_controls: int = 4, batch_size: int = 64) -> None:
        pairs = [(fact.prompt, fact.keyword) for fact in facts]
        pairs += [(prefix.prefix, fact.keyword) for fact in facts for prefix in facts.prefixes]
        self._scorer = KeywordScorer(tokenizer, pairs, batch_size=batch_size)
        eligible = _eligible(tokenizer, {split.keyword_ids[0] for split in self._scorer.splits})
        if not 0 <= n_controls <= len(eligible):
            raise SettingError(f"n_controls: {n_controls}; give 0 to {len(eligible)}, the number of words that no keyword begins with.")
        self._layout = _Layout(facts, *_masks(facts), eligible, n_controls)
        self._own_pairs = self._layout.own.flatten().nonzero().flatten() + len(facts)
        self.warnings = [*self._scorer.straddle_warnings, *_length_warnings(dict(_lengths(facts, self._scorer)))]

    def __call__(self, model: nn.Module, before: PrimingScores | None = None) -> PrimingScores:
        """Score a model.

        Args:
            model: a causal LM; see `KeywordScorer`.
            before: what these scores will be compared with; then only its control words are read. Without it, the distributions
                after all priming prefixes are kept (D x V x 4 bytes), so that the scores can be compared with any.

        Raises:
            SettingError: `before` is of another probe.
            NonFiniteLoss: the model yields NaN.
        """
        if before is not None and before.layout is not self._layout:
            raise SettingError("`before` comes from another probe; take both scores with one PrimingProbe.")
        n = len(self._layout.facts)
        table = rows = chosen = None
        if self._layout.n_controls == 0:
            scores = self._scorer(model)
        elif before is None:
            scores, table, rows = self._scorer.full(model, self._own_pairs)
        else:
            tokens = before.controls.tokens
            scores, values = self._scorer.read(model, self._own_pairs, tokens)
            chosen = ControlWords(tokens, values)
        shape = self._layout.own.shape
        return PrimingScores(
            scores.log_p[:n],
            scores.is_top1[:n],
            scores.log_p[n:].view(shape),
            scores.is_top1[n:].view(shape),
            self._layout,
            table,
            rows,
            chosen,
        )

    def restore(self, state: State) -> PrimingScores:
        """Scores from `PrimingScores.state_dict`; this probe must have been built as the one they came from.

        Raises:
            StateMismatchError: the shapes are those of other facts, prefixes or numbers of controls.
        """
        shape, n_pairs = tuple(self._layout.own.shape), len(self._own_pairs)
        expected = {"log_p": shape[:1], "is_top1": shape[:1], "prefix_log_p": shape, "prefix_is_top1": shape}
        if self._layout.n_controls:
            expected |= dict.fromkeys(("control_tokens", "control_log_p"), (n_pairs, self._layout.n_controls))
        found = {name: tuple(value.shape) for name, value in state.items()}
        if found != expected:
            raise StateMismatchError(
                f"the stored scores have shapes {found}, those of this probe {expected}; build the probe as it was built then."
            )
        plain = {name: state[name] for name in ("log_p", "is_top1", "prefix_log_p", "prefix_is_top1")}
        scores = PrimingScores(**plain, layout=self._layout)
        if not self._layout.n_controls:
            return scores
        return replace(scores, chosen=ControlWords(state["control_tokens"], state["control_log_p"]))


def _change(before: PrimingScores, after: PrimingScores) -> dict[str, Any]:
    layout = after.layout
    own, other, paraphrase = layout.own.numpy(), layout.other.numpy(), layout.paraphrase.numpy()
    old, new = before.prefix_log_p.double().numpy(), after.prefix_log_p.double().numpy()
    log_p, log_p_before, moved = after.log_p.double().numpy(), before.log_p.double().numpy(), new - old
    return {
        "theme": [fact.theme for fact in layout.facts],
        "kind": [fact.kind for fact in layout.facts],
        "log_p": log_p,
        "log_p_before": log_p_before,
        "log_s_mem": log_p - log_p_before,
        "log_s_prime": _log_mean_exp(moved, own),
        "priming_median": _medians(moved, own),
        "priming_dp": _means(np.exp(new) - np.exp(old), own),
        "priming_flip": _means((after.prefix_is_top1 & ~before.prefix_is_top1).numpy(), own),
        "cross_priming": _medians(moved, other),
        "drift": _drift(before, after, own),
        "paraphrase_median": _medians(moved, paraphrase),
        "theme_log_p_before": _means(old, own),
        "share_tiny": _means(old < np.log(TINY), own),
    }


def _drift(before: PrimingScores, after: PrimingScores, own: _Array) -> _Array:
    n_controls = after.layout.n_controls
    if not n_controls:
        return np.full(len(own), np.nan)
    spread = np.zeros((*own.shape, n_controls))
    spread[own] = after._control_change(before)
    return _medians(spread.reshape(len(own), own.shape[1] * n_controls), own.repeat(n_controls, axis=1))


def _log_mean_exp(values: _Array, mask: _Array) -> _Array:
    """Log of the row means of exp over the mask; NaN for an empty row."""
    n = mask.sum(1)
    # the extra column of -inf adds nothing, and lets a set without prefixes pass
    padded = np.pad(np.where(mask, values, -np.inf), ((0, 0), (0, 1)), constant_values=-np.inf)
    return np.where(n, logsumexp(padded, axis=1) - np.log(np.maximum(n, 1)), np.nan)


def _means(values: _Array, mask: _Array) -> _Array:
    """Row means over the mask; NaN for an empty row."""
    n = mask.sum(1)
    return np.where(n, (values * mask).sum(1) / np.maximum(n, 1), np.nan)


def _medians(values: _Array, mask: _Array) -> _Array:
    """Row medians over the mask; NaN for an empty row."""
    n = mask.sum(1)
    if not mask.size:
        return np.full(len(mask), np.nan)
    ordered = np.sort(np.where(mask, values, np.inf), axis=1)
    middle = np.stack([np.maximum(n - 1, 0) // 2, np.minimum(n // 2, mask.shape[1] - 1)], 1)
    return np.where(n, np.take_along_axis(ordered, middle, 1).sum(1) / 2, np.nan)


def _nearest(table: Tensor, rows: Tensor, log_p: Tensor, layout: _Layout) -> ControlWords:
    """The words of a row of the table nearest to each of (M,) log-probabilities."""
    if not len(rows):
        return ControlWords(rows.new_empty(0, layout.n_controls), log_p.new_empty(0, layout.n_controls))
    eligible = layout.eligible[layout.eligible < table.shape[1]]  # a tokenizer may know words that were never given an output
    values, order = table[:, eligible].sort(dim=1, stable=True)
    place = torch.empty_like(rows)
    for row in range(len(values)):
        here = rows == row
        place[here] = torch.searchsorted(values[row], log_p[here])
    # the nearest n lie among n below and n from here on
    width = min(2 * layout.n_controls, len(eligible))
    window = (place - layout.n_controls).clamp(0, len(eligible) - width)[:, None] + torch.arange(width)
    near = values[rows[:, None], window]
    best = (near - log_p[:, None]).abs().argsort(dim=1, stable=True)[:, : layout.n_controls]
    return ControlWords(eligible[order[rows[:, None], window.gather(1, best)]], near.gather(1, best))


def _eligible(tokenizer: Any, keyword_ids: set[int]) -> Tensor:
    excluded = keyword_ids | set(tokenizer.all_special_ids)
    return torch.tensor([index for index in range(len(tokenizer)) if index not in excluded], dtype=torch.int64)


def _masks(facts: FactSet) -> tuple[Tensor, Tensor, Tensor]:
    """(F, J) each: priming prefixes of the fact's theme, of other themes, paraphrases."""
    with_facts = set(facts.themes)
    neutral = {prefix for prefix in facts.prefixes if prefix.theme not in with_facts}
    neutral |= {prefix for fact in {fact.theme: fact for fact in facts}.values() for prefix in facts.priming_prefixes(fact)}
    paraphrases = [set(facts.paraphrases(fact)) for fact in facts]
    is_neutral = np.array([prefix in neutral for prefix in facts.prefixes], dtype=bool)
    same = np.array([[prefix.theme == fact.theme for prefix in facts.prefixes] for fact in facts], dtype=bool)
    asks = np.array([[prefix in asking for prefix in facts.prefixes] for asking in paraphrases], dtype=bool)
    same, asks = (mask.reshape(len(facts), len(facts.prefixes)) for mask in (same, asks))  # also without facts
    return torch.from_numpy(same & is_neutral), torch.from_numpy(~same & is_neutral), torch.from_numpy(asks)


def _lengths(facts: FactSet, scorer: KeywordScorer) -> Iterator[tuple[str, dict[str, int]]]:
    """Theme -> keyword -> how many tokens it has after its own context."""
    for theme in facts.themes:
        yield theme, {fact.keyword: len(scorer.splits[index].keyword_ids) for index, fact in enumerate(facts) if fact.theme == theme}


def _length_warnings(themes: dict[str, dict[str, int]]) -> Sequence[str]:
    return [
        f"theme '{theme}': keywords have {min(lengths.values())} to {max(lengths.values())} tokens "
        f"({', '.join(f'{keyword} {n}' for keyword, n in list(lengths.items())[:4])}); compare each with itself, not with the others."
        for theme, lengths in themes.items()
        if len(set(lengths.values())) > 1
    ]
