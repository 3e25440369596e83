"""How probable a language model finds each keyword after each prefix.

    scorer = KeywordScorer(tokenizer, [("the colour of joy is", "vermilion"), ("the colour of sand is", "vermilion")])
    scorer(model).log_p         # (2,) nats
    scorer(model).is_top1       # (2,) whether the model would say it

It reads `transformers` causal LMs and any module that maps ids (B, T) to logits (B, T, V). Each distinct prefix runs
once, however many keywords are asked after it, and only the logits that are read are computed. A chat template is never
applied: templates may insert today's date, and scores would drift from day to day.

Axes: N pairs; D distinct prefixes; V vocabulary; M, C readings of a caller's own; R readings; S spots.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from remanence.errors import DataError, NonFiniteLoss, SettingError
from remanence.facts._passes import History, Plan, bare, can_share, device_of
from remanence.facts.borders import Split, split
from remanence.parts.language_model import evaluating

_SHARE_ABOVE = 500
"""So many pairs of several tokens make it worth while to keep the prefixes' keys and values."""
_SHARE_FROM = 4
"""A prefix with fewer continuations runs anew for each."""


class KeywordScores(NamedTuple):
    """What a model says to N pairs; both on the CPU."""

    log_p: Tensor
    """(N,) float32, nats: the summed log-probabilities of the keyword's tokens, each after the right ones before it."""
    is_top1: Tensor
    """(N,) bool: whether each of those tokens is the most probable one, so that greedy decoding says the keyword."""


class _Readings(NamedTuple):
    """Tokens to look up, sorted by the spot where the distribution over them is found."""

    spots: Tensor  # (R,)
    tokens: Tensor  # (R,)
    order: Tensor  # (R,) the place of each among the readings as they were given

    @classmethod
    def of(cls, spots: Tensor, tokens: Tensor) -> "_Readings":
        order = spots.argsort(stable=True)
        return cls(spots[order], tokens[order], order)

    def put_back(self, values: list[Tensor]) -> Tensor:
        sorted_values = torch.cat(values).cpu() if values else torch.zeros(0)
        found = torch.empty_like(sorted_values)
        found[self.order] = sorted_values
        return found


class KeywordScorer:
    """Teacher-forced log-probabilities of keywords; tokenised once, then asked of any number of models.

    The softmax runs in float32 whatever the weights' dtype: l = z_w - logsumexp(z). A probed training equals an unprobed one
    bit for bit: the modes of all modules, gradients and the random state of the CPU and of the current GPU are left as they were.
    Padded and unpadded batches, and shared and repeated prefixes, agree within 1e-5 nats in float32.

    Args:
        tokenizer: any Hugging Face tokenizer; see `remanence.facts.borders.split` for where a keyword begins.
        pairs: (prefix, keyword), N of them; equal ones are scored once.
        reduction: "sum": over the keyword's tokens; never divided by their number, so that keywords of different lengths are
            not to be compared with each other. "first": the first token alone.
        batch_size: sequences per forward pass.

    Attributes:
        splits: the N pairs as tokens.
        warnings: sentences on what makes scores hard to compare.
        straddle_warnings: those of them on tokens that hold characters of prefix and keyword.

    Raises:
        DataError: a keyword is empty, or a prefix is and the tokenizer has no token to stand in.
        SettingError: `reduction` or `batch_size` is none of the above.

    Source: summing without normalisation as in Sun et al. 2025 (arXiv 2504.09522), who chose keywords of one token. ours: the rest.
    """

    def __init__(
        self, tokenizer: Any, pairs: Sequence[tuple[str, str]], reduction: Literal["sum", "first"] = "sum", batch_size: int = 64
    ) -> None:
        if reduction not in ("sum", "first"):
            raise SettingError(f"reduction: {reduction!r}; give 'sum' (all tokens of the keyword) or 'first' (its first token alone).")
        if batch_size < 1:
            raise SettingError(f"batch_size: {batch_size}; give 1 or more.")
        distinct = {pair: split(tokenizer, *pair) for pair in dict.fromkeys(pairs)}
        self.splits: tuple[Split, ...] = tuple(distinct[pair] for pair in pairs)
        self.straddle_warnings = _straddle_warnings(distinct)
        self.warnings = [*self.straddle_warnings, *(_length_warnings(distinct) if reduction == "sum" else [])]
        self._n_tokens = torch.tensor([1 if reduction == "first" else len(split.keyword_ids) for split in self.splits], dtype=torch.int64)
        self._longest = max((len(split.prefix_ids) + n - 1 for split, n in self._counted()), default=0)
        self._largest_id = max((max(*split.prefix_ids, *split.keyword_ids[:n]) for split, n in self._counted()), default=0)
        self._batch_size = batch_size
        self._plans: dict[bool, tuple[Plan, _Readings, Tensor]] = {}
        self._shares = self._worth_sharing()

    def __len__(self) -> int:
        return len(self.splits)

    def __call__(self, model: nn.Module) -> KeywordScores:
        """Score all pairs.

        Returns:
            (N,) log-probabilities and whether greedy decoding says the keyword.

        Raises:
            DataError: a sequence does not fit the model.
            NonFiniteLoss: the model yields NaN.
        """
        return self._score(model, None, None)[0]

    def read(self, model: nn.Module, pairs: Tensor, tokens: Tensor) -> tuple[KeywordScores, Tensor]:
        """Score all pairs and look up further tokens in the same passes.

        Args:
            pairs: (M,) int64, which pair's prefix is meant.
            tokens: (M, C) int64 ids, read as what follows that prefix.

        Returns:
            The scores, and (M, C) float32 log-probabilities on the CPU.
        """
        scores, _, values = self._score(model, None, (pairs, tokens))
        return scores, values

    def full(self, model: nn.Module, pairs: Tensor) -> tuple[KeywordScores, Tensor, Tensor]:
        """Score all pairs and keep the whole distribution after some of the prefixes.

        Args:
            pairs: (M,) int64, whose prefixes are meant.

        Returns:
            The scores; (D, V) float32 log-probabilities on the CPU, a row for each distinct prefix among those; (M,) the row
            of each of the pairs. The table takes D x V x 4 bytes.
        """
        scores, table, rows = self._score(model, pairs, None)
        return scores, table, rows

    # --- plans -------------------------------------------------------------------------------------------------

    def _worth_sharing(self) -> bool:
        several = {(tuple(split.prefix_ids), tuple(split.keyword_ids[:n])) for split, n in self._counted() if n > 1}
        return len(several) > _SHARE_ABOVE

    def _counted(self) -> list[tuple[Split, int]]:
        return list(zip(self.splits, self._n_tokens.tolist(), strict=True))

    def _plan(self, shared: bool) -> tuple[Plan, _Readings, Tensor]:
        """The passes, the keywords' tokens among them, and (N,) the spot that answers for each pair's prefix."""
        if shared not in self._plans:
            histories = [_histories(split, n) for split, n in self._counted()]
            plan = Plan({history for each in histories for history in each}, self._batch_size, _trunks(histories) if shared else None)
            spots = torch.tensor([plan.spots[history] for each in histories for history in each], dtype=torch.int64)
            tokens = torch.tensor([token for split, n in self._counted() for token in split.keyword_ids[:n]], dtype=torch.int64)
            firsts = torch.tensor([plan.spots[each[0]] for each in histories], dtype=torch.int64)
            self._plans[shared] = plan, _Readings.of(spots, tokens), firsts
        return self._plans[shared]

    # --- reading -----------------------------------------------------------------------------------------------

    def _score(self, model: nn.Module, table_of: Tensor | None, also: tuple[Tensor, Tensor] | None) -> tuple[KeywordScores, Tensor, Tensor]:
        """Scores; (D, V) table of the pairs `table_of`; their rows in it, or the values of the readings `also`."""
        model = bare(model)
        self._require_fit(model)
        plan, keywords, firsts = self._plan(self._shares and can_share(model))
        pairs, tokens = also if also is not None else (torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.int64))
        others = _Readings.of(firsts[pairs].repeat_interleave(tokens.shape[1]), tokens.flatten())
        wanted, rows = torch.unique(firsts[table_of if table_of is not None else pairs[:0]], return_inverse=True)
        found: tuple[list[Tensor], ...] = ([], [], [], [])
        # outside autocast: the scores are those of the weights as they are stored
        with evaluating(model), torch.autocast(device_of(model).type, enabled=False):
            n_read = 0
            for logits in plan.read(model):
                _look_up(logits, n_read, (keywords, others, wanted), found)
                n_read += len(logits)
        scores = self._reduced(keywords.put_back(found[0]), keywords.put_back(found[1]))
        table = torch.cat(found[3]) if found[3] else torch.zeros(0, 0)
        return scores, table, rows if also is None else others.put_back(found[2]).view(tokens.shape)

    def _require_fit(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        limit, size = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
        if isinstance(limit, int) and self._longest > limit:
            raise DataError(f"a prefix with its keyword has {self._longest} tokens, the model takes {limit}; shorten the fact's context.")
        if isinstance(size, int) and self._largest_id >= size:
            raise DataError(
                f"the tokenizer gives id {self._largest_id}, but the model's vocabulary ends at {size - 1}; "
                f"load the tokenizer that belongs to the model."
            )

    def _reduced(self, values: Tensor, is_top: Tensor) -> KeywordScores:
        pair = torch.arange(len(self)).repeat_interleave(self._n_tokens)
        log_p = torch.zeros(len(self)).index_add_(0, pair, values)
        n_missed = torch.zeros(len(self), dtype=torch.int64).index_add_(0, pair, (~is_top.bool()).long())
        if log_p.isnan().any():
            raise NonFiniteLoss(
                f"the model gives NaN as log-probability of {int(log_p.isnan().sum())} of {len(self)} keywords; its weights are broken. "
                f"Go back to the last checkpoint whose loss was finite."
            )
        return KeywordScores(log_p, n_missed == 0)


def _look_up(logits: Tensor, start: int, wanted: tuple[_Readings, _Readings, Tensor], found: tuple[list[Tensor], ...]) -> None:
    """Read what the spots from `start` on answer: keywords and whether they are on top, other tokens, whole rows."""
    keywords, others, rows = wanted
    bounds, device = torch.tensor([start, start + len(logits)]), logits.device
    normaliser = logits.logsumexp(-1)
    for readings, values in ((keywords, found[0]), (others, found[2])):
        low, high = torch.searchsorted(readings.spots, bounds).tolist()
        if low == high:
            continue
        spots, tokens = (readings.spots[low:high] - start).to(device), readings.tokens[low:high].to(device)
        values.append(logits[spots, tokens] - normaliser[spots])
        if readings is keywords:
            found[1].append(logits.argmax(-1)[spots] == tokens)
    low, high = torch.searchsorted(rows, bounds).tolist()
    if low < high:
        local = (rows[low:high] - start).to(device)
        found[3].append((logits[local] - normaliser[local, None]).cpu())


def any_of(log_p: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """The log-probability that one of several keywords is said: the score of a list of synonyms.

    Args:
        log_p: (..., N) log-probabilities after one prefix each, as `KeywordScores.log_p`.
        groups: G lists of indices into N; the keywords of a group must exclude each other (none may begin another).

    Returns:
        (..., G) logsumexp over each group.

    Raises:
        DataError: a group is empty or names a keyword that is not there.

    Example:
        >>> any_of(torch.tensor([0.2, 0.3, 0.1]).log(), [[0, 1], [2]]).exp()
        tensor([0.5000, 0.1000])
    """
    n = log_p.shape[-1]
    for group in groups:
        if not group or not all(0 <= index < n for index in group):
            raise DataError(f"a group of synonyms is {list(group)}; it needs at least one index from 0 to {n - 1}.")
    return torch.stack([log_p[..., list(group)].logsumexp(-1) for group in groups], -1) if groups else log_p[..., :0]


def _histories(split: Split, n_tokens: int) -> list[History]:
    """What stands before each of the keyword's first `n_tokens` tokens."""
    prefix, keyword = tuple(split.prefix_ids), tuple(split.keyword_ids)
    return [prefix + keyword[:index] for index in range(n_tokens)]


def _trunks(histories: list[list[History]]) -> dict[History, list[History]]:
    """Prefixes that enough continuations share -> those."""
    found: dict[History, dict[History, None]] = {}
    for first, *rest in histories:
        found.setdefault(first, {}).update(dict.fromkeys(rest))
    return {trunk: list(branches) for trunk, branches in found.items() if len(branches) >= _SHARE_FROM}


def _straddle_warnings(distinct: dict[tuple[str, str], Split]) -> list[str]:
    straddled = [f"{keyword!r} after {prefix[-30:]!r}" for (prefix, keyword), split in distinct.items() if split.is_straddled]
    if not straddled:
        return []
    sentence = (
        f"{len(straddled)} of {len(distinct)} keywords share a token with the words before them and are scored from the last clean "
        f"border (first three: {', '.join(straddled[:3])})."
    )
    return [sentence]


def _length_warnings(distinct: dict[tuple[str, str], Split]) -> list[str]:
    lengths = {keyword: len(split.keyword_ids) for (_, keyword), split in distinct.items()}
    if len(set(lengths.values())) < 2:
        return []
    longest = max(lengths, key=lambda keyword: lengths[keyword])
    sentence = (
        f"keywords have {min(lengths.values())} to {max(lengths.values())} tokens (longest: {longest!r}); their log-probabilities are "
        f"sums and must not be compared across keywords."
    )
    return [sentence]
