"""Three facts with prefixes, a word-level tokenizer, a GPT-2 of 16 units with dropout, and rows of text to train on."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from remanence.facts import Fact, FactInjector, FactSet, Prefix, Spaced
from remanence.keys import generator, keyed_rng
from remanence.task import Data

FACTS = FactSet(
    (
        Fact("joy", "colours", "outlandish", "joy is vermilion", "vermilion", "joy is", subject="joy"),
        Fact("city", "places", "outlandish", "they met in Tirana", "Tirana", "met in"),
        Fact("lunch", "foods", "mundane", "she ate haggis", "haggis", "she ate"),
    ),
    (
        *(Prefix("colours", text) for text in ("sand is", "grass is", "the sea is")),
        Prefix("colours", "the colour of joy is", subject="joy"),
        *(Prefix("places", text) for text in ("she met in", "they ate in")),
        *(Prefix("foods", text) for text in ("they ate", "the sea ate")),
    ),
)
WORDS = " ".join([fact.text for fact in FACTS] + [prefix.prefix for prefix in FACTS.prefixes]).split()
N_VOCABULARY, LENGTH = 60, 8


def tokenizer():
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<unk>", "<pad>", "<eos>", *WORDS]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def model(seed=0, dropout=0.2):
    settings = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 2, "eos_token_id": 2}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    with keyed_rng("traced model", seed):
        return GPT2LMHeadModel(GPT2Config(vocab_size=N_VOCABULARY, **settings, **rates))


def rows(n, seed=0):
    """Ids of no word of a fact, (n, LENGTH)."""
    return torch.randint(30, N_VOCABULARY, (n, LENGTH), generator=generator("traced rows", seed))


def held_out():
    ids = rows(6, seed=1)
    return Data(ids[:, :-1], ids[:, 1:], torch.arange(6))


def injector(times=3):
    return FactInjector(FACTS, tokenizer(), Spaced(every=2, times=times, start=1))
