"""Memory tokens and deep prompts as learners: a task is learned, kept and forgotten by its own tokens.

Axes: B batch, C classes of a task, D width, M tokens per layer.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from remanence.errors import DataError, ErasureNotSupported, SettingError
from remanence.keys import key_seed
from remanence.parts import ClassHead, PerTaskLearner
from remanence.parts.per_task import Router
from remanence.state import State
from remanence.task import Data, Task
from remanence.tokens.cache import FeatureCache
from remanence.tokens.memory import MemoryViT, Mode
from remanence.tokens.view import ViTView
from remanence.tokens.vpt import DeepPrompts


class MemoryTokens(PerTaskLearner):
    """Every task learns M memory tokens per layer, a class token and a head beside a frozen ViT.

    The backbone's old answers stay bit-identical whatever is learned. `forget` of a task drops its tokens: exact.

    Args:
        backbone: folder of a ViT, or a model; never trained.
        tokens: M per layer.
        mode: "memory", "input", "class" or "head"; see `MemoryViT.add_task`.
        extend: let every task read from all earlier ones (the paper's extension). A task that others read from can no
            longer be forgotten, since their answers rest on it: `forget` raises ErasureNotSupported and names them.
        cache_bytes: training reads the backbone's keys and values from memory while they fit in here.
        Others: see `PerTaskLearner`.

    Source: Sandler et al. 2022 (arXiv 2203.15243).
    """

    store = "tokens"
    weight_decay = 1e-4
    warm_share = 0.02
    clip_norm = 1.0

    def __init__(
        self,
        backbone: str | Path | nn.Module,
        tokens: int = 5,
        mode: Mode = "memory",
        extend: bool = False,
        cache_bytes: float = 1e9,
        router: Router = "prototype",
        epochs: int = 15,
        batch_size: int = 32,
        lr: float = 1e-2,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(backbone, router, epochs, batch_size, lr, seed, device)
        self.tokens, self.mode, self.extend, self.cache_bytes = tokens, mode, extend, cache_bytes
        self.memory = MemoryViT(self.host.vit)
        self.memory.require_settings(tokens, mode)
        self._cache: tuple[Tensor, FeatureCache | None] | None = None

    def _normalised(self, inputs: Tensor) -> Tensor:
        return (inputs - self.host.mean) / self.host.std

    def _tasks(self) -> list[str]:
        return self.memory.tasks

    def _attach(self, task: str, classes: list[int]) -> None:
        if task in self.memory.tasks:
            self.memory.task(task).grow(classes)
            return
        parents = self.memory.tasks if self.extend else ()
        self.memory.add_task(task, classes, self.tokens, self.mode, parents, seed=self.seed)

    def _detach(self, task: str) -> None:
        self.memory.remove_task(task)

    def _require_whole(self, task: Task, data: Data) -> None:
        super()._require_whole(task, data)
        readers = self.memory.readers(task.name)
        if readers:
            raise ErasureNotSupported(
                f"'{task.name}' is read by {readers}, whose answers rest on it. Forget those first, the last one first, or learn "
                f"with extend=False."
            )

    def _classes(self, task: str) -> list[int]:
        return self.memory.task(task).classes

    def _parameters(self, task: str) -> list[nn.Parameter]:
        return self.memory.trainable_parameters(task)

    def _logits(self, inputs: Tensor, task: str) -> Tensor:
        return self.memory(self._normalised(inputs), [task]).logits[task]  # type: ignore[no-any-return]

    def _training_logits(self, task: Task, data: Data, rows: Tensor) -> Tensor:
        cache = self._cache_of(data)
        if cache is None:
            return super()._training_logits(task, data, rows)
        return self.memory.read(cache[rows.to(self.device)], [task.name])[task.name]

    def _cache_of(self, data: Data) -> FeatureCache | None:
        """The cached pass over a train set: no state, since it can be computed again at any time."""
        if self._cache is None or self._cache[0] is not data.inputs:
            fits = FeatureCache.bytes_per_image(self.memory) * len(data) <= self.cache_bytes
            pixels = self._normalised(data.inputs.to(self.device))
            self._cache = (data.inputs, FeatureCache(self.memory, pixels, max_bytes=self.cache_bytes) if fits else None)
        return self._cache[1]

    def _state(self, task: str) -> State:
        return dict(self.memory.task(task).state_dict())

    def _load(self, task: str, state: State) -> None:
        self.memory.task(task).load_state_dict(state)

    def export(self, task: str | None = None) -> nn.Module:
        """Pixels (B, C, H, W) in [0, 1] -> one task's logits; exports through torch.export and ONNX; a copy."""
        from remanence.tokens.export import TaskReader

        name = task if task is not None or len(self._tasks()) != 1 else self._tasks()[0]
        if name is None or name not in self._tasks():
            raise DataError(f"name the task to export, one of: {', '.join(self._tasks()) or 'nothing learned yet'} (got {task!r}).")
        return TaskReader(self.memory, name, self.host.mean, self.host.std)


class VPTDeep(PerTaskLearner):
    """Every task learns M prompts per layer and a head; a baseline for memory tokens. `forget` of a task is exact.

    Args:
        backbone: folder of a ViT, or a model; never trained.
        tokens: M per layer.
        Others: see `PerTaskLearner`.

    Source: Jia et al. 2022 (arXiv 2203.12119).
    """

    store = "tokens"
    weight_decay = 1e-4
    warm_share = 0.02
    clip_norm = 1.0

    def __init__(
        self,
        backbone: str | Path | nn.Module,
        tokens: int = 5,
        router: Router = "prototype",
        epochs: int = 15,
        batch_size: int = 32,
        lr: float = 1e-2,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if tokens < 1:
            raise SettingError(f"VPTDeep: tokens={tokens} must be above 0.")
        super().__init__(backbone, router, epochs, batch_size, lr, seed, device)
        self.tokens, self.view = tokens, ViTView(self.host.vit)
        self.prompts: dict[str, DeepPrompts] = {}
        self.heads: dict[str, ClassHead] = {}

    def _tasks(self) -> list[str]:
        return list(self.heads)

    def _attach(self, task: str, classes: list[int]) -> None:
        if task not in self.heads:
            self.prompts[task] = DeepPrompts(self.view, self.tokens, self.seed, task).to(self.device)
            self.heads[task] = ClassHead(self.host.width, key_seed(self.seed, "vpt")).to(self.device)
        self.heads[task].grow(classes)

    def _detach(self, task: str) -> None:
        del self.prompts[task], self.heads[task]

    def _classes(self, task: str) -> list[int]:
        return self.heads[task].classes

    def _parameters(self, task: str) -> list[nn.Parameter]:
        return [*self.prompts[task].parameters(), *self.heads[task].parameters()]

    def _logits(self, inputs: Tensor, task: str) -> Tensor:
        features = self.prompts[task](self.view, (inputs - self.host.mean) / self.host.std)
        logits: Tensor = self.heads[task](features)
        return logits

    def _state(self, task: str) -> State:
        return {"prompts": self.prompts[task].prompts.detach(), "head": self.heads[task].state()}

    @torch.no_grad()
    def _load(self, task: str, state: State) -> None:
        self.prompts[task].prompts.copy_(state["prompts"])
        self.heads[task].load(state["head"])
