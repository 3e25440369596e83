"""Words, tokenizers and language models of a few kilobytes."""

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from remanence.keys import keyed_rng

SENTENCES = ("the cat sat on the mat .", "a dog ran to the cat .", "the dog sat on a mat , and ran .", "a cat ran .")
WORDS = ("<unk>", "<eos>", "<pad>", *sorted({word for sentence in SENTENCES for word in sentence.split()}))


@dataclass(frozen=True)
class Corpus:
    """The least that a source of text is."""

    name: str = "corpus"
    train: tuple[str, ...] = SENTENCES * 6
    test: tuple[str, ...] = ("the dog ran to a mat , and sat on the mat .",)

    def fingerprint(self) -> str:
        return f"{self.train}{self.test}"


def word_tokenizer(**special):
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **({"eos_token": "<eos>"} | special))


def byte_tokenizer():
    """Byte-level BPE, as GPT-2 and Llama 3 have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def gpt2(seed=0, **settings):
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
    size = {"vocab_size": len(WORDS), "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    with keyed_rng("tiny gpt2", seed):
        return GPT2LMHeadModel(GPT2Config(**(tokens | size | settings))).eval()


def llama(seed=0, **settings):
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
    size = {"vocab_size": len(WORDS), "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with keyed_rng("tiny llama", seed):
        return LlamaForCausalLM(LlamaConfig(**(tokens | size | settings))).eval()
