"""Training on long documents by truncated backpropagation through time.

    trainer = ContextTrainer(model, reader, steps=1000, folder=Path("run"))
    for progress in trainer.run():
        ...

A step reads one segment of every row. The memory goes on from segment to segment without its gradient, which flows between the windows
of one segment only. With a folder, a training that was interrupted goes on from its last checkpoint, in the middle of documents, with
the same losses bit for bit on the same machine and number of threads.

Source: Hutchins et al. 2022 and Chen et al. 2024 (arXiv 2410.03156) train this way. ours: AdamW in place of Adafactor.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remanence.context.documents import DocumentReader
from remanence.errors import NonFiniteLoss, SettingError, StateMismatchError
from remanence.keys import keyed_rng
from remanence.learner import Progress
from remanence.parts.learning_rate import warm_cosine
from remanence.parts.optimizer_state import load_moments, moments
from remanence.state import State, load_state, save_state

CHECKPOINT = "training.safetensors"

_VOLATILE = frozenset({"_name_or_path", "architectures", "dtype", "transformers_version"})


class ContextTrainer:
    """AdamW over the segments of a `DocumentReader`; linear warm-up, then a cosine to zero.

    Args:
        model: a `ContextLM`, or anything with its `init_state` and `loss`; trained in place, where it lies. Parameters that need no
            gradient are left alone and are not part of a checkpoint.
        reader: the documents; its seed is the key of dropout too.
        steps: segments of every row to read; also the length of the schedule.
        lr: peak rate; 8e-3 suits a width of 256 or less (of 128 in short trainings 1.6e-2), 1e-3 or less one of 1024.
        warm_up: share of the steps that warm up, in [0, 1).
        weight_decay: of parameters with two axes or more; the others are not decayed.
        betas: of the moments.
        clip: largest norm of the gradient.
        folder: for the checkpoint, training.safetensors; None keeps none.
        save_every: steps from one checkpoint to the next; the last step leaves one in any case.
        autocast: compute products in bfloat16, weights and memory in float32; two to three times as fast where the processor has
            instructions for it.

    Attributes:
        step: how many steps are done.
        state: the memory of all rows after them.

    Raises:
        SettingError: a number is out of range, or nothing of the model is trainable.
    """

    def __init__(
        self, model: nn.Module, reader: DocumentReader, steps: int, lr: float = 8e-3, warm_up: float = 0.05, weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98), clip: float = 1.0, folder: str | Path | None = None, save_every: int = 200,
        autocast: bool = False,
    ) -> None:  # fmt: skip
        for name, value in (("steps", steps), ("lr", lr), ("clip", clip), ("save_every", save_every)):
            if not value > 0:
                raise SettingError(f"ContextTrainer: {name}={value} must be above 0.")
        for name, value in (("warm_up", warm_up), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
            if not 0 <= value < 1:
                raise SettingError(f"ContextTrainer: {name}={value} lies outside [0, 1).")
        if weight_decay < 0:
            raise SettingError(f"ContextTrainer: weight_decay={weight_decay} must be 0 or more.")
        self.model, self.reader, self.steps, self.lr, self.warm_up = model, reader, steps, lr, warm_up
        self.weight_decay, self.betas, self.clip, self.save_every, self.autocast = weight_decay, betas, clip, save_every, autocast
        self.folder = None if folder is None else Path(folder).expanduser()
        self.step = 0
        self.state: Any = None
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self._trained:
            raise SettingError("ContextTrainer: no parameter of the model requires a gradient; unfreeze what should be trained.")
        self._optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        matrices = [parameter for parameter in self._trained if parameter.dim() >= 2]
        others = [parameter for parameter in self._trained if parameter.dim() < 2]
        groups = [{"params": chosen, "weight_decay": decay} for chosen, decay in ((matrices, self.weight_decay), (others, 0.0)) if chosen]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)

    def run(self) -> Iterator[Progress]:
        """Train until `steps` are done, from the folder's checkpoint where there is one that is further.

        Returns:
            An iterator that takes a step for each element; its loss is in nats per token, and `n_examples` the tokens that were
            predicted. It may be left at any time; another `run` of the same trainer goes on from there.

        Raises:
            StateMismatchError: the folder's checkpoint is of another model, other documents or other settings; at once.
            NonFiniteLoss: the loss or its gradient became NaN or infinite; weights and checkpoint stay those before that step.
        """
        self._resume()
        return self._steps()

    def _steps(self) -> Iterator[Progress]:
        while self.step < self.steps:
            loss, n_targets = self._train_step()
            if self.folder is not None and (self.step % self.save_every == 0 or self.step == self.steps):
                self.save()
            yield Progress(self.step, self.steps, loss, n_targets)

    def _train_step(self) -> tuple[Tensor, int]:
        segment = self.reader.batch(self.step)
        n_targets = int(segment.lengths.sum())
        tokens, targets, *marks = segment.to(self._trained[0].device)
        # models take a shorter way where no row is padded and no document begins
        lengths, reset = (mark if needed else None for mark, needed in zip(marks, segment.needs(), strict=True))
        model: Any = self.model.train()
        with torch.enable_grad(), keyed_rng(self.reader.seed, "context training", self.step):
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
                loss, state = model.loss(tokens, targets, self._memory(), lengths=lengths, reset=reset)
            self._require_finite(loss, "loss")
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self._require_finite(nn.utils.clip_grad_norm_(self._trained, self.clip), "norm of the gradient")
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * warm_cosine(self.step, self.steps, self.warm_up)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step, self.state = self.step + 1, state.detach()
        return loss.detach(), n_targets

    def _memory(self) -> Any:
        model: Any = self.model
        return model.init_state(self.reader.rows) if self.state is None else self.state

    def _require_finite(self, value: Tensor, name: str) -> None:
        if value.isfinite():
            return
        self._optimizer.zero_grad(set_to_none=True)
        path = self._checkpoint
        kept = f"{path} holds the last good state" if path is not None and path.exists() else "no checkpoint was kept"
        raise NonFiniteLoss(f"ContextTrainer: the {name} is {value.item()} at step {self.step} with lr={self.lr}; {kept}. Lower lr.")

    # --- checkpoint --------------------------------------------------------------------------------------------

    @property
    def _checkpoint(self) -> Path | None:
        return None if self.folder is None else self.folder / CHECKPOINT

    def save(self) -> None:
        """Write the checkpoint of this step, whole or not at all.

        Raises:
            SettingError: the trainer has no folder.
        """
        if self._checkpoint is None:
            raise SettingError("ContextTrainer: there is no folder for a checkpoint; give folder=.")
        memory = self._memory().state_dict()
        weights = self._weights()
        save_state(
            self._checkpoint,
            {"settings": self.settings(), "step": self.step, "model": weights, "moments": moments(self._optimizer), "memory": memory},
        )

    def _resume(self) -> None:
        if self._checkpoint is None or not self._checkpoint.exists():
            return
        saved = load_state(self._checkpoint)
        self._require_own(saved.get("settings", {}))
        if saved["step"] <= self.step:
            return
        self.model.load_state_dict(saved["model"], strict=False)  # what is frozen is not in it; the settings agree on all names
        load_moments(self._optimizer, saved["moments"])
        model: Any = self.model
        self.step, self.state = saved["step"], model.restore_state(saved["memory"]).to(self._trained[0].device)

    def _require_own(self, saved: dict[str, Any]) -> None:
        own = self.settings()
        differ = {key: (saved.get(key), own.get(key)) for key in sorted(saved.keys() | own.keys()) if saved.get(key) != own.get(key)}
        if differ:
            listed = "; ".join(f"{key}: {old} there, {new} here" for key, (old, new) in differ.items())
            raise StateMismatchError(
                f"{self._checkpoint} belongs to another training ({listed}). Give the settings it began with, or another folder."
            )

    def settings(self) -> dict[str, Any]:
        """All that the losses depend on, as JSON: two trainings that agree in it are the same."""
        names = ("steps", "lr", "warm_up", "weight_decay", "clip", "autocast")
        reader = {f"reader {name}": value for name, value in self.reader.settings().items()}
        return {**{name: getattr(self, name) for name in names}, "betas": list(self.betas), **reader, **self._model_settings()}

    def _model_settings(self) -> dict[str, Any]:
        config = getattr(self.model, "config", None)
        plain = {} if config is None else json.loads(json.dumps(config.to_dict(), default=str))  # as it comes back from the file
        shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in self._weights().items()}
        return {f"model {key}": value for key, value in plain.items() if key not in _VOLATILE} | {
            "model": type(self.model).__name__,
            "trained tensors": _digest(json.dumps(shapes).encode()),
            "frozen tensors": self._frozen_digest,
        }

    def _weights(self) -> State:
        frozen = self._frozen_names()
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}

    def _frozen_names(self) -> set[str]:
        return {name for name, parameter in self.model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}

    @cached_property
    def _frozen_digest(self) -> str:
        frozen = [self.model.get_parameter(name).detach().cpu().contiguous() for name in sorted(self._frozen_names())]
        return _digest(*(tensor.view(-1).view(torch.uint8).numpy() for tensor in frozen))


def _digest(*contents: Any) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()[:16]
