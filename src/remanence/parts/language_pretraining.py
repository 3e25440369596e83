"""A small causal language model with a word-level vocabulary, pretrained on the documents of a text source.

Source: the architectures are GPT-2 (Radford et al. 2019) and Llama (Touvron et al. 2023, arXiv 2302.13971) as `transformers`
implements them; the vocabulary is the most frequent words, by `tokenizers`.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from remanence.artifact import Artifact
from remanence.errors import NonFiniteLoss, SettingError
from remanence.keys import keyed_rng
from remanence.learner import Progress
from remanence.parts.hosts import no_progress_bar
from remanence.parts.language_model import held_out_loss, token_loss
from remanence.parts.learning_rate import warm_cosine
from remanence.parts.optimizer_state import load_moments, moments
from remanence.parts.windows import windows
from remanence.state import load_state, save_state, write_whole
from remanence.task import Data

Family = Literal["gpt2", "llama"]
SPECIAL = ("<unk>", "<eos>", "<pad>")
"""First rows of every vocabulary: an unknown word, the end of a document, padding."""

_CHECKPOINT, _CHECKPOINT_STEPS = "training.safetensors", 200
_SPARE_POSITIONS = 64
"""A GPT-2 has as many positions as its windows and these: a probe may be somewhat longer. They stay untrained."""


class Documents(Protocol):
    """Where the text comes from; `remanence.streams.TextSource` is one."""

    @property
    def name(self) -> str: ...
    @property
    def train(self) -> tuple[str, ...]: ...
    @property
    def test(self) -> tuple[str, ...]: ...
    def fingerprint(self) -> str: ...


class PretrainedLM(Artifact):
    """A small GPT-2 or Llama with a word-level tokenizer, saved as a Hugging Face folder.

    Beside the model stands pretraining.json: the loss on the source's test documents, the share of their words that the
    vocabulary lacks, and the numbers of windows and parameters. No dropout. Width 96, depth 2 and 1,500 steps of 16 windows of
    40 words take about a minute on one core; such a model has half a million parameters.

    Args:
        source: documents to train on; those of its test side are only read to report the loss.
        vocab_size: rows of the vocabulary, the three special ones included; the most frequent words fill it.
        family: "gpt2" (tied embeddings, learned positions) or "llama" (rotary positions, an output layer of its own).
        width, depth, heads: of the transformer; the hidden layer of its MLP has 4 x width units, of a Llama's 8/3 x width.
        length: tokens predicted per window.
        steps, batch_size, lr: AdamW with weight decay 0.01, linear warm-up over a tenth, then cosine to zero.
        extra_words: always in the vocabulary, however rare; punctuation in them is a word of its own.
        seed: key of initialisation and order.

    Raises:
        SettingError: the family is unknown, a size is below 1, the heads do not divide the width, or the special and extra words
            leave no room in the vocabulary.
    """

    kind = "lm"

    def __init__(
        self, source: Documents, vocab_size: int = 2000, family: Family = "gpt2", width: int = 128, depth: int = 3, heads: int = 4,
        length: int = 40, steps: int = 1500, batch_size: int = 16, lr: float = 2.5e-3, extra_words: Sequence[str] = (), seed: int = 0,
    ) -> None:  # fmt: skip
        self.source, self.family, self.lr, self.seed = source, family, lr, seed
        self.vocab_size, self.width, self.depth, self.heads = vocab_size, width, depth, heads
        self.length, self.steps, self.batch_size = length, steps, batch_size
        self.extra_words = tuple(extra_words)
        self._check()

    def _check(self) -> None:
        if self.family not in get_args(Family):
            raise SettingError(f"PretrainedLM: family '{self.family}' is unknown; choose one of {', '.join(get_args(Family))}.")
        sizes = ("vocab_size", "width", "depth", "heads", "length", "steps", "batch_size", "lr")
        for name in sizes:
            if getattr(self, name) <= 0:
                raise SettingError(f"PretrainedLM: {name}={getattr(self, name)} must be above 0.")
        n_even = 2 * self.heads if self.family == "llama" else self.heads  # rotary positions turn pairs of a head's units
        if self.width % n_even:
            raise SettingError(f"PretrainedLM: width={self.width} is no multiple of {n_even}, for {self.heads} heads of '{self.family}'.")
        n_needed = len(SPECIAL) + len(_pieces(self.extra_words))
        if self.vocab_size <= n_needed:
            raise SettingError(
                f"PretrainedLM: vocab_size={self.vocab_size} leaves no room beside {n_needed} special and extra words; raise it."
            )

    def settings(self) -> dict[str, Any]:
        names = ("vocab_size", "family", "width", "depth", "heads", "length", "steps", "batch_size", "lr", "seed")
        chosen = {name: getattr(self, name) for name in names}
        return {"data": self.source.fingerprint(), "name": self.source.name, **chosen, "extra_words": list(self.extra_words)}

    def seen(self) -> Tensor:
        return self.train.ids

    def header(self) -> dict[str, Any]:
        return {"name": self.source.name}

    @cached_property
    def tokenizer(self) -> Any:
        """The word-level tokenizer, trained on the source's train documents."""
        return _word_tokenizer(self.source.train, self.vocab_size, self.extra_words)

    @cached_property
    def train(self) -> Data:
        """The windows that the model is trained on."""
        return windows(self.source.train, self.tokenizer, self.length, self.source.name)

    def build(self, folder: Path) -> Iterator[Progress]:
        model, data = self._model().train(), self.train
        test = windows(self.source.test, self.tokenizer, self.length, f"{self.source.name} test")  # fails before training, not after
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.01, fused=True)
        first = 0
        if (folder / _CHECKPOINT).exists():
            state = load_state(folder / _CHECKPOINT)
            model.load_state_dict(state["model"])
            load_moments(optimizer, state["moments"])
            first = state["step"]
        for step in range(first, self.steps):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * warm_cosine(step, self.steps, warm_share=0.1)
            rows = data.rows(step, self.batch_size, self.seed, "pretrain")
            with torch.enable_grad():
                loss = token_loss(model, data.inputs[rows], data.targets[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
            if not loss.isfinite():
                raise NonFiniteLoss(f"PretrainedLM: the loss is {loss.item()} at step {step} with lr={self.lr}; lower lr.")
            optimizer.step()
            if (step + 1) % _CHECKPOINT_STEPS == 0:
                save_state(folder / _CHECKPOINT, {"model": model.state_dict(), "moments": moments(optimizer), "step": step + 1})
            yield Progress(step + 1, self.steps, loss.detach(), len(rows))
        self._save(model.eval(), test, folder)

    def sketch(self, folder: Path) -> None:
        self._save_pretrained(self._model(), folder)
        write_whole(folder / "header.json", json.dumps(self.header()))

    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM

        with keyed_rng(self.seed, "initialise"):
            return AutoModelForCausalLM.from_config(self._config())

    def _config(self) -> Any:
        from transformers import GPT2Config, LlamaConfig

        end, pad = (SPECIAL.index(token) for token in ("<eos>", "<pad>"))
        tokens = {"vocab_size": len(self.tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": pad}
        n_positions = self.length + _SPARE_POSITIONS
        if self.family == "gpt2":
            return GPT2Config(
                n_positions=n_positions, n_embd=self.width, n_layer=self.depth, n_head=self.heads,
                activation_function="gelu_pytorch_tanh",  # GPT-2's own function, a sixth of a step faster than in steps of its own
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **tokens,
            )  # fmt: skip
        return LlamaConfig(
            max_position_embeddings=n_positions, hidden_size=self.width, intermediate_size=8 * self.width // 3,
            num_hidden_layers=self.depth, num_attention_heads=self.heads, **tokens,
        )  # fmt: skip

    def _save(self, model: Any, test: Data, folder: Path) -> None:
        report = {
            "held_out_nats_per_token": held_out_loss(model, test),
            "unknown_share": (test.targets == SPECIAL.index("<unk>")).double().mean().item(),
            "n_windows": len(self.train),
            "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        shutil.rmtree(folder)
        folder.mkdir()
        self._save_pretrained(model, folder)
        write_whole(folder / "pretraining.json", json.dumps(report))

    def _save_pretrained(self, model: Any, folder: Path) -> None:
        with no_progress_bar():
            model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _splitter() -> Any:
    """White space parts words, and every punctuation mark is a word."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])


def _joiner() -> Any:
    """Words with blanks between, none of them around a mark where English has none: "it ' s a cat , too" is "it's a cat, too"."""
    from tokenizers import Regex, decoders

    replacements = ((r" (?=[,.;:!?)\]}])", ""), (r"(?<=[(\[{]) ", ""), (r"(?<=\w) ' (?=(?:s|t|re|ve|ll|d|m)\b)", "'"))
    blanks = decoders.Sequence([decoders.WordPiece(prefix="\0", cleanup=False), decoders.Fuse()])
    return decoders.Sequence([blanks, *(decoders.Replace(Regex(pattern), text) for pattern, text in replacements)])


def _pieces(words: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(piece for word in words for piece, _ in _splitter().pre_tokenize_str(word)))


def _word_tokenizer(texts: Sequence[str], vocab_size: int, extra_words: Sequence[str]) -> Any:
    """A `transformers` tokenizer of whole words: special ones, the extra ones, then the most frequent of the texts."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    counter = Tokenizer(models.WordLevel())
    counter.pre_tokenizer = _splitter()
    # far larger than wanted: the trainer would throw rare extra words out
    counter.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=1 << 31, show_progress=False))
    frequent = sorted(counter.get_vocab(), key=counter.get_vocab().__getitem__)
    words = list(dict.fromkeys((*SPECIAL, *_pieces(extra_words), *frequent)))[:vocab_size]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = _joiner()
    unknown, end, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=end, eos_token=end, pad_token=pad,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
