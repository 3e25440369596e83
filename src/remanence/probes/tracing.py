"""Facts traced over the steps of a training: memory, priming per theme, retention, and the loss on text that nobody trains on.

In a `transformers.Trainer`:

    tracer = FactTracer(facts, tokenizer, held_out=windows, injector=injector, path=Path("trace.jsonl"))
    Trainer(model, arguments, train_dataset=data, callbacks=[tracer]).train()
    print(tracer.curves())

In a loop of one's own:

    tracer.start(model)
    for step, batch in enumerate(batches, 1):
        loss = ...                       # backward, optimizer.step()
        tracer.step(model, step, loss)   # probes where the grid says so

Probes read the weights and change nothing: not the weights, the modes of modules, the gradients, nor any random state, so that a traced
run equals an untraced one bit for bit. Texts are tokenised once and each distinct prefix is read once a probe. Steps count updates that
are done: step 0 is the model before training. Weights that are not finite are never probed.

With `path` the trace is written after every probe. A run that was killed and resumes from a checkpoint keeps the rows up to that
checkpoint and measures the others again: the file ends as if nothing had happened.

The callback reads weights after the optimizer and every callback that acts on `on_optimizer_step`. Put it behind callbacks that change
weights in `on_step_end`.

Axes: N facts.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from remanence.errors import DataError, NonFiniteLoss, SettingError, StateMismatchError
from remanence.facts.injection import FactInjector
from remanence.facts.records import FactSet
from remanence.parts.language_model import held_out_loss
from remanence.probes._retained import retained
from remanence.probes._trace_file import Record, TraceFile
from remanence.probes.priming import PrimingProbe, PrimingScores
from remanence.state import all_finite
from remanence.task import Data

__all__ = ["FactTracer"]

_NAMES = ("fact", "theme", "kind")


class FactTracer(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Traces facts over steps, as a callback or by hand; see the module.

    Args:
        facts: what is (or will be) injected, with the prefixes of their themes. Those of a paired control run are the same.
        tokenizer: the model's own.
        held_out: next-token windows, (N, T) inputs and targets, whose loss is traced as well.
        every: probe every so many steps, or "log": at steps 0, 1, 2, 5, 10, 20, 50, 100, ... Step 0 is always probed, and so is the
            last step that a Trainer plans.
        last_exposure: how many steps are done when the last exposure has been learned; the grid begins anew there, and retention counts
            clean steps from it. None takes it from the injector's schedule, where there is one.
        path: file of the trace (JSON lines); needed to resume in another process.
        injector: names the facts of a batch that broke the training.

    Attributes:
        probe_seconds: seconds of each probe of this process, held-out loss and writing included.

    Raises:
        SettingError: `every` or `last_exposure` is out of range.
        DataError: the facts cannot be probed (see `PrimingProbe`).
    """

    def __init__(
        self,
        facts: FactSet,
        tokenizer: Any,
        held_out: Data | None = None,
        every: int | Literal["log"] = "log",
        last_exposure: int | None = None,
        path: Path | None = None,
        injector: FactInjector | None = None,
    ) -> None:
        if every != "log" and not (isinstance(every, int) and every > 0):
            raise SettingError(f"every={every!r} must be 'log' or a number of steps above 0.")
        if last_exposure is None and injector is not None and injector.schedule.last is not None:
            last_exposure = injector.schedule.last + 1
        if last_exposure is not None and last_exposure < 0:
            raise SettingError(f"last_exposure={last_exposure} must be 0 or more: the steps done once the last exposure is learned.")
        self.facts, self.every, self.last_exposure, self.injector = facts, every, last_exposure, injector
        self.probe_seconds: list[float] = []
        self._held_out = held_out
        self._probe = PrimingProbe(facts, tokenizer)
        self._before: PrimingScores | None = None
        self._trace = TraceFile(None if path is None else Path(path), _settings(facts, tokenizer, held_out, every, last_exposure))

    # --- in a loop of one's own ---------------------------------------------------------------------------------

    def start(self, model: nn.Module, step: int = 0) -> None:
        """Call it before the first step, or before going on at `step`.

        At step 0 the model is probed, and what was traced before is replaced. Beyond, rows up to `step` are kept: those of the file where
        there is one, else those in memory.

        Raises:
            NonFiniteLoss: the weights hold a NaN or an infinity.
            SettingError: there are no scores from before training to go on with.
            StateMismatchError: the file is a trace of other settings or, at step 0, of another model.
        """
        if step == 0:
            self._start_anew(model)
            return
        self._trace.load()
        if self._trace.before is None:
            raise SettingError(
                f"training goes on at step {step}, and the scores from before step 0 are not here"
                + (f" ({self._trace.path} is absent)" if self._trace.path else "")
                + ". Give the path of the trace that the run began with, or begin the run anew."
            )
        self._before = self._probe.restore(self._trace.before)
        self._trace.cut(step)

    def step(self, model: nn.Module, step: int, loss: Tensor | float | None = None) -> pd.DataFrame | None:
        """Tell the tracer that `step` steps are done.

        Args:
            model: as it is now.
            step: counted from 1, growing.
            loss: of this step, where it is to be watched; reading it waits for the device.

        Returns:
            The rows of this step, as in `curves`; None where the grid does not ask for it.

        Raises:
            NonFiniteLoss: the loss or, at a probe, the weights are NaN or infinite; names step and facts.
        """
        value = loss.item() if isinstance(loss, Tensor) else loss
        if value is not None and not math.isfinite(value):
            raise self._broken(f"the loss is {value}", step)
        return self.probe(model, step) if self.is_due(step) else None

    def is_due(self, step: int) -> bool:
        """Whether the grid asks for a probe when `step` steps are done."""
        clean = step - self.last_exposure if self.last_exposure is not None else -1
        return step == 0 or clean == 0 or any(map(self._on_grid, (step, clean)))

    def probe(self, model: nn.Module, step: int) -> pd.DataFrame:
        """Probe now, whatever the grid says.

        Returns:
            The rows of this step, as in `curves`.

        Raises:
            SettingError: `start` was not called, or the step does not lie beyond the last one traced.
            NonFiniteLoss: the weights are NaN or infinite.
        """
        if self._before is None:
            raise SettingError("the tracer has no scores from before training to compare with; call start(model) before the first step.")
        if step <= self._trace.last_step:
            raise SettingError(
                f"step {step} comes after step {self._trace.last_step} was traced; steps must grow. Call start(model) for another run, "
                f"start(model, step) for one that goes on."
            )
        began = time.perf_counter()
        self._require_finite(model, step)
        self._record(model, step, self._probe(model, self._before))
        self.probe_seconds.append(time.perf_counter() - began)
        return self._table([record for record in self._trace.rows("curve") if record["step"] == step])

    # --- results ------------------------------------------------------------------------------------------------

    def curves(self) -> pd.DataFrame:
        """One row a step and fact: step, fact, theme, kind and the measures of `PrimingScores.since`, in its units.

        `clean_steps` is the number of steps since the last exposure, negative before it, where that is known.
        """
        return self._table(self._trace.rows("curve"))

    @property
    def held_out(self) -> pd.DataFrame:
        """One row a probe: step, loss (nats a token); empty without held-out text."""
        rows = [(record["step"], record["loss"]) for record in self._trace.rows("held_out")]
        return pd.DataFrame(rows, columns=["step", "loss"]).astype({"step": "int64", "loss": "float64"})

    def retention(self, control: "FactTracer") -> pd.DataFrame:
        """What is left of memory and priming after clean steps, against a paired run that never saw the facts.

        Args:
            control: traced the same facts from the same model, in a run with the same seed and batches but without the exposures; built
                with the same `every` and `last_exposure`, so that both have one grid.

        Returns:
            One row a clean step and fact: step, clean_steps, fact, theme, kind; log_p and control_log_p, nats; retention and
            priming_retention, NaN for what was not learned (see `remanence.probes.retention`); half_life and priming_half_life in clean
            steps, the same in all rows of a fact, infinite where the trace ends before. Read log_p beside retention: a ratio hides
            where a fact started.

        Raises:
            SettingError: the last exposure is not known.
            DataError: the runs traced other facts or began with other models, or one of them was not probed right after the last exposure.
        """
        if self.last_exposure is None:
            raise SettingError("retention counts steps from the last exposure, which is not known; build the tracer with last_exposure=...")
        self._require_pair(control)
        return retained(self.curves(), control.curves(), self.last_exposure)

    def _require_pair(self, control: "FactTracer") -> None:
        if self.facts != control.facts:
            raise DataError("the two runs traced other facts or prefixes; trace the injected facts in the control run too.")
        if self._before is None or control._before is None:
            raise DataError("one of the two runs was not traced yet; call start(model) and train both.")
        if not _alike(self._before, control._before):
            raise DataError("the two runs began with different models; begin the control run from the same weights.")

    def _table(self, records: Sequence[Record]) -> pd.DataFrame:
        table = pd.DataFrame(records, columns=list(records[0]) if records else ["row", "step", *_NAMES]).drop(columns="row")
        counts = [name for name in ("step", "clean_steps") if name in table.columns]
        measures = [name for name in table.columns if name not in (*counts, *_NAMES)]
        return table.astype({**dict.fromkeys(counts, "int64"), **dict.fromkeys(measures, "float64")})

    # --- in a Trainer -------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        if state.is_world_process_zero:
            self.start(model, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        # a Trainer shows its callbacks no loss and hides NaN ones from its log; gradients tell, while the weights are still good.
        # In fp16 infinite gradients are routine: the scaler skips such steps.
        if not args.fp16 and not _gradients_finite(model):
            raise self._broken("the gradients are NaN or infinite", state.global_step + 1, args.output_dir)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        if state.is_world_process_zero and (self.is_due(state.global_step) or state.global_step == state.max_steps):
            self.probe(model, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise self._broken(f"the logged loss is {float(loss)}", state.global_step, args.output_dir)

    # --- inside -------------------------------------------------------------------------------------------------

    def _start_anew(self, model: nn.Module) -> None:
        began = time.perf_counter()
        self._require_finite(model, 0)
        before = self._probe(model)
        known = self._trace.before if self._trace.load() else None
        if known is not None and not _alike(self._probe.restore(known), before):
            raise StateMismatchError(f"{self._trace.path} is a trace of another model. Delete it or give another path.")
        self._before = before
        self._trace.begin(before.state_dict())
        self._record(model, 0, before)
        self.probe_seconds.append(time.perf_counter() - began)

    def _record(self, model: nn.Module, step: int, scores: PrimingScores) -> None:
        assert self._before is not None
        table = scores.since(self._before)
        if self.last_exposure is not None:
            table.insert(len(_NAMES), "clean_steps", step - self.last_exposure)
        rows = zip(*(table[name].tolist() for name in table.columns), strict=True)
        records: list[Record] = [{"row": "curve", "step": step, **_without_nan(zip(table.columns, row, strict=True))} for row in rows]
        if self._held_out is not None:
            records.append({"row": "held_out", "step": step, "loss": held_out_loss(model, self._held_out)})
        self._trace.add(records)

    def _on_grid(self, step: int) -> bool:
        if step < 1:
            return False
        if self.every != "log":
            return step % self.every == 0
        while step % 10 == 0:
            step //= 10
        return step in (1, 2, 5)

    def _require_finite(self, model: nn.Module, step: int) -> None:
        if not all_finite(dict(model.named_parameters())):
            raise self._broken("the weights hold a NaN or an infinity", step, since=self._trace.last_step if step else 0)

    def _broken(self, what: str, step: int, folder: str | None = None, since: int | None = None) -> NonFiniteLoss:
        """The error of a training that broke in the step that made it `step` steps, or in one after `since`."""
        if step == 0:
            return NonFiniteLoss(f"before the first step {what}; load the model anew.")
        since = step - 1 if since is None else since
        batches = "its batch" if since == step - 1 else f"the batches since step {since}"
        if self.injector is None:
            shown = f"which facts {batches} held is not known (give the tracer the injector)"
        else:
            names = dict.fromkeys(fact.id for earlier in range(since, step) for fact, _ in self.injector.at(earlier))
            shown = f"{batches} held {'the facts ' + ', '.join(map(repr, names)) if names else 'no fact'}"
        where = f"the last checkpoint in {folder}" if folder else "your last checkpoint"
        return NonFiniteLoss(f"at step {step} {what}; {shown}. Go on from {where}, with a lower learning rate or clipped gradients.")


def _alike(first: PrimingScores, second: PrimingScores) -> bool:
    """Whether two scores are of one model; other machines and thread counts round otherwise."""
    pairs = [(first.log_p, second.log_p), (first.prefix_log_p, second.prefix_log_p)]
    return all(torch.allclose(*pair, atol=1e-3) for pair in pairs)


def _gradients_finite(model: nn.Module) -> bool:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    # Norms and biases sum over all positions, and every layer has some: a loss that is not finite shows in each of them, at a
    # hundredth of the cost of looking through all matrices before every update.
    small = [gradient for gradient in gradients if gradient.dim() == 1] or gradients
    places = {gradient.device for gradient in small}
    return all(bool(torch.cat([one.flatten().float() for one in small if one.device == place]).isfinite().all()) for place in places)


def _without_nan(row: Iterable[tuple[str, Any]]) -> Record:
    """JSON has neither NaN nor infinity."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row}


def _settings(
    facts: FactSet, tokenizer: Any, held_out: Data | None, every: int | Literal["log"], last_exposure: int | None
) -> dict[str, str]:
    """What must agree for two traces to be pieces of one."""
    texts = [*(fact.text for fact in facts), *(prefix.prefix for prefix in facts.prefixes)]
    tables = [] if held_out is None else [held_out.inputs, held_out.targets]
    return {
        "facts": _digest([asdict(fact) for fact in facts]),
        "prefixes": _digest([asdict(prefix) for prefix in facts.prefixes]),
        "tokenizer": _digest([list(tokenizer(text)["input_ids"]) for text in texts]),
        "held_out": hashlib.sha256(b"".join(table.numpy().tobytes() for table in tables)).hexdigest()[:16],
        "every": str(every),
        "last_exposure": str(last_exposure),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
