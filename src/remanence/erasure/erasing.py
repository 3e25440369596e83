"""The loop of the gradient erasers: it stops at a target, never after a number of epochs.

    for progress in (steps := erase(model, facts, tokenizer, GradientDifference(), retain, target_log_p=-11.3)):
        ...
    outcome = finish(erase(...))  # for callers who do not care about steps

Erasing too much is an error of the same rank as erasing too little: a keyword that is far less likely than one never
learned stands out as well. So the facts are scored as the loop goes; once their median log-probability reaches the target,
the way since the last look is halved again and again until the model stands at the target, not beyond it.
"""

from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np
from torch import nn

from remanence.erasure._run import CLIP, Erasing, ErasureOutcome, Run, median
from remanence.erasure.gradient import Eraser
from remanence.erasure.rows import overlap, text_rows
from remanence.errors import DataError, SettingError
from remanence.facts.records import Fact
from remanence.facts.scoring import KeywordScorer
from remanence.parts.language_model import is_quantised
from remanence.task import Data


def finish(steps: Erasing) -> ErasureOutcome:
    """Run an erasure to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            outcome: ErasureOutcome = end.value
            return outcome


def uniform_log_p(model: nn.Module) -> float:
    """Log-probability of a uniform guess over the vocabulary: what a model that knows nothing gives any one token.

    Raises:
        SettingError: the model's config names no vocabulary.
    """
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(size, int):
        raise SettingError("the model's config has no vocab_size, so there is no default target; give target_log_p.")
    return -float(np.log(size))


def stand_in(target: float) -> str:
    """The warning that goes with `uniform_log_p`."""
    return f"no target from a model that never saw the facts: a uniform guess over the vocabulary, {target:.2f} nats, stands in for it"


def median_log_p(model: nn.Module, facts: Sequence[Fact], tokenizer: Any) -> float:
    """Median over facts of the keyword's log-probability after its own context, in nats.

    Of a model that never saw the facts it is the natural target of an erasure.
    """
    return median(KeywordScorer(tokenizer, [(fact.prompt, fact.keyword) for fact in facts])(model).log_p)


def erase(
    model: nn.Module,
    facts: Sequence[Fact],
    tokenizer: Any,
    method: Eraser,
    retain: Data | Sequence[Fact] | None = None,
    target_log_p: float | None = None,
    steps: int = 100,
    batch_size: int = 8,
    lr: float = 1e-4,
    seed: int = 0,
    utility_floor: float | None = None,
    held_out: Data | None = None,
    check_every: int = 1,
    allow_overlap: bool = False,
) -> Erasing:
    """Take facts out of a causal language model by gradient steps, in place; one `Progress` a step.

    AdamW without weight decay, gradients clipped to norm 1, dropout off. Every parameter that requires a gradient moves.
    Deterministic given `seed`; the global random state is left alone. Sending `remanence.learner.STOP` ends early.
    One copy of the trained weights is held beside the optimizer's two.

    Args:
        model: any `transformers` causal LM, on any device.
        facts: what to erase.
        tokenizer: the model's own.
        method: what a step minimises.
        retain: next-token windows, or facts whose whole texts are used; what must stay.
        target_log_p: nats; None means a uniform guess over the vocabulary, for want of better. Give the `median_log_p` of a
            model that never saw the facts where there is one.
        steps: at most so many.
        batch_size: facts a step, and as many retained rows.
        lr: 1e-4 suits a million parameters, 1e-5 is usual for 7 billion.
        utility_floor: largest relative rise of the held-out loss that is put up with; 0.02 is 2 %.
        held_out: where that loss is measured; `retain` when absent.
        check_every: steps between two looks at the facts and at the held-out loss; a breach costs at most so many steps.
        allow_overlap: retain rows may state a fact that is to be erased.

    Returns:
        A generator whose return value is an `ErasureOutcome`. A model already at the target is not touched.

    Raises:
        SettingError: a number is out of range, the model is quantised or frozen, or `retain` or `held_out` is missing.
        DataError: no facts, rows longer than the model reads, or retained rows that state a fact.
        NonFiniteLoss: while running; names step and fact. The model is then as it was at the last look.

    Source: the stop at a target, as against fixed epochs: ours, after the over-erasing that Maini et al. 2024
        (arXiv 2401.06121) show for gradient ascent.
    """
    _check_numbers(steps=steps, batch_size=batch_size, lr=lr, check_every=check_every, utility_floor=utility_floor)
    if is_quantised(model):
        raise SettingError("the model is quantised: a gradient step on rounded weights has no meaning. Load it in a float dtype.")
    kept = _retained(facts, retain, tokenizer, method, allow_overlap)
    ruler = held_out if held_out is not None else kept
    if utility_floor is not None and (ruler is None or len(ruler) == 0):
        raise SettingError(f"utility_floor={utility_floor} needs text to measure the loss on; give held_out or retain.")
    target = uniform_log_p(model) if target_log_p is None else target_log_p
    parameters: dict[str, Any] = {"name": method.name, **(asdict(method) if is_dataclass(method) and not isinstance(method, type) else {})}
    parameters |= {"optimizer": "AdamW, no weight decay", "lr": lr, "gradient_norm_clip": CLIP, "batch_size": batch_size}
    parameters |= {"max_steps": steps, "target_log_p": target, "utility_floor": utility_floor, "check_every": check_every}
    run = Run(model, facts, tokenizer, method, kept, ruler, parameters, seed)
    if target_log_p is None:
        run.notes.append(stand_in(target))
    if utility_floor is not None and held_out is None and method.needs_retain:
        run.notes.append("the utility floor was measured on the retained rows, which the eraser trains on")
    return run.steps()


def _check_numbers(**settings: float | None) -> None:
    for name, value in settings.items():
        if value is not None and not value > 0:
            raise SettingError(f"erase: {name}={value} must be above 0.")


def _retained(
    facts: Sequence[Fact], retain: Data | Sequence[Fact] | None, tokenizer: Any, method: Eraser, allow_overlap: bool
) -> Data | None:
    if retain is None or len(retain) == 0:
        if method.needs_retain:
            raise SettingError(f"{method.name} trains on what must stay known; give retain, or choose GradientAscent, which needs none.")
        return None
    found = [] if allow_overlap else overlap(facts, retain, tokenizer)
    if found:
        listed = "; ".join(f"row {row}: fact '{name}'" for row, name in found[:5])
        n_rows = len({row for row, _ in found})
        raise DataError(
            f"{n_rows} of {len(retain)} retained rows state a fact that is to be erased ({listed}{'; ...' if len(found) > 5 else ''}). "
            f"Take them out, or pass allow_overlap=True."
        )
    return retain if isinstance(retain, Data) else text_rows(retain, tokenizer)
