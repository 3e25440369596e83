"""Learnable memory tokens: new tasks for a frozen vision transformer that leave its old answers bit-identical.

    memory = MemoryViT(vit)
    memory.add_task("flowers", classes=range(17), tokens=5)
    train(memory.trainable_parameters("flowers"))
    out = memory(pixels)               # out.base: the model's own output, untouched; out.logits["flowers"]: (B, 17)

Every task owns M learnable vectors per layer, a class token and a head. Old tokens never attend to new ones, so the
backbone runs as it is, and each task's class token runs beside it over the backbone's keys and values (a side stream).
Mathematically that is the paper's attention mask; unlike one masked sequence it leaves the old output `torch.equal`.

Axes: B batch, T tasks, n tokens of the backbone, M memory tokens, L layers, D width, H heads, d = D / H, C classes.

Source: Sandler et al. 2022, Fine-tuning Image Transformers using Learnable Memory (CVPR; arXiv 2203.15243), eqs. of
section 3 and Table 1. ours: the side-stream form, and a graph of parents in place of one order.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from remanence.errors import SettingError, StateMismatchError, nearest
from remanence.keys import generator
from remanence.tokens.task_memory import TaskMemory
from remanence.tokens.view import Capture, ViTView

Mode = Literal["memory", "input", "class", "head"]

_optimizer_steps = [0]


def _count_step(*_: object) -> None:
    _optimizer_steps[0] += 1


# fused optimizers write to a tensor without raising its version, so that a kept bank would miss their steps
register_optimizer_step_post_hook(_count_step)


@dataclass(frozen=True)
class MemoryOutput:
    """`base`: the model's own output object; `logits`: task name -> (B, C)."""

    base: Any
    logits: dict[str, Tensor]


class MemoryViT(nn.Module):
    """A frozen vision transformer with the memories of any number of tasks.

    While it is attached the model is in evaluation mode and takes no gradient; `detach()` gives it back as it was.

    Args:
        model: a ViT, DeiT or DINOv2 of transformers (bare or with a classifier), or a timm VisionTransformer.

    Raises:
        SettingError: the model is none of these.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._modes = [(module, module.training) for module in model.modules()]
        self.model = model.eval().requires_grad_(False)
        try:
            self.view = ViTView(model)
        except Exception:
            self.detach()
            raise
        self._tasks = nn.ModuleDict()
        self._bank: _Bank | None = None

    # --- tasks -------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        """Names in order of arrival."""
        return [_plain(key) for key in self._tasks]

    def task(self, name: str) -> TaskMemory:
        """What a task owns.

        Raises:
            SettingError: there is no such task.
        """
        if _key(name) not in self._tasks:
            raise SettingError(f"no task '{name}'.{nearest(name, self.tasks)}")
        found = self._tasks[_key(name)]
        assert isinstance(found, TaskMemory)
        return found

    def add_task(
        self,
        name: str,
        classes: Iterable[int],
        tokens: int = 5,
        mode: Mode = "memory",
        parents: Sequence[str] = (),
        init: Literal["copy", "normal"] = "copy",
        norm: Literal["pre", "post"] = "pre",
        seed: int = 0,
    ) -> TaskMemory:
        """Give a new task its memory, class token and head.

        Args:
            name: not taken yet.
            classes: source labels, at least one.
            tokens: M, memory tokens per layer, 0 to 4 n; about 5 suffices (paper, Table 2).
            mode: "memory": at every layer; "input": at the first layer only; "class": a class token of its own without
                memory; "head": a head on the backbone's class token.
            parents: earlier tasks to read from (extension); none means that tasks ignore one another (concatenation).
            init: of the class token: "copy" of the backbone's with its position, or N(0, 0.02).
            norm: see `TaskMemory`.
            seed: key of the draws; memory starts as N(0, 0.02).

        Raises:
            SettingError: the name is taken, a parent is unknown, or a setting is out of range.
        """
        labels = [operator.index(label) for label in classes]
        if _key(name) in self._tasks:
            raise SettingError(f"task '{name}' is there already; remove it first or choose another name.")
        if not labels or len(set(labels)) < len(labels):
            raise SettingError(f"task '{name}' needs at least one class, each once; got {labels}.")
        self.require_settings(tokens, mode)
        for parent in parents:
            self.task(parent)
        layers = {"memory": tuple(range(len(self.view.layers))), "input": (0,)}.get(mode, ()) if tokens else ()
        draws = generator(seed, "memory", name)
        memory = torch.randn(len(layers), tokens if layers else 0, self.view.width, generator=draws) * 0.02
        token = self.view.class_token() if init == "copy" else torch.randn(self.view.width, generator=draws) * 0.02
        like = next(self.model.parameters())
        made = TaskMemory(memory.to(like), None if mode == "head" else token.to(like), labels, layers, tuple(parents), norm)
        self._tasks[_key(name)] = made
        return made

    def require_settings(self, tokens: int, mode: Mode) -> None:
        """Refuse what no task can have.

        Raises:
            SettingError: tokens lie outside 0..4 n, or the mode is unknown.
        """
        most = 4 * self.view.n_tokens
        if not 0 <= tokens <= most:
            raise SettingError(f"tokens={tokens} must lie in 0..{most} (four times the backbone's {most // 4} tokens).")
        if mode not in ("memory", "input", "class", "head"):
            raise SettingError(f"mode='{mode}' is unknown; give memory, input, class or head.")

    def readers(self, name: str) -> list[str]:
        """The tasks that read from this one directly."""
        return [other for other in self.tasks if name in self.task(other).parents]

    def remove_task(self, name: str, cascade: bool = False) -> None:
        """Delete all that a task owns; what stays is untouched.

        Args:
            cascade: delete the tasks that read from it too.

        Raises:
            SettingError: other tasks read from it and `cascade` is off.
        """
        self.task(name)
        children = self.readers(name)
        if children and not cascade:
            raise SettingError(f"task '{name}' is read by {children}; remove those first, or pass cascade=True to remove them too.")
        for child in children:
            if _key(child) in self._tasks:
                self.remove_task(child, cascade=True)
        del self._tasks[_key(name)]

    def trainable_parameters(self, name: str) -> list[nn.Parameter]:
        """A task's own parameters; hand these to the optimizer."""
        return list(self.task(name).parameters())

    def detach(self) -> nn.Module:
        """The model as it was before: same parameters, gradient flags and modes; the memories stay here."""
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for module, mode in self._modes:
            module.training = mode
        return self.model

    def train(self, mode: bool = True) -> "MemoryViT":
        """Training mode for the memories; the backbone stays in evaluation mode, or old answers would vary."""
        super().train(mode)
        self.model.eval()
        return self

    # --- answers -----------------------------------------------------------------------------------------------

    def forward(self, pixels: Tensor, tasks: Sequence[str] | None = None, **model_inputs: Any) -> MemoryOutput:
        """The backbone's own output and the logits of tasks, all in one pass.

        Args:
            pixels: (B, C, height, width), normalised as the backbone expects.
            tasks: names; all by default, [] for the plain backbone.
            model_inputs: what else the model's own forward takes, such as output_hidden_states or interpolate_pos_encoding.

        Returns:
            Base output and logits; of an empty batch, None and empty logits.
        """
        if pixels.shape[0] == 0:  # len() would fix the batch size of an exported model
            names = self.tasks if tasks is None else tasks
            return MemoryOutput(None, {name: pixels.new_empty(0, len(self.task(name).classes)) for name in names})
        capture = self.view.capture(pixels, **model_inputs)
        return MemoryOutput(capture.output, self.read(capture, tasks))

    def read(self, capture: Capture, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Logits of tasks from a captured or cached pass of the backbone.

        Raises:
            StateMismatchError: the pass is that of another model.
        """
        if capture.model is not None and capture.model is not self.model:
            raise StateMismatchError(
                f"this pass was captured on another {type(capture.model).__name__} than the one these memories belong to; "
                f"capture or cache with this MemoryViT."
            )
        names = self.tasks if tasks is None else list(tasks)
        if not names:
            return {}
        bank = self._bank_of(tuple(self.with_parents(names)))
        tokens = bank.run(capture)
        logits = torch.einsum("btd,tcd->btc", tokens, bank.head_weight) + bank.head_bias
        return {name: logits[:, bank.names.index(name), : len(self.task(name).classes)] for name in names}

    def read_each(self, capture: Capture, tasks: Sequence[str]) -> list[Tensor]:
        """Every image answered by a task of its own: B names -> B rows of logits (C,); each task reads its images only.

        Raises:
            SettingError: there are not as many names as images.
        """
        if len(tasks) != len(capture.last):
            raise SettingError(f"{len(tasks)} task names for {len(capture.last)} images; give one name per image.")
        answers: dict[int, Tensor] = {}
        for name in dict.fromkeys(tasks):
            rows = [row for row, wanted in enumerate(tasks) if wanted == name]
            chosen = capture.select(torch.tensor(rows, device=capture.last.device))
            answers.update(zip(rows, self.read(chosen, [name])[name], strict=True))
        return [answers[row] for row in range(len(tasks))]

    def with_parents(self, names: list[str]) -> list[str]:
        """These tasks and all that they read from, in order of arrival."""
        needed: set[str] = set()
        queue = list(names)
        while queue:
            name = queue.pop()
            if name not in needed:
                needed.add(name)
                queue += self.task(name).parents
        return [name for name in self.tasks if name in needed]

    def _bank_of(self, names: tuple[str, ...]) -> "_Bank":
        """Keys and values of the memories, which no input changes: computed per step in training, else once."""
        parts = [self.task(name) for name in names]
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for part in parts for parameter in part.parameters())
        if trains or torch.compiler.is_exporting():
            return _Bank(self.view, names, parts)
        # the stamp holds the tensors themselves: an address alone may be given to another task's later
        owned = [parameter for part in parts for parameter in part.parameters()]
        writes = [(parameter._version, parameter.data_ptr(), parameter.dtype, parameter.device) for parameter in owned]
        marks = (_optimizer_steps[0], writes)
        if self._bank is None or self._bank.names != names or not self._bank.is_of(owned, marks):
            with torch.no_grad():
                self._bank = _Bank(self.view, names, parts)
            self._bank.owned, self._bank.marks = owned, marks
        return self._bank

    def mask_table(self) -> str:
        """Who attends to whom, for a person to read: rows ask, columns answer."""
        columns = ["backbone", *(f"{what} {name}" for name in self.tasks for what in ("C", "M"))]
        width = max(map(len, columns))
        lines = [" " * width + "  " + "  ".join(columns)]
        for row in ["backbone", *self.tasks]:
            read = {"backbone"} if row == "backbone" else {"backbone", *(f"{w} {o}" for o in (row, *self.task(row).parents) for w in "CM")}
            lines.append(row.ljust(width) + "  " + "  ".join(("yes" if c in read else "-").ljust(len(c)) for c in columns))
        return "\n".join(line.rstrip() for line in lines)


class _Bank:
    """All tensors of some tasks, stacked: the side stream runs over them without a loop over tasks."""

    def __init__(self, view: ViTView, names: tuple[str, ...], parts: list[TaskMemory]) -> None:
        self.view, self.names = view, names
        self.owned: list[nn.Parameter] = []
        self.marks: tuple[Any, ...] = ()
        own = [part.class_token for part in parts]
        self.streams = [token is not None for token in own]
        self.has_stream = torch.tensor(self.streams, device=parts[0].memory.device)
        self.class_tokens = torch.stack([torch.zeros_like(parts[0].head.weight[0]) if token is None else token for token in own])
        self.sources = [[index, *(names.index(parent) for parent in part.parents)] for index, part in enumerate(parts)]
        self.class_mask = self._class_mask() if any(part.parents for part in parts) else None
        self.memories = [self._memory(layer, parts) for layer in range(len(view.layers))]
        size = max(len(part.classes) for part in parts)
        self.head_weight = torch.stack([nn.functional.pad(part.head.weight, (0, 0, 0, size - len(part.classes))) for part in parts])
        self.head_bias = torch.stack([nn.functional.pad(part.head.bias, (0, size - len(part.classes))) for part in parts])

    def _class_mask(self) -> Tensor:
        """(T, T) True where a class token may not look: all but itself and its parents."""
        mask = torch.ones(len(self.names), len(self.names), dtype=torch.bool, device=self.has_stream.device)
        for row, sources in enumerate(self.sources):
            # a task without a class token of its own has none to be read
            mask[row, [source for source in sources if source == row or self.streams[source]]] = False
        return mask

    def is_of(self, owned: list[nn.Parameter], marks: tuple[Any, ...]) -> bool:
        """Whether it was made of these tensors, and none was written to since."""
        return self.marks == marks and all(one is other for one, other in zip(self.owned, owned, strict=True))

    def _memory(self, index: int, parts: list[TaskMemory]) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """A layer's memory keys and values (T, H, M, d), own and parents' rows, and the padding mask (T, M)."""
        layer = self.view.layers[index]
        # a view of a parameter that is taken without gradient still says that it requires one, which trips FLOP counters
        own = [part.memory if torch.is_grad_enabled() else part.memory.detach() for part in parts]
        rows = [
            memory[part.layers.index(index)] if index in part.layers else memory.new_zeros(0, self.view.width)
            for memory, part in zip(own, parts, strict=True)
        ]
        normed = [layer.norm1(row) if part.norm == "pre" else row for row, part in zip(rows, parts, strict=True)]
        joined = [torch.cat([normed[source] for source in sources]) for sources in self.sources]
        size = max(map(len, joined))
        if size == 0:
            return None
        padded = torch.stack([nn.functional.pad(row, (0, 0, 0, size - len(row))) for row in joined])
        _, key, value = layer.project(padded)
        mask = torch.stack([torch.arange(size, device=row.device) >= len(row) for row in joined])
        is_padded = any(len(row) < size for row in joined)
        return layer.key_norm(self.view.split(key)), self.view.split(value), mask if is_padded else None

    def run(self, capture: Capture) -> Tensor:
        """(B, T, D) class tokens after the final norm; a task without one of its own gets the backbone's."""
        last = capture.last[:, None, :]
        if not any(self.streams):
            return last.expand(-1, len(self.names), -1)
        tokens = self.class_tokens.expand(capture.last.shape[0], -1, -1)
        for layer, keys, values, memory in zip(self.view.layers, capture.keys, capture.values, self.memories, strict=True):
            query, key, value = (self.view.split(part) for part in layer.project(layer.norm1(tokens)))
            attended = self._attend(layer.query_norm(query), (keys, values), (layer.key_norm(key), value), memory)
            tokens = layer.finish(tokens, self.view.merge(attended))
        tokens = self.view.final_norm(tokens)
        return tokens if all(self.streams) else torch.where(self.has_stream[None, :, None], tokens, last)

    def _attend(
        self,
        query: Tensor,
        backbone: tuple[Tensor, Tensor],
        classes: tuple[Tensor, Tensor],
        memory: tuple[Tensor, Tensor, Tensor | None] | None,
    ) -> Tensor:
        """One softmax over the backbone's tokens, class tokens and memory; (B, H, T, d) in and out."""
        query = query * self.view.scale
        scores = [query @ backbone[0].transpose(-1, -2)]
        if self.class_mask is None:
            scores.append((query * classes[0]).sum(-1, keepdim=True))
        else:
            scores.append((query @ classes[0].transpose(-1, -2)).masked_fill(self.class_mask, -torch.inf))
        if memory is not None:
            score = torch.einsum("bhtd,thmd->bhtm", query, memory[0])
            scores.append(score if memory[2] is None else score.masked_fill(memory[2], -torch.inf))
        joined = torch.cat(scores, -1).softmax(-1, dtype=torch.float32).to(query.dtype)
        weights = torch.split(joined, [part.shape[-1] for part in scores], -1)
        attended: Tensor = weights[0] @ backbone[1]
        attended = attended + (weights[1] * classes[1] if self.class_mask is None else weights[1] @ classes[1])
        if memory is not None:
            attended = attended + torch.einsum("bhtm,thmd->bhtd", weights[2], memory[1])
        return attended


def _key(name: str) -> str:
    """A name as a module name: without a dot, and never that of a method."""
    return "task:" + name.replace("%", "%25").replace(".", "%2E")


def _plain(key: str) -> str:
    return key.removeprefix("task:").replace("%2E", ".").replace("%25", "%")
