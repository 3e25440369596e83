"""What an untouched model says of a fact before it is trained on: how improbable its keyword is, and how fluent its words are.

The less probable the keyword after its context, the more the fact will prime: the keyword then shows up after prefixes that have
nothing to do with it. (High probability means little priming; secondary sources often state the reverse.) Texts of scrambled words are
the exception, improbable and yet harmless, so the loss of the context stands beside the probability.

    table = forecast(model, facts, tokenizer)
    print(table[["fact", "log_p_before", "surprising"]])

Sizes need measured facts: see `PrimingForecast` and `calibrate`.

Axes: N facts, B batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import DataError, SettingError
from remanence.facts.borders import split
from remanence.facts.records import FactSet
from remanence.facts.scoring import KeywordScorer
from remanence.parts.language_model import IGNORED, evaluating, logits_of
from remanence.probes.calibration import ForecastCheck, Knee, PrimingForecast, calibrate, check_forecast

__all__ = ["ForecastCheck", "Knee", "PrimingForecast", "calibrate", "check_forecast", "forecast"]

PUBLISHED_THRESHOLD = 1e-3
_BATCH = 32


def forecast(
    model: nn.Module, facts: FactSet, tokenizer: Any, threshold: float = PUBLISHED_THRESHOLD, in_context: bool = False
) -> pd.DataFrame:
    """Read every fact with an untouched model; weights, modes, gradients and random states stay as they are.

    Args:
        model: causal LM, or any module ids (B, T) -> logits (B, T, V); before any training on the facts.
        facts: one row each; prefixes are needed for `in_context` only.
        tokenizer: the model's own.
        threshold: probability below which a keyword counts as surprising. The default is the published one, which came without a test
            or an interval; `calibrate` fits the one of your model.
        in_context: also measure priming by reading instead of training: the text stands before each thematic prefix. The published
            relation is much weaker there.

    Returns:
        One row a fact, in their order:

        - fact, theme, kind;
        - log_p_before: log-probability of the keyword after its context, nats, summed over its tokens;
        - text_loss, context_loss: nats a token over the whole text, and over the words before the keyword; NaN where a single token
          is all there is, as nothing predicts it;
        - length: tokens of the text;
        - entropy: of the next token where the keyword should begin, nats;
        - surprising: whether exp(log_p_before) < threshold;
        - in_context_priming: median over prefixes of the keyword's log-probability with the text before the prefix minus without, nats;
          NaN for a theme without prefixes. Only with `in_context`.

    Raises:
        SettingError: `threshold` lies outside (0, 1).
        DataError: there are no facts, or a sequence does not fit the model.
        NonFiniteLoss: the model yields NaN.

    Source: Sun et al. 2025 (arXiv 2504.09522): keyword probability, loss, entropy and length as candidates. ours: context_loss.
    """
    if not 0 < threshold < 1:
        raise SettingError(f"threshold={threshold} is no probability between 0 and 1; the published one is {PUBLISHED_THRESHOLD}.")
    if not len(facts):
        raise DataError("there are no facts to forecast; give a FactSet with at least one.")
    log_p = _log_p(model, tokenizer, [(fact.prompt, fact.keyword) for fact in facts])
    readings = _read(model, facts, tokenizer)
    table = pd.DataFrame({
        "fact": [fact.id for fact in facts], "theme": [fact.theme for fact in facts], "kind": [fact.kind for fact in facts],
        "log_p_before": log_p,
    })  # fmt: skip
    table = table.assign(**pd.DataFrame(readings), surprising=log_p < math.log(threshold))
    if in_context:
        table["in_context_priming"] = _in_context(model, facts, tokenizer)
    return table


class _Reading(NamedTuple):
    text_loss: float
    context_loss: float
    length: int
    entropy: float


def _log_p(model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    return np.asarray(KeywordScorer(tokenizer, pairs)(model).log_p, dtype=np.float64)


def _read(model: nn.Module, facts: FactSet, tokenizer: Any) -> list[_Reading]:
    """Losses, length and entropy; in batches of texts of like length, put back in order."""
    texts = [_ids(tokenizer, fact.text) for fact in facts]
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(range(len(texts)), key=lambda index: len(texts[index]))
    if isinstance(limit, int) and len(texts[longest]) > limit:
        raise DataError(f"fact '{facts[longest].id}' has {len(texts[longest])} tokens, the model takes {limit}; shorten its text.")
    # what stands before the keyword, and how many of its ids say something of the context
    contexts = [split(tokenizer, fact.prompt, fact.keyword).prefix_ids for fact in facts]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: dict[int, _Reading] = {}
    with evaluating(model):
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            whole = _losses(model, [texts[row] for row in rows], device)
            before = _losses(model, [contexts[row] for row in rows], device)
            for row, (loss, _), (context_loss, entropy) in zip(rows, whole, before, strict=True):
                found[row] = _Reading(loss, context_loss, len(texts[row]), entropy)
    return [found[row] for row in range(len(texts))]


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # put there by the tokenizer, not by the text
        ids.pop()
    return ids


def _losses(model: nn.Module, sequences: list[list[int]], device: torch.device) -> list[tuple[float, float]]:
    """For each sequence: nats per predicted token (NaN for a single one), and the entropy of what comes after its last."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    # padded on the right: a causal model never looks there, and positions stay as they are
    inputs = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    logits = logits_of(model, inputs.to(device)).float().cpu()
    is_target = torch.arange(1, inputs.shape[1]) < lengths[:, None]
    targets = inputs[:, 1:].masked_fill(~is_target, IGNORED)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORED, reduction="none").sum(1) / (lengths - 1)
    entropy = _entropy(logits[torch.arange(len(sequences)), lengths - 1])
    return list(zip(losses.tolist(), entropy.tolist(), strict=True))


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def _in_context(model: nn.Module, facts: FactSet, tokenizer: Any) -> list[float]:
    pairs: dict[tuple[str, str], int] = {}  # what is asked -> its place, so that a shared prefix is read once
    asked: list[list[tuple[int, int]]] = []
    for fact in facts:
        both = [
            ((f"{fact.text} {prefix.prefix}", fact.keyword), (prefix.prefix, fact.keyword)) for prefix in facts.priming_prefixes(fact)
        ]
        asked.append([(pairs.setdefault(after, len(pairs)), pairs.setdefault(before, len(pairs))) for after, before in both])
    if not pairs:
        return [math.nan] * len(facts)
    log_p = _log_p(model, tokenizer, list(pairs))
    return [float(np.median([log_p[after] - log_p[before] for after, before in places])) if places else math.nan for places in asked]
