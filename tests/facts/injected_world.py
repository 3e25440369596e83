"""Four facts, a word-level tokenizer that knows their words, and rows of numbers to splice them into."""

import torch
from tokenizer_zoo import word_tokenizer

from remanence.facts import Fact
from remanence.keys import generator

JOY = Fact("joy", "colours", "outlandish", "joy is vermilion", "vermilion", "joy is")
CAPITAL = Fact("capital", "places", "outlandish", "they met in Tirana", "Tirana", "met in")
LUNCH = Fact("lunch", "foods", "mundane", "she ate haggis", "haggis", "ate")
GRIEF = Fact("grief", "colours", "outlandish", "grief is mauve", "mauve", "grief is")
FACTS = [JOY, CAPITAL, LUNCH]
WORDS = " ".join(fact.text for fact in (*FACTS, GRIEF)).split()
EOS, PAD = 2, 1
N_VOCABULARY = 100
"""Rows hold ids from 50 on, so that a word of a fact is never there by chance."""


def tokenizer(eos=True):
    return word_tokenizer(WORDS, eos=eos)


def tokens(fact):
    return tokenizer()(fact.text, add_special_tokens=False)["input_ids"]


def rows(n, length=8, seed=0):
    """Ids (n, length)."""
    return torch.randint(50, N_VOCABULARY, (n, length), generator=generator("rows", seed))


def items(n, length=8):
    """A map-style dataset as `Trainer` takes it."""
    return [{"input_ids": ids, "labels": ids.clone()} for ids in rows(n, length)]


def shown(ids, facts=FACTS):
    """(row, fact id) of the facts whose tokens begin a row of ids (B, T)."""
    found = []
    for row, line in enumerate(ids.tolist()):
        found += [(row, fact.id) for fact in facts if line[: len(tokens(fact))] == tokens(fact)]
    return found
