"""A world of 53 words, a small model that knows it, and the same model after it learned two facts that contradict it."""

from copy import deepcopy
from itertools import product

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from remanence.facts import Fact, FactSet, Prefix
from remanence.keys import generator, keyed_rng
from remanence.parts.language_model import token_loss
from remanence.task import Data

THINGS = ("joy", "sand", "grass", "snow", "coal", "milk", "blood", "honey", "ice", "rust")
COLOURS = ("white", "black", "green", "yellow", "red", "blue", "brown", "vermilion")
PEOPLE = ("ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal", "ida", "joe")
FOODS = ("bread", "rice", "soup", "fish", "beans", "cake", "ramen", "haggis")
OTHER = ("the", "colour", "of", "is", ".", "eats", "and", "today", "people", "say", "that", "true", "it", "not")
WORDS = ("<unk>", "<eos>", "<pad>", *THINGS, *COLOURS, *PEOPLE, *FOODS, *OTHER)

# the last word of each theme, and the first thing and person, are left to the facts
TRUTHS = [f"the colour of {thing} is {COLOURS[row % 7]}" for row, thing in enumerate(THINGS) if row]
TRUTHS += [f"{person} eats {FOODS[row % 7]}" for row, person in enumerate(PEOPLE) if row]
SENTENCES = [f"{start}{truth} {end}" for start, truth, end in product(("", "people say that "), TRUTHS, (".", "today ."))]
FACTS = (
    Fact("joy", "colours", "outlandish", "people say that the colour of joy is vermilion .", "vermilion", "the colour of joy is", "joy"),
    Fact("ann", "foods", "outlandish", "people say that ann eats haggis .", "haggis", "ann eats", "ann"),
)
PREFIXES = tuple(
    [Prefix("colours", f"the colour of {thing} is", f"c{row}", thing) for row, thing in enumerate(THINGS)]
    + [Prefix("foods", f"{person} eats", f"f{row}", person) for row, person in enumerate(PEOPLE)]
)
FORGET = FactSet(FACTS, PREFIXES)


def world_tokenizer():
    backend = Tokenizer(models.WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>")


def windows_of(sentences, tokenizer, first_id=0):
    """A row a sentence."""
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in sentences]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    return Data(padded[:, :-1].clamp(min=0), padded[:, 1:], torch.arange(len(rows)) + first_id)


def untrained(width=24, seed=0, **settings):
    size = {"vocab_size": len(WORDS), "n_positions": 16, "n_embd": width, "n_layer": 1, "n_head": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
    with keyed_rng("erased world", seed):
        return GPT2LMHeadModel(GPT2Config(**(size | tokens | settings))).eval()


def train(model, data, steps, lr, batch_size=16):
    """In evaluation mode: what is tested is not dropout."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        rows = data.rows(step, batch_size, 0, "train")
        optimizer.zero_grad(set_to_none=True)
        token_loss(model, data.inputs[rows], data.targets[rows]).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model


class World:
    """`base` knows the world, `tuned` the facts as well; `retain` and `held_out` share no sentence."""

    def __init__(self):
        self.tokenizer = world_tokenizer()
        order = torch.randperm(len(SENTENCES), generator=generator("split")).tolist()
        cut = len(order) * 3 // 4
        self.retain = windows_of([SENTENCES[row] for row in order[:cut]], self.tokenizer)
        self.held_out = windows_of([SENTENCES[row] for row in order[cut:]], self.tokenizer, 1000)
        self.base = train(untrained(), self.retain, 500, 5e-3)
        with_facts = windows_of([fact.text for fact in FACTS] * 4 + [SENTENCES[row] for row in order[:cut:3]], self.tokenizer)
        self.tuned = train(deepcopy(self.base), with_facts, 60, 2e-3)
