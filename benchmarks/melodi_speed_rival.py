"""lucidrains' memorizing-transformers-pytorch, timed beside our models at the same sizes.

    pip install --no-deps memorizing-transformers-pytorch einops einops-exts faiss-cpu joblib     # optional; for this benchmark only

The package asks for faiss-gpu, and imports einops-exts without asking for it; with faiss-cpu in place of the one and the other beside it,
it works. It differs from our Memorizing Transformer where its author chose otherwise: keys and values have one head for all queries; the
layer with the memory reads the 32 nearest of it, which an HNSW index per row finds outside of the graph; the memory lies in a file; and a
full index is emptied whole, so that its cost rises and falls with a period of 4,096 tokens. It has no step for single tokens: they are
calls of one token.
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remanence.context import MemorizingConfig
from remanence.keys import keyed_rng

NAME = "memorizing-transformers-pytorch"
N_RETRIEVED = 32


class TheirReader:
    """Their model with our sizes. It reads on at every call; its memories are filled by what is timed and before it.

    Args:
        package: the imported module.
        plan: a `melodi_speed.Plan`.
    """

    def __init__(self, package: Any, plan: Any) -> None:
        self.folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.plan, self.window = plan, plan.window
        body = MemorizingConfig(**plan.body)
        width, heads, depth, memorizing = body.hidden_size, body.num_attention_heads, body.num_hidden_layers, body.memory_layer + 1
        with keyed_rng(0, "initialise"):
            self.model: nn.Module = package.MemorizingTransformer(
                num_tokens=257, dim=width, depth=depth, heads=heads, dim_head=width // heads, memorizing_layers=(memorizing,),
                max_knn_memories=body.memory, num_retrieved_memories=N_RETRIEVED, xl_max_memories=plan.window,
                xl_memory_layers=tuple(layer for layer in range(1, depth + 1) if layer != memorizing), pad_id=-100,
                knn_memories_directory=self.folder,
            )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, fused=True)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 256, (plan.rows, plan.segment), generator=generator)
        self.memories: dict[int, tuple[Any, Any]] = {}

    @classmethod
    def of(cls, plan: Any) -> tuple["TheirReader | None", dict[str, str]]:
        """The reader, or None, and what there is to say about the package."""
        try:
            package = import_module("memorizing_transformers_pytorch")
            faiss = import_module("faiss")
        except Exception as error:  # whatever its imports fail by, the benchmark goes on without it
            said = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            return None, {"unavailable": f"{said}. To time it: pip install --no-deps {NAME} einops einops-exts faiss-cpu joblib"}
        return cls(package, plan), {"version": version(NAME), "faiss-cpu": str(faiss.__version__)}

    def training(self, length: int, autocast: bool) -> Callable[[], object]:
        """One step of AdamW on the next segment, window by window, as its own training script goes segment by segment."""

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses = [self._read(piece, labels=piece) for piece in self.tokens.split(self.window, 1)]
            self.optimizer.zero_grad(set_to_none=True)
            torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()

        self._fill(len(self.tokens), length)
        return step

    def reading(self, length: int) -> Callable[[], object]:
        @torch.no_grad()
        def read() -> None:
            for piece in self.tokens.split(self.window, 1):
                self._read(piece)

        self._fill(len(self.tokens), length)
        return read

    def writing(self, length: int, rows: int) -> Callable[[], object]:
        token = self.tokens[:rows, :1]

        @torch.no_grad()
        def write() -> None:
            self._read(token)

        self._fill(rows, length)
        return write

    def _read(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        rows = len(tokens)
        memory, recent = self.memories[rows]
        found, recent = self.model(tokens, knn_memories=memory, xl_memories=recent, labels=labels)
        self.memories[rows] = memory, recent
        out: Tensor = found
        return out

    @torch.no_grad()
    def _fill(self, rows: int, length: int) -> None:
        """A memory of its own for `rows` rows, about half full, which is its mean over a period, before anything is timed."""
        if rows in self.memories:
            return
        self.model.knn_memories_directory = str(Path(self.folder) / str(rows))  # type: ignore[assignment]
        self.memories[rows] = self.model.create_knn_memories(batch_size=rows), None  # type: ignore[operator]
        for _ in range(min(length, 2048) // self.plan.segment):
            for piece in self.tokens[:rows].split(self.window, 1):
                self._read(piece)
