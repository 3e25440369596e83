"""A small pretrained host, its documents, and one trained and measured arm of `melodi_attach`.

The host is a Llama of width 96 and depth 4 over 1,024 byte-level subwords, pretrained on windows of the training documents. What is
attached is trained on the same documents, thirteen at a time and in order: the host knows the words, and what is left to learn is what a
window cannot tell. Two more documents choose the rate, and the held-out ones are nobody's.
"""

import json
import shutil
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from melodi_cells import Bench, Cell, Result, flushed_denormals
from torch import Tensor, nn

from remanence.artifact import materialise
from remanence.context import AttachedMelodi, AttachedMelodiConfig, ContextTrainer, DocumentReader, attach_melodi, document_losses
from remanence.grid import one_thread
from remanence.parts.language_model import load_language_model, load_tokenizer
from remanence.parts.language_pretraining import SPECIAL, PretrainedLM
from remanence.state import load_state, save_state, write_whole
from remanence.streams import TextSource, books, python_sources

__all__ = ["Bench", "Cell", "Result", "SubwordLM", "attach", "host_of", "prepare", "run_cell"]

WINDOW, ROWS, SEGMENT, END = 32, 13, 256, SPECIAL.index("<eos>")
MEMORY = {"hidden_size": 32, "num_attention_heads": 4, "short": 12, "long_per_window": 8, "long_windows": 32, "lora_rank": 4}
HOST = {"vocab_size": 1024, "family": "llama", "width": 96, "depth": 4, "heads": 4, "length": WINDOW, "batch_size": 64}
N_VALIDATION = 2
_CHECKPOINT_STEPS = 100
_CHARACTERS = 8
"""A token has no more characters than this on average: so much of a document is tokenized at most."""


class SubwordLM(PretrainedLM):
    """As its parent, over byte-level subwords (Sennrich et al. 2016): no word is unknown, and most need the word before them."""

    kind = "subword-lm"

    @cached_property
    def tokenizer(self) -> Any:
        """Byte pairs, trained on the source's train documents."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(self.source.train, trainer)
        unknown, end, pad = SPECIAL
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token=unknown, bos_token=end, eos_token=end, pad_token=pad,
            model_input_names=["input_ids", "attention_mask"],
        )  # fmt: skip


def parts(corpus: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Documents to train on, for the choice of a rate, and held-out ones."""
    source = {"books": books, "python": python_sources}[corpus]()
    return source.train[:-N_VALIDATION], source.train[-N_VALIDATION:], source.test


def host_of(corpus: str, steps: int, n_characters: int) -> SubwordLM:
    """The pretrained host; its loss is reported on the documents that choose the rate."""
    train, valid, _ = (tuple(text[:n_characters] for text in each) for each in parts(corpus))
    return SubwordLM(TextSource(f"{corpus}, the host's", train, valid), steps=steps, **HOST)


def prepare(folder: Path, corpus: str, host_steps: int, n_characters: int, n_test_tokens: int) -> Path:
    """Build the host and tokenize all documents once; returns the folder of the host."""
    host = materialise(host_of(corpus, host_steps, n_characters))
    path = folder / f"documents-{host.name}-{n_characters}-{n_test_tokens}.safetensors"
    if not path.exists():
        tokenizer, (train, valid, test) = load_tokenizer(host), parts(corpus)
        found = {"train": (train, n_characters, None), "valid": (valid, None, n_test_tokens), "test": (test, None, n_test_tokens)}
        save_state(path, {name: [_ids(tokenizer, text, *limits) for text in each] for name, (each, *limits) in found.items()})
    return host


def _ids(tokenizer: Any, text: str, n_characters: int | None, n_tokens: int | None) -> Tensor:
    most = n_characters if n_tokens is None else _CHARACTERS * n_tokens
    return torch.tensor(tokenizer(text[:most], add_special_tokens=False)["input_ids"])[:n_tokens]


class Forgetful(nn.Module):
    """An attached model whose memory is emptied before every window; calls begin with a window."""

    def __init__(self, model: AttachedMelodi) -> None:
        super().__init__()
        self.model = model

    def init_state(self, batch: int) -> Any:
        return self.model.init_state(batch)

    def forward(self, tokens: Tensor, state: Any = None, lengths: Tensor | None = None) -> Any:
        is_first = torch.arange(tokens.shape[1]) % self.model.config.window == 0
        return self.model(tokens, state, lengths, is_first.expand_as(tokens))


def attach(host: Any, arm: str, seed: int) -> AttachedMelodi:
    """An arm around a host.

    "adapters" have the rank that comes nearest to as many parameters as "melodi" has. "memory off" is what an empty memory leaves of
    "melodi", its adapters: a memory layer that finds nothing adds nothing, and is not computed here.
    """
    memory = AttachedMelodiConfig(window=WINDOW, seed=seed, **MEMORY)
    if arm == "melodi":
        return attach_melodi(host, memory)
    if arm == "memory off":
        return attach_melodi(host, AttachedMelodiConfig(window=WINDOW, seed=seed, layers=(), lora_rank=memory.lora_rank))
    twin = type(host)(host.config)
    n_wanted = _n_trained(attach_melodi(twin, memory))
    n_each = sum(parameter.numel() for name, parameter in twin.named_parameters() if ".lora_" in name) / memory.lora_rank
    return attach_melodi(host, AttachedMelodiConfig(window=WINDOW, seed=seed, layers=(), lora_rank=round(n_wanted / n_each)))


def _n_trained(model: AttachedMelodi) -> int:
    return sum(parameter.numel() for parameter in model.added().values())


def is_bare_at_attach(folder: Path, documents: list[Tensor]) -> bool:
    """Whether the logits of eight windows of each document are the host's own bit for bit."""
    tokens = torch.stack([document[: 8 * WINDOW] for document in documents])
    with torch.no_grad():
        bare = load_language_model(folder)(tokens.view(-1, WINDOW)).logits
        return torch.equal(attach(load_language_model(folder), "melodi", 0)(tokens)[0].view_as(bare), bare)


def measured(model: nn.Module, documents: list[Tensor]) -> Result:
    """Nats per token of each document, and over all by the place in the window, the first window left out."""
    losses = document_losses(model, documents, bos=END, rows=len(documents), segment=SEGMENT)
    whole = torch.cat([loss[WINDOW : len(loss) - len(loss) % WINDOW].view(-1, WINDOW) for loss in losses])
    return {"nats": [float(loss.double().mean()) for loss in losses], "by_place": whole.double().mean(0).tolist()}


def trained(
    training: Path, documents: dict[str, list[Tensor]], host: Path, arm: str, seed: int, rate: float, steps: int, side: str
) -> Result:
    """Train an arm, and measure it on one side."""
    attached = attach(load_language_model(host), arm, seed)
    start, n_steps = time.process_time(), 0
    reader = DocumentReader(documents["train"], ROWS, SEGMENT, bos=END, seed=seed)
    for progress in ContextTrainer(attached, reader, steps, lr=rate, folder=training, save_every=_CHECKPOINT_STEPS, autocast=True).run():
        n_steps += 1
        last = float(progress.loss) if progress.step == steps else None
    seconds = (time.process_time() - start) / n_steps if n_steps else None
    found = measured(attached, documents[side]) | {"last_training_nats": last if n_steps else None, "cpu_seconds_per_step": seconds}
    if arm == "melodi":
        found["emptied"] = measured(Forgetful(attached), documents[side])
    state = attached.init_state(1)
    return found | {"parameters": _n_trained(attached), "kv_bytes": state.nbytes("kv"), "stored_bytes": state.nbytes()}


def bare(documents: dict[str, list[Tensor]], host: Path) -> Result:
    """The host as it came, on the held-out documents."""
    model = attach(load_language_model(host), "adapters", 0)
    return measured(model, documents["test"]) | {"is_bare_at_attach": is_bare_at_attach(host, documents["test"])}


def run_cell(cell: Cell, folder: Path, cpu_seconds: float | None = None) -> None:
    """One cell in this process; its figures are written whole, then its checkpoint goes."""
    settings = dict(cell.settings)
    host, documents = Path(settings.pop("host")), load_state(folder / settings.pop("documents"))
    training = folder / f"{cell.key}.training"
    with one_thread(), flushed_denormals():
        found = bare(documents, host) if cell.kind == "bare" else trained(training, documents, host, **settings)
    write_whole(folder / f"{cell.key}.json", json.dumps({"kind": cell.kind, "settings": settings} | found, indent=1) + "\n")
    shutil.rmtree(training, ignore_errors=True)
