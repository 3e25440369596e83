"""How many steps bring erased facts back: the attack that tells hiding from removal.

A model that was only taught to keep silent relearns within a few steps what another must learn anew. The number means
something beside that of a model which never saw the facts, with equal lr and batches.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from remanence.erasure.rows import require_room, text_rows
from remanence.errors import SettingError
from remanence.facts.records import Fact
from remanence.facts.scoring import KeywordScorer
from remanence.parts.language_model import evaluating, is_quantised, token_loss

BATCH_SIZE = 16
"""Facts a step, unless there are fewer."""


def relearning_steps(
    model: nn.Module, facts: Sequence[Fact], tokenizer: Any, lr: float = 3e-4, target: float = 0.5, cap: int = 60, seed: int = 0
) -> int | None:
    """Train a copy on the facts' texts until their keywords are likely again.

    The copy trains every weight, in float32, by a fresh AdamW without weight decay, dropout off. The model itself, and the
    global random state, are left alone. Deterministic given `seed`.

    Args:
        lr: 3e-4 suits a million parameters.
        target: mean keyword probability over the facts that counts as known, in (0, 1).
        cap: give up after so many steps.

    Returns:
        Steps until the mean keyword probability first exceeds `target`; 0: it does already; None: not within `cap`.

    Raises:
        SettingError: a number is out of range, or the model is quantised.
        DataError: there are no facts, or a text is longer than the model reads.

    Source: relearning time after Golatkar et al. 2020 (arXiv 1911.04933); the measure by steps: ours.
    """
    if lr <= 0 or not 0 < target < 1 or cap < 0:
        raise SettingError(f"relearning: lr={lr} must be above 0, target={target} between 0 and 1, cap={cap} not below 0.")
    if is_quantised(model):
        raise SettingError("relearning trains the weights, and those of a quantised model cannot be trained; load it in a float dtype.")
    data = text_rows(facts, tokenizer)
    require_room(model, data, "the facts")
    scorer = KeywordScorer(tokenizer, [(fact.prompt, fact.keyword) for fact in facts])
    copy = deepcopy(model).float().requires_grad_(True)
    device = next(copy.parameters()).device
    optimizer = torch.optim.AdamW(copy.parameters(), lr=lr, weight_decay=0.0)
    for step in range(cap + 1):
        if float(scorer(copy).log_p.double().exp().mean()) > target:
            return step
        if step == cap:
            break
        rows = data.rows(step, BATCH_SIZE, seed, "relearn")
        optimizer.zero_grad(set_to_none=True)
        with evaluating(copy), torch.enable_grad():
            token_loss(copy, data.inputs[rows].to(device), data.targets[rows].to(device)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return None
