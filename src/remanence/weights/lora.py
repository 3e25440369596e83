"""One low-rank adapter and one head per task, through peft.

Axes: B batch, C classes, D width.

Source: Hu et al. 2021, LoRA (arXiv 2106.09685); the adapters themselves are peft's.
"""

import hashlib
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import DataError, ErasureNotSupported, SettingError
from remanence.keys import keyed_rng
from remanence.learner import Cursor, Footprint, Learner, Prediction, Steps, require_learnable
from remanence.parts import ClassHead, PrototypeHead, TaskBook, VisionHost, run_verb
from remanence.parts.heads import nearest_mean_logits
from remanence.parts.learning_rate import warm_cosine
from remanence.parts.optimizer_state import load_moments, moments
from remanence.state import State, state_bytes
from remanence.task import Data, Task


class LoRA(Learner):
    """A frozen ViT to which every task adds an adapter and a head of its own.

    Tasks never share a trained number, so that nothing is disturbed and `forget` of a task is exact: what stays equals,
    bit for bit, a learner that never learned it. A part of a task cannot be taken out.

    Args:
        backbone: folder of a ViT, or a model; never trained.
        rank: r of the adapters.
        alpha: their scale is alpha / r.
        modules: suffixes of the linear layers that are adapted.
        router: how a task is chosen where the stream does not tell its name. "prototype": the task of the class mean that
            is nearest on the frozen features; costs one mean per class. "oracle": never chosen; the name is needed.
        epochs: passes over a task's train set.
        batch_size: examples per step.
        lr: peak rate of AdamW, without weight decay; falls to zero along a cosine within each task.
        seed: key of all random choices.
        device: where it runs.
    """

    store = "weights"

    def __init__(
        self,
        backbone: str | Path | nn.Module,
        rank: int = 4,
        alpha: float = 8.0,
        modules: tuple[str, ...] = ("q_proj", "v_proj"),
        router: Literal["prototype", "oracle"] = "prototype",
        epochs: int = 15,
        batch_size: int = 32,
        lr: float = 5e-3,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        for name, value in (("rank", rank), ("alpha", alpha), ("epochs", epochs), ("batch_size", batch_size), ("lr", lr)):
            if value <= 0:
                raise SettingError(f"LoRA: {name}={value} must be above 0.")
        if router not in ("prototype", "oracle"):
            raise SettingError(f"LoRA: router='{router}' is unknown; give 'prototype' or 'oracle'.")
        self.rank, self.alpha, self.modules, self.router = rank, alpha, tuple(modules), router
        self.epochs, self.batch_size, self.lr, self.seed, self.device = epochs, batch_size, lr, seed, torch.device(device)
        self.needs_task_id = router == "oracle"
        self.host = VisionHost.load(backbone).to(self.device).requires_grad_(False)
        self._require_modules()
        self.cursor, self.book = Cursor(), TaskBook()
        self.heads: dict[str, ClassHead] = {}
        self.prototypes = PrototypeHead(self.host.width)
        self._active: str | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def _require_modules(self) -> None:
        linear = [name for name, module in self.host.vit.named_modules() if isinstance(module, nn.Linear)]
        missing = [suffix for suffix in self.modules if not any(name.endswith(suffix) for name in linear)]
        if missing or not self.modules:
            suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise SettingError(f"LoRA: modules {missing or self.modules} match no linear layer of the backbone; there are {suffixes}.")

    # --- verbs -------------------------------------------------------------------------------------------------

    def learn(self, task: Task) -> Steps:
        data = require_learnable(self, task)
        self.host.require_fit(data.inputs, task.name)
        if data.one_pass and self.epochs > 1:
            raise SettingError(f"LoRA: epochs={self.epochs}, but '{task.name}' may be seen once; set epochs: 1.")
        n_steps = data.steps(self.epochs, self.batch_size)
        return run_verb(
            self.cursor,
            ("learn", task.name, n_steps),
            lambda: self._begin(task),
            lambda step: self._step(task, data, step, n_steps),
            lambda: self._end(task, data),
        )

    def forget(self, task: Task, retain: Data | None = None) -> Steps:
        data = require_learnable(self, task)
        return run_verb(
            self.cursor,
            ("forget", task.name, 0),
            lambda: self._require_whole(task, data),
            lambda step: (None, 0),
            lambda: self._discard(task),
        )

    def _begin(self, task: Task) -> None:
        self._add(task.name)
        self.heads[task.name].grow(task.classes)
        self._open_optimizer(task.name)

    def _step(self, task: Task, data: Data, step: int, n_steps: int) -> tuple[Tensor, int]:
        rows = data.rows(step, self.batch_size, self.seed, "learn", task.name)
        inputs, targets = data.inputs[rows].to(self.device), data.targets[rows].to(self.device)
        head, optimizer = self.heads[task.name], self._optimizer
        assert optimizer is not None
        self._activate(task.name)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * warm_cosine(step, n_steps)
        with torch.enable_grad(), keyed_rng(self.seed, "learn", task.name, step):
            loss = F.cross_entropy(head(self.host(inputs)), head.columns(targets))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach(), len(rows)

    def _end(self, task: Task, data: Data) -> None:
        self._optimizer = None
        if not len(data):
            return
        self.book.add(task.name, data)
        if self.router == "prototype":
            self._activate(None)
            with torch.no_grad():
                self.prototypes.add(task.name, self.host(data.inputs.to(self.device)), data.targets.to(self.device))

    def _require_whole(self, task: Task, data: Data) -> None:
        self.book.require(task)
        if task.name not in self.book or self.book.n_examples(task.name) != len(data):
            owner = self.book.owner(task)
            raise ErasureNotSupported(
                f"LoRA took '{task.name}' in as a part of '{owner}' ({self.book.n_examples(owner or '')} examples, asked to forget "
                f"{len(data)}); an adapter goes out whole or not at all. Forget '{owner}', or learn in smaller tasks."
            )

    def _discard(self, task: Task) -> None:
        self.book.remove(task)
        self.prototypes.drop(task.name)
        self._remove(task.name)

    # --- adapters ----------------------------------------------------------------------------------------------

    @property
    def _vit(self) -> Any:
        return self.host.vit

    def _add(self, task: str) -> None:
        """Give a task an adapter and a head; both depend on (seed, task) alone."""
        if task in self.heads:
            return
        import peft

        config = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.modules), lora_dropout=0.0)
        with keyed_rng(self.seed, "adapter", task), warnings.catch_warnings():
            # peft warns at the second adapter, which is what this learner is for
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            self._vit.add_adapter(config, adapter_name=_key(task))
        # add_adapter chooses the new one, but does not undo an earlier disable_adapters
        self._vit.enable_adapters()
        self._vit.to(self.device)
        self.heads[task] = ClassHead(self.host.width, self.seed).to(self.device)
        self._active = task

    def _remove(self, task: str) -> None:
        del self.heads[task]
        self._activate(next(iter(self.heads), None))
        self._vit.delete_adapter(_key(task))

    def _activate(self, task: str | None) -> None:
        """Let the features pass through a task's adapter, or through none."""
        if task == self._active or not self.heads:
            return
        if task is None:
            self._vit.disable_adapters()
        else:
            self._vit.enable_adapters()
            self._vit.set_adapter(_key(task))
        self._active = task

    def _adapter(self, task: str) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._vit.get_adapter_state_dict(_key(task))
        return state

    def _trained(self, task: str) -> list[nn.Parameter]:
        marker = f".{_key(task)}."
        adapter = [parameter for name, parameter in self._vit.named_parameters() if marker in name]
        return [*adapter, *self.heads[task].parameters()]

    def _open_optimizer(self, task: str) -> None:
        parameters = [parameter.requires_grad_(True) for parameter in self._trained(task)]
        self._optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0, fused=True)

    # --- reading -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, inputs: Tensor, task: str | None = None, reader: str = "") -> Prediction:
        self.host.require_fit(inputs, task or "inputs")
        inputs = inputs.to(self.device)
        if task is not None and task in self.heads:
            return self._answer(inputs, task)
        if task is not None and task == self.host.name and self.host.classes:
            self._activate(None)
            return Prediction(self.host.old_logits(inputs), torch.tensor(self.host.classes, device=self.device))
        if self.router == "oracle" and self.heads and task is None:
            raise SettingError(
                "LoRA with router: oracle must be told the task's name; use a stream with task_id_at_test, or router: prototype."
            )
        return self._answer_routed(inputs)

    def _answer(self, inputs: Tensor, task: str) -> Prediction:
        self._activate(task)
        head = self.heads[task]
        return Prediction(head(self.host(inputs)), head.labels(self.device))

    def _answer_routed(self, inputs: Tensor) -> Prediction:
        labels = torch.tensor(sorted(self.book.all_classes()), dtype=torch.int64, device=self.device)
        logits = torch.full((len(inputs), len(labels)), -torch.inf, device=self.device)
        chosen = self._route(inputs)
        for index, task in enumerate(self.book.names()):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                answer = self._answer(inputs[rows], task)
                logits[rows[:, None], torch.searchsorted(labels, answer.classes)[None, :]] = answer.logits
        return Prediction(logits, labels)

    def _route(self, inputs: Tensor) -> Tensor:
        """(B,) index of the task whose nearest class mean is nearest on the frozen features."""
        names = self.book.names()
        if len(names) < 2 or self.router == "oracle":
            return torch.zeros(len(inputs), dtype=torch.int64, device=self.device)
        self._activate(None)
        features = self.host(inputs)
        nearest = [nearest_mean_logits(features, self.prototypes.means(name)[1], "euclidean").amax(1) for name in names]
        return torch.stack(nearest, 1).argmax(1)

    def footprint(self) -> Footprint:
        width = self.host.width * 8
        sizes = {
            name: state_bytes(self._adapter(name)) + state_bytes(head.state()) + sum(key[0] == name for key in self.prototypes.sums) * width
            for name, head in self.heads.items()
        }
        latest = next(reversed(self.heads), None)
        n_trained = sum(parameter.numel() for parameter in self._trained(latest)) if latest is not None else 0
        return Footprint(shared_bytes=0, task_bytes=sizes, trainable_parameters=n_trained)

    def export(self, task: str | None = None) -> nn.Module:
        """One task's answers as a plain module, its adapter merged into the weights; a copy.

        Raises:
            DataError: the task is not named although several were learned, or was never learned.
        """
        name = task if task is not None or len(self.heads) != 1 else next(iter(self.heads))
        if name is None or name not in self.heads:
            raise DataError(f"name the task to export, one of: {', '.join(self.heads) or 'nothing learned yet'} (got {task!r}).")
        self._activate(name)
        host = VisionHost.load(self.host)
        _merge(host.vit, _key(name))
        head = self.heads[name]
        readout = nn.Linear(self.host.width, len(head.classes)).to(self.device)
        readout.load_state_dict({"weight": head.weight.detach(), "bias": head.bias.detach()})
        return nn.Sequential(host, readout).eval().requires_grad_(False)

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        return {
            "cursor": self.cursor.state_dict(),
            "book": self.book.state(),
            "prototypes": self.prototypes.state(),
            "heads": {name: head.state() for name, head in self.heads.items()},
            "adapters": {name: self._adapter(name) for name in self.heads},
            "moments": moments(self._optimizer) if self._optimizer is not None else None,
        }

    def load_state_dict(self, state: State) -> None:
        for name in [name for name in self.heads if name not in state["heads"]]:
            self._remove(name)
        for name, head in state["heads"].items():
            self._add(name)
            self.heads[name].load(head)
            self._load_adapter(name, state["adapters"][name])
        self.heads = {name: self.heads[name] for name in state["heads"]}
        self.cursor.load_state_dict(state["cursor"])
        self.book.load(state["book"])
        self.prototypes.load(state["prototypes"])
        self._optimizer = None
        if state["moments"] is not None:
            self._open_optimizer(self.cursor.task)
            assert self._optimizer is not None
            load_moments(self._optimizer, state["moments"])

    @torch.no_grad()
    def _load_adapter(self, task: str, saved: dict[str, Tensor]) -> None:
        for name, value in self._adapter(task).items():
            value.copy_(saved[name])


def _key(task: str) -> str:
    """A task's adapter name: module names bear neither dots nor blanks."""
    return "t" + hashlib.blake2b(task.encode(), digest_size=6).hexdigest()


def _merge(vit: nn.Module, adapter: str) -> None:
    """Replace every adapted layer by a plain linear one that holds the sum."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(vit.named_modules()):
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            layer.merge(adapter_names=[adapter])
            parent, _, child = name.rpartition(".")
            setattr(vit.get_submodule(parent), child, layer.get_base_layer())
