"""Sparse updates inside a run of transformers' Trainer.

    trainer = Trainer(model, args, train_dataset=data, callbacks=[SparseUpdateCallback(fraction=0.04, every=8)])
    trainer.train()

The window's start is written into every checkpoint folder beside the optimizer's state, so that
`trainer.train(resume_from_checkpoint=...)` goes on as if it had not been interrupted.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from remanence.erasure._selection import Granularity, Rule, Selection
from remanence.erasure.scope import Scope
from remanence.erasure.update import SparseUpdate
from remanence.errors import SettingError, StateMismatchError
from remanence.state import load_state, save_state

_FILE = "sparse_update.safetensors"


class SparseUpdateCallback(TrainerCallback):  # type: ignore[misc]
    """Masks the model's change after every `every` optimizer steps, and after the last one.

    The mask comes before the Trainer logs, evaluates and saves, so that a checkpoint at the end of a window holds masked weights.
    An unfinished last window is masked when training ends, also when another callback ends it early.

    Args:
        select, fraction, granularity, signed, scope, include_embeddings, reset_moments: see `SparseUpdate`.
        every: optimizer steps per window; None: the whole training is one window.
        resume_from: checkpoint folder to resume from, where it does not lie in the Trainer's `output_dir`.

    Raises:
        SettingError: a setting is out of range; when training begins: with `load_best_model_at_end`, which would bring back weights
            from amid a window.
        StateMismatchError: training resumes from a checkpoint without a window, or with that of other settings.

    Source: Sun et al. 2025 (arXiv 2504.09522).
    """

    def __init__(
        self,
        select: Selection = "ignore_top",
        fraction: float = 0.08,
        every: int | None = None,
        *,
        include_embeddings: bool = False,
        reset_moments: bool = False,
        granularity: Granularity = "tensor",
        signed: bool = False,
        scope: Scope | None = None,
        resume_from: str | Path | None = None,
    ) -> None:
        Rule(select, fraction, signed, granularity)
        if every is not None and every < 1:
            raise SettingError(f"every={every} must be at least 1 step, or None to mask once, when training ends.")
        self.every, self._resume_from = every, resume_from
        self._settings: dict[str, Any] = {"select": select, "fraction": fraction, "granularity": granularity, "signed": signed}
        self._settings |= {"scope": scope, "include_embeddings": include_embeddings, "reset_moments": reset_moments}
        self.window: SparseUpdate | None = None
        self._masked_at = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end:
            raise SettingError("load_best_model_at_end would bring back weights from amid a window, unmasked; set it to False.")
        self.window = SparseUpdate(kwargs["model"], optimizer=kwargs["optimizer"], **self._settings).open()
        self._masked_at = state.global_step
        if state.global_step:
            self._resume(args, state.global_step)

    def _resume(self, args: Any, step: int) -> None:
        assert self.window is not None
        folder = Path(self._resume_from or args.resume_from_checkpoint or Path(args.output_dir, f"checkpoint-{step}"))
        if not (folder / _FILE).is_file():
            raise StateMismatchError(
                f"training resumes at step {step}, but {folder} holds no {_FILE}: what the weights were when the window began is "
                "unknown. Pass resume_from=<checkpoint folder>, or train with this callback from the start."
            )
        saved = load_state(folder / _FILE)
        if (saved["step"], saved["every"]) != (step, self.every):
            raise StateMismatchError(
                f"{folder / _FILE} was saved at step {saved['step']} with every={saved['every']}; training resumes at step {step} with "
                f"every={self.every}. Resume from its own checkpoint, with the settings it was saved with."
            )
        self.window.load_state_dict(saved["window"])
        self._masked_at = saved["masked_at"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_due = self.every is not None and state.global_step % self.every == 0
        if is_due or state.global_step >= state.max_steps:
            self._mask(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > self._masked_at:
            self._mask(state.global_step)
        if self.window is not None:
            self.window.remove()

    def _mask(self, step: int) -> None:
        assert self.window is not None
        self.window.apply()
        self._masked_at = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            assert self.window is not None
            saved = {"step": state.global_step, "every": self.every, "masked_at": self._masked_at, "window": self.window.state_dict()}
            save_state(Path(args.output_dir, f"checkpoint-{state.global_step}", _FILE), saved)
