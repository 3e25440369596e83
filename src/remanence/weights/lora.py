"""One low-rank adapter and one head per task, through peft.

Axes: B batch, C classes, D width.

Source: Hu et al. 2021, LoRA (arXiv 2106.09685); the adapters themselves are peft's.
"""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remanence.errors import DataError, SettingError
from remanence.keys import keyed_rng
from remanence.parts import ClassHead, PerTaskLearner, VisionHost
from remanence.parts.per_task import Router
from remanence.state import State


class LoRA(PerTaskLearner):
    """A frozen ViT to which every task adds an adapter and a head of its own.

    Tasks never share a trained number, so that nothing is disturbed and `forget` of a task is exact.

    Args:
        backbone: folder of a ViT, or a model; never trained.
        rank: r of the adapters.
        alpha: their scale is alpha / r.
        modules: suffixes of the linear layers that are adapted.
        Others: see `PerTaskLearner`.
    """

    store = "weights"

    def __init__(
        self,
        backbone: str | Path | nn.Module,
        rank: int = 4,
        alpha: float = 8.0,
        modules: tuple[str, ...] = ("q_proj", "v_proj"),
        router: Router = "prototype",
        epochs: int = 15,
        batch_size: int = 32,
        lr: float = 5e-3,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        for name, value in (("rank", rank), ("alpha", alpha)):
            if value <= 0:
                raise SettingError(f"LoRA: {name}={value} must be above 0.")
        super().__init__(backbone, router, epochs, batch_size, lr, seed, device)
        self.rank, self.alpha, self.modules = rank, alpha, tuple(modules)
        self._require_modules()
        self.heads: dict[str, ClassHead] = {}
        self._active: str | None = None

    def _require_modules(self) -> None:
        linear = [name for name, module in self.host.vit.named_modules() if isinstance(module, nn.Linear)]
        missing = [suffix for suffix in self.modules if not any(name.endswith(suffix) for name in linear)]
        if missing or not self.modules:
            suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise SettingError(f"LoRA: modules {missing or self.modules} match no linear layer of the backbone; there are {suffixes}.")

    # --- what a task owns --------------------------------------------------------------------------------------

    @property
    def _vit(self) -> Any:
        return self.host.vit

    def _tasks(self) -> list[str]:
        return list(self.heads)

    def _attach(self, task: str, classes: list[int]) -> None:
        if task not in self.heads:
            self._add_adapter(task)
            self.heads[task] = ClassHead(self.host.width, self.seed).to(self.device)
        self.heads[task].grow(classes)

    def _add_adapter(self, task: str) -> None:
        import peft

        config = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.modules), lora_dropout=0.0)
        with keyed_rng(self.seed, "adapter", task), warnings.catch_warnings():
            # peft warns at the second adapter, which is what this learner is for
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            self._vit.add_adapter(config, adapter_name=_key(task))
        # add_adapter chooses the new one, but does not undo an earlier disable_adapters
        self._vit.enable_adapters()
        self._vit.to(self.device)
        self._active = task

    def _detach(self, task: str) -> None:
        del self.heads[task]
        self._activate(next(iter(self.heads), None))
        self._vit.delete_adapter(_key(task))

    def _activate(self, task: str | None) -> None:
        """Let the features pass through a task's adapter, or through none."""
        if task == self._active:
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

    def _parameters(self, task: str) -> list[nn.Parameter]:
        marker = f".{_key(task)}."
        adapter = [parameter for name, parameter in self._vit.named_parameters() if marker in name]
        return [*adapter, *self.heads[task].parameters()]

    def _state(self, task: str) -> State:
        return {"adapter": self._adapter(task), "head": self.heads[task].state()}

    @torch.no_grad()
    def _load(self, task: str, state: State) -> None:
        self.heads[task].load(state["head"])
        for name, value in self._adapter(task).items():
            value.copy_(state["adapter"][name])

    # --- answers -----------------------------------------------------------------------------------------------

    def _classes(self, task: str) -> list[int]:
        return self.heads[task].classes

    def _logits(self, inputs: Tensor, task: str) -> Tensor:
        self._activate(task)
        logits: Tensor = self.heads[task](self.host(inputs))
        return logits

    def _plain_features(self, inputs: Tensor) -> Tensor:
        self._activate(None)
        return super()._plain_features(inputs)

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
