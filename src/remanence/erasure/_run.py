"""One gradient erasure under way; `remanence.erasure.erasing` is its front door.

Axes: B batch.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.erasure.gradient import Eraser
from remanence.erasure.rows import keyword_rows, require_room
from remanence.errors import NonFiniteLoss, SettingError
from remanence.facts.records import Fact
from remanence.facts.scoring import KeywordScorer
from remanence.learner import STOP, Progress
from remanence.parts.language_model import evaluating, held_out_loss, logits_of, token_loss
from remanence.task import Data

CLIP = 1.0
_NEAR = 0.1
"""Nats below the target that still count as standing at it."""


@dataclass(frozen=True)
class ErasureOutcome:
    """How an erasure ended; its fields are what `certify` asks for.

    Args:
        method: name of the eraser and all parameters of the run.
        steps: gradient steps taken; a last one that was taken back counts.
        seconds: spent in the loop itself, not in its caller.
        seed: key of the order of batches.
        target_log_p: nats; where the facts' median keyword log-probability should be.
        log_p: nats; where it is.
        reason: "target reached", "already at the target", "utility floor", "steps used up" or "stopped by the caller".
        notes: what a reader of the result should know.
    """

    method: dict[str, Any]
    steps: int
    seconds: float
    seed: int
    target_log_p: float
    log_p: float
    reason: str
    notes: tuple[str, ...]


Erasing = Generator[Progress, str | None, ErasureOutcome]


class Run:
    """One erasure under way: the model, its optimizer, and the weights of the last look that was in order."""

    def __init__(
        self,
        model: nn.Module,
        facts: Sequence[Fact],
        tokenizer: Any,
        method: Eraser,
        retain: Data | None,
        ruler: Data | None,
        settings: dict[str, Any],
        seed: int,
    ) -> None:
        self.model, self.facts, self.method, self.retain, self.ruler = model, facts, method, retain, ruler
        self.settings, self.seed, self.notes = settings, seed, list[str]()
        self.target, self.floor = float(settings["target_log_p"]), settings["utility_floor"]
        self.rows = keyword_rows(facts, tokenizer)
        require_room(model, self.rows, "the facts")
        if retain is not None:
            require_room(model, retain, "the retained rows")
        self.scorer = KeywordScorer(tokenizer, [(fact.prompt, fact.keyword) for fact in facts])
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        if not self.weights:
            raise SettingError("no parameter of the model requires a gradient; call model.requires_grad_(True) first.")
        self.n_steps, self.seconds, self.n_done, self.reason, self.rise = int(settings["max_steps"]), 0.0, 0, "", 0.0

    def steps(self) -> Erasing:
        self._begin()
        while not self.reason:
            progress = self._step()
            if (yield progress) == STOP and not self.reason:
                self._look()
                self.reason = self.reason or "stopped by the caller"
            if not self.reason and self.n_done == self.n_steps:
                self.reason = "steps used up"
        self.model.zero_grad(set_to_none=True)
        return ErasureOutcome(
            self.settings, self.n_done, self.seconds, self.seed, self.target, self.log_p, self.reason, (*self.notes, *self.scorer.warnings)
        )

    def _begin(self) -> None:
        self.log_p = median(self.scorer(self.model).log_p)
        if self.log_p <= self.target:
            self.reason = "already at the target"
            self.notes.append(f"nothing was done: the facts stand at {self.log_p:.2f} nats, at or below the target {self.target:.2f}")
            return
        self.first_loss = held_out_loss(self.model, self.ruler) if self.floor and self.ruler is not None else None
        self.good, self.good_log_p = _copied(self.weights), self.log_p
        self.optimizer = torch.optim.AdamW(self.weights, lr=self.settings["lr"], weight_decay=0.0)

    def _step(self) -> Progress:
        started = perf_counter()
        loss, n_examples = self._descend()
        self.n_done += 1
        if self.n_done == 1:
            self._note_lost_updates()
        if self.n_done % self.settings["check_every"] == 0 or self.n_done == self.n_steps:
            self._look()
        self.seconds += perf_counter() - started
        return Progress(self.n_done, self.n_steps, loss, n_examples)

    # --- a step ------------------------------------------------------------------------------------------------

    def _descend(self) -> tuple[Tensor, int]:
        size, step = self.settings["batch_size"], self.n_done
        chosen = self.rows.rows(step, size, self.seed, "erase", "forget")
        n_examples = [0]

        def forget() -> Tensor:
            n_examples[0] += len(chosen)
            return self._keyword_losses(chosen).mean()

        def retain() -> Tensor:
            assert self.retain is not None
            # not `select`: a batch that straddles two passes may hold a row twice
            kept = self.retain.rows(step, size, self.seed, "erase", "retain")
            n_examples[0] += len(kept)
            return token_loss(self.model, self.retain.inputs[kept].to(self._device), self.retain.targets[kept].to(self._device))

        self.optimizer.zero_grad(set_to_none=True)
        # evaluation mode: dropout would draw from the global generators, and blur where the facts stand
        with evaluating(self.model), torch.enable_grad():
            loss = self.method.loss(forget, retain)
            loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        if not bool(torch.isfinite(loss.detach()) & torch.isfinite(norm)):
            self._give_up(f"the loss is {loss.item()} and the gradient's norm {norm.item()}", chosen)
        self.optimizer.step()
        return loss.detach(), n_examples[0]

    @property
    def _device(self) -> torch.device:
        return self.weights[0].device

    def _keyword_losses(self, chosen: Tensor) -> Tensor:
        """(B,) nats per keyword token of these facts."""
        inputs, targets = self.rows.inputs[chosen].to(self._device), self.rows.targets[chosen].to(self._device)
        is_keyword = targets >= 0
        nats = F.cross_entropy(logits_of(self.model, inputs)[is_keyword].float(), targets[is_keyword], reduction="none")
        fact_of = is_keyword.nonzero()[:, 0]
        return nats.new_zeros(len(chosen)).index_add(0, fact_of, nats) / is_keyword.sum(1)

    # --- looking -----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Where the facts and the held-out loss stand: go on, end, or go back."""
        try:
            self.log_p = median(self.scorer(self.model).log_p)
        except NonFiniteLoss:
            self.log_p = float("nan")
        if not np.isfinite(self.log_p):
            self._give_up(f"the weights give the keywords a log-probability of {self.log_p}", torch.arange(len(self.facts)))
        if self.log_p <= self.target:
            self._land()
            self.reason = "target reached"
        if self._is_below_floor():
            self._restore()
            self.reason = "utility floor"
            return
        if not self.reason:
            torch._foreach_copy_(self.good, [weight.detach() for weight in self.weights])
            self.good_log_p = self.log_p

    def _land(self) -> None:
        """Halve the way since the last look until the facts stand at the target and not beyond."""
        if self.log_p >= self.target - _NEAR:
            return
        beyond = _copied(self.weights)
        short, far = 0.0, 1.0
        for _ in range(12):
            share = (short + far) / 2
            self._stand_between(beyond, share)
            if self.log_p > self.target:
                short = share
                continue
            far = share
            if self.log_p >= self.target - _NEAR:
                return
        self._stand_between(beyond, far)

    def _stand_between(self, beyond: list[Tensor], share: float) -> None:
        with torch.no_grad():
            for weight, start, end in zip(self.weights, self.good, beyond, strict=True):
                wide = torch.promote_types(weight.dtype, torch.float32)
                weight.copy_(torch.lerp(start.to(wide), end.to(wide), share) if share < 1 else end)
        self.log_p = median(self.scorer(self.model).log_p)

    def _is_below_floor(self) -> bool:
        if self.first_loss is None or self.ruler is None:
            return False
        self.rise = held_out_loss(self.model, self.ruler) / self.first_loss - 1
        if not self.rise <= self.floor:  # NaN is below every floor
            self.notes.append(
                f"step {self.n_done} raised the held-out loss by {self.rise:.2%}, the floor allows {self.floor:.2%}: "
                f"the weights of the last look before it were restored"
            )
            return True
        return False

    def _restore(self) -> None:
        torch._foreach_copy_([weight.detach() for weight in self.weights], self.good)
        self.log_p = self.good_log_p

    def _give_up(self, what: str, chosen: Tensor) -> None:
        with evaluating(self.model):
            finite = torch.isfinite(self._keyword_losses(chosen)).cpu()
        bad = [self.facts[row].id for row, is_finite in zip(chosen.tolist(), finite.tolist(), strict=True) if not is_finite]
        place = f"facts of that batch without a finite loss: {', '.join(bad[:3])}" if bad else "every fact of that batch has a finite loss"
        self._restore()
        self.model.zero_grad(set_to_none=True)
        raise NonFiniteLoss(
            f"step {self.n_done + 1} of {self.settings['name']}: {what}; {place}. "
            f"The weights of the last look before it were restored; lower lr={self.settings['lr']}, or check the rows."
        )

    def _note_lost_updates(self) -> None:
        """In 16 bits, an update below half a unit in the last place leaves a weight where it was."""
        pairs = [(weight, start) for weight, start in zip(self.weights, self.good, strict=True) if weight.itemsize < 4]
        n_pushed = sum(int((weight.grad != 0).sum()) for weight, _ in pairs if weight.grad is not None)
        n_still = sum(int(((weight.grad != 0) & (weight.detach() == start)).sum()) for weight, start in pairs if weight.grad is not None)
        if n_still > n_pushed / 2:
            self.notes.append(
                f"{n_still / n_pushed:.0%} of the 16-bit weights that had a gradient did not move at the first step: "
                f"lr={self.settings['lr']} is below half a unit in their last place; raise it, or load the model in float32"
            )


def _copied(weights: list[nn.Parameter]) -> list[Tensor]:
    return [weight.detach().clone() for weight in weights]


def median(log_p: Tensor) -> float:
    """Over facts, the mean of the two middle ones where their number is even."""
    return float(np.median(log_p.double().cpu().numpy()))
