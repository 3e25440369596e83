"""A1, A3 and A4: a language model, trained on books by truncated backpropagation and measured on books it never saw.

Text is cut into byte pairs by a vocabulary of 2,048 that is made of the training texts on the spot. Of every training book the first
560,000 bytes are read, so that the 4.1 million tokens of a full run pass once through all 28 books, not deep into a few. Of every held-out
book the first 131,072 bytes are scored, every one, with an empty memory at their beginning and none of it lost to their end. Products of
training are in bfloat16 for all arms, scoring is in float32. A cell keeps the bits of every book in bins of 1,024 bytes by position: what
is asked later is a sum of these.

With single bytes as tokens (the first choice of this benchmark, `vocabulary=257`) no model of this size learns within four million tokens
to use more than a dozen bytes of context, so that nothing can be said about memory.
"""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from melodi_arms import make
from torch import Tensor

from remanence.keys import generator, key_seed
from remanence.state import load_state, save_state

BIN = 1024
"""Bytes of a position bin."""

ROWS, SEGMENT = 8, 512
N_VALID = 4
_CHECKPOINT_STEPS = 50


class Documents(NamedTuple):
    """Ids of the documents to train on and of those to score; how many bytes each id (V,) stands for."""

    train: list[Tensor]
    test: list[Tensor]
    n_bytes: Tensor


def documents(corpus: str, vocabulary: int, n_train_bytes: int, n_test_bytes: int, split: str, kept: Path) -> Documents:
    """The corpus as ids, each document cut to its first bytes; made once, then read from the folder.

    Args:
        corpus: "books", or "python" for the standard library's sources.
        vocabulary: rows; the last begins documents. 257 is single bytes.
        split: "test", or "valid" to score four of the training documents, drawn from the corpus's name, in place of the held-out ones.
        kept: folder.
    """
    path = kept / f"{corpus}-{key_seed(vocabulary, n_train_bytes, n_test_bytes) % 10**8}.safetensors"
    if not path.exists():
        save_state(path, _encoded(corpus, vocabulary, n_train_bytes, n_test_bytes))
    found = load_state(path)
    train, test = found["train"], found["test"]
    if split == "valid":
        drawn = set(torch.randperm(len(train), generator=generator("validation", corpus))[:N_VALID].tolist())
        test = [document for row, document in enumerate(train) if row in drawn]
        train = [document for row, document in enumerate(train) if row not in drawn]
    return Documents(train, test, found["n_bytes"])


def _encoded(corpus: str, vocabulary: int, n_train_bytes: int, n_test_bytes: int) -> dict[str, Any]:
    from tokenizers import ByteLevelBPETokenizer

    from remanence.streams import books, python_sources

    source = {"books": books, "python": python_sources}[corpus]()
    sides = (source.train, n_train_bytes), (source.test, n_test_bytes)
    train, test = ([text.encode()[:n].decode(errors="ignore") for text in texts] for texts, n in sides)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(train, vocab_size=vocabulary - 1, show_progress=False)
    n_bytes = torch.zeros(vocabulary, dtype=torch.int64)
    for token, number in tokenizer.get_vocab().items():
        n_bytes[number] = len(token)  # the alphabet has a character for every byte
    train, test = ([torch.tensor(each.ids) for each in tokenizer.encode_batch(texts)] for texts in (train, test))
    return {"n_bytes": n_bytes, "train": train, "test": test}


def language(
    training: Path, arm: str, model: str, config: dict[str, Any], seed: int, steps: int, corpus: str, vocabulary: int, n_train_bytes: int,
    n_test_bytes: int, lr: float, rows: int = ROWS, segment: int = SEGMENT, split: str = "test",
) -> dict[str, Any]:  # fmt: skip
    """Train an arm, and score the documents of the split."""
    data = documents(corpus, vocabulary, n_train_bytes, n_test_bytes, split, training.parent / "documents")
    made = make(model, {"vocab_size": vocabulary} | config, seed)
    trained = train_on(made, data.train, training, arm, seed, steps, rows, segment, lr)
    start = time.process_time()
    losses = held_out(made, data.test, rows, segment)
    return trained | {
        "bits": [in_bins(loss, data.n_bytes[ids]) for loss, ids in zip(losses, data.test, strict=True)],
        "n_bytes": [int(data.n_bytes[ids].sum()) for ids in data.test], "n_tokens": [len(loss) for loss in losses],
        "bits_by_place_in_window": by_place(losses, int(made.config.window)),
        "memory_bytes": {kind: made.init_state(1).nbytes(kind) for kind in ("kv", "stored")},
        "parameters": sum(parameter.numel() for parameter in made.parameters()),
        "evaluation_cpu_seconds": time.process_time() - start,
    }  # fmt: skip


def train_on(
    model: Any, train: list[Tensor], folder: Path, arm: str, seed: int, steps: int, rows: int, segment: int, lr: float
) -> dict[str, Any]:
    """Train in place, from the folder's checkpoint where there is one.

    Returns:
        What was trained on how much; bits per token of every 25th step, and CPU seconds a step, both since the process began.
    """
    from remanence.context.documents import DocumentReader
    from remanence.context.training import ContextTrainer

    reader = DocumentReader(train, rows, segment, bos=model.config.bos_token_id, seed=seed)
    trainer = ContextTrainer(model, reader, steps, lr=lr, folder=folder, save_every=_CHECKPOINT_STEPS, autocast=True)
    start, n_steps, trace = time.process_time(), 0, []
    for progress in trainer.run():
        n_steps += 1
        if progress.step % 25 == 0 or progress.step == steps:
            trace.append((progress.step, round(float(progress.loss) / math.log(2), 4)))
        if progress.step % 100 == 0:
            print(f"{arm}, seed {seed}: step {progress.step} of {steps}, {trace[-1][1]} bits per token", flush=True)
    seconds = (time.process_time() - start) / n_steps if n_steps else None
    return {"steps": steps, "n_trained_tokens": steps * rows * segment, "cpu_seconds_per_step": seconds, "trace": trace}


@torch.no_grad()
def held_out(model: Any, test: list[Tensor], rows: int, segment: int) -> list[Tensor]:
    """Bits of every token of each held-out document, (n,) each."""
    from remanence.context.evaluation import document_losses

    model.eval()
    losses = document_losses(model, test, bos=model.config.bos_token_id, rows=rows, segment=segment)
    return [loss.double() / math.log(2) for loss in losses]


def in_bins(bits: Tensor, n_bytes: Tensor) -> list[float]:
    """Sums over bins of 1,024 bytes of a document's bits (n,); a token counts where it begins, the last bin may be smaller."""
    begins = n_bytes.cumsum(0) - n_bytes
    n_bins = -(-int(n_bytes.sum()) // BIN)
    return [round(value, 3) for value in torch.zeros(n_bins, dtype=bits.dtype).index_add(0, begins // BIN, bits).tolist()]


def by_place(losses: list[Tensor], window: int) -> list[float]:
    """Mean bits per token by the place in the window, over all whole windows but the first of each document."""
    whole = [bits[window : len(bits) - len(bits) % window].view(-1, window) for bits in losses]
    table = torch.cat(whole)
    return [round(float(value), 4) for value in table.mean(0)] if len(table) else []
