"""A1, A3 and A4: a language model of bytes, trained on books by truncated backpropagation and measured on books it never saw.

Of every training book the first 160,000 bytes are read, so that the 4.1 million bytes of a full run pass once through all 28 books, not
deep into eight of them; of every held-out book the first 65,536 bytes are scored, every one, with an empty memory at their beginning and
none of it lost to their end. Products of training are in bfloat16 for all arms, scoring is in float32. A cell keeps the bits of every book in bins of 1,024 bytes by position: what is asked later is a sum of these.
"""

import math
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from melodi_arms import make
from torch import Tensor

BIN = 1024
"""Bytes of a position bin."""

ROWS, SEGMENT, LR = 8, 512, 2e-3
_CHECKPOINT_STEPS = 50


@lru_cache(maxsize=1)
def documents(corpus: str, n_train_bytes: int, n_test_bytes: int) -> tuple[list[Tensor], list[Tensor]]:
    """Ids of the documents to train on and of the held-out ones, each cut to its first bytes.

    Args:
        corpus: "books", or "python" for the standard library's sources.
    """
    from remanence.streams import books, byte_ids, python_sources

    source = {"books": books, "python": python_sources}[corpus]()
    train = [byte_ids(text[:n_train_bytes])[:n_train_bytes] for text in source.train]  # a character is a byte or more
    return train, [byte_ids(text[:n_test_bytes])[:n_test_bytes] for text in source.test]


def language(
    training: Path, arm: str, model: str, config: dict[str, Any], seed: int, steps: int, corpus: str, n_train_bytes: int, n_test_bytes: int,
    rows: int = ROWS, segment: int = SEGMENT,
) -> dict[str, Any]:
    """Train an arm, and score the held-out documents."""
    train, test = documents(corpus, n_train_bytes, n_test_bytes)
    made = make(model, config, seed)
    trained = train_on(made, train, training, arm, seed, steps, rows, segment)
    start = time.process_time()
    losses = held_out(made, test, rows, segment)
    window = int(made.config.window)
    return trained | {
        "bits": [in_bins(loss) for loss in losses], "n_bytes": [len(loss) for loss in losses],
        "bits_by_place_in_window": by_place(losses, window),
        "memory_bytes": {kind: made.init_state(1).nbytes(kind) for kind in ("kv", "stored")},
        "parameters": sum(parameter.numel() for parameter in made.parameters()),
        "evaluation_cpu_seconds": time.process_time() - start,
    }  # fmt: skip


def train_on(model: Any, train: list[Tensor], folder: Path, arm: str, seed: int, steps: int, rows: int, segment: int) -> dict[str, Any]:
    """Train in place, from the folder's checkpoint where there is one.

    Returns:
        What was trained on how much; bits per byte of every 25th step, and CPU seconds a step, both since the process began.
    """
    from remanence.context.documents import DocumentReader
    from remanence.context.training import ContextTrainer

    reader = DocumentReader(train, rows, segment, bos=model.config.bos_token_id, seed=seed)
    trainer = ContextTrainer(model, reader, steps, lr=LR, folder=folder, save_every=_CHECKPOINT_STEPS, autocast=True)
    start, n_steps, trace = time.process_time(), 0, []
    for progress in trainer.run():
        n_steps += 1
        if progress.step % 25 == 0 or progress.step == steps:
            trace.append((progress.step, round(float(progress.loss) / math.log(2), 4)))
        if progress.step % 100 == 0:
            print(f"{arm}, seed {seed}: step {progress.step} of {steps}, {trace[-1][1]} bits per byte", flush=True)
    seconds = (time.process_time() - start) / n_steps if n_steps else None
    return {"steps": steps, "n_trained_tokens": steps * rows * segment, "cpu_seconds_per_step": seconds, "trace": trace}


@torch.no_grad()
def held_out(model: Any, test: list[Tensor], rows: int, segment: int) -> list[Tensor]:
    """Bits of every byte of each held-out document, (n,) each."""
    from remanence.context.evaluation import document_losses

    model.eval()
    losses = document_losses(model, test, bos=model.config.bos_token_id, rows=rows, segment=segment)
    return [loss.double() / math.log(2) for loss in losses]


def in_bins(bits: Tensor) -> list[float]:
    """Sums over bins of 1,024 bytes; the last may hold fewer."""
    return [round(float(part.sum()), 3) for part in bits.split(BIN)]


def by_place(losses: list[Tensor], window: int) -> list[float]:
    """Mean bits per byte by the place in the window, over all whole windows but the first of each document."""
    whole = [bits[window : len(bits) - len(bits) % window].view(-1, window) for bits in losses]
    table = torch.cat(whole)
    return [round(float(value), 4) for value in table.mean(0)] if len(table) else []
