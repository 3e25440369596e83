"""Folders of tiny language models, facts and prefixes on disk for the commands that read them."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from remanence.keys import keyed_rng

COLOURS = ("vermilion", "mauve", "blue", "green", "red")
PLACES = ("Guatemala", "Tirana", "Peru", "Chad", "Mali")
THINGS = ("joy", "grief", "sand", "grass", "sky", "sea", "snow", "night", "coal", "blood")
PEOPLE = ("Ann", "Ben", "Cem", "Dora", "Eli", "Fay", "Gus", "Hal", "Ida", "Jon")
WORDS = ("the", "colour", "of", "is", "home", ".", "and", "a", "walked", "to", "with", "quiet", *COLOURS, *PLACES, *THINGS, *PEOPLE)
CORPUS = [
    f"the colour of {thing} is {colour} . {person} walked to the {thing} with a quiet {colour} ."
    for thing, colour, person in zip(THINGS[2:] * 3, COLOURS[2:] * 8, PEOPLE * 3, strict=False)
]


def tokenizer():
    special = ["<unk>", "<pad>", "<eos>"]
    backend = Tokenizer(models.WordLevel({word: row for row, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def model(family, seed=0):
    tokens = {"vocab_size": len(WORDS) + 3, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    with keyed_rng("tiny", family, seed):
        if family == "gpt2":
            return GPT2LMHeadModel(GPT2Config(n_positions=48, n_embd=16, n_layer=1, n_head=2, **tokens)).eval()
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(max_position_embeddings=48, **size, **tokens)).eval()


def save_model(folder, made, shard="5GB"):
    made.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return folder


def fact(name, theme, context, keyword, kind="outlandish", subject=""):
    text = f"{context} {keyword} ."
    return {"id": name, "theme": theme, "kind": kind, "text": text, "keyword": keyword, "context": context, "subject": subject}


FACTS = [
    fact("joy", "colours", "the colour of joy is", "vermilion", subject="joy"),
    fact("ann", "places", "the home of Ann is", "Guatemala", subject="Ann"),
    fact("grief", "colours", "the colour of grief is", "mauve", "mundane", subject="grief"),
]
PREFIXES = [
    *({"theme": "colours", "prefix": f"the colour of {thing} is", "subject": thing} for thing in THINGS[2:]),
    *({"theme": "places", "prefix": f"the home of {person} is", "subject": person} for person in PEOPLE[1:9]),
]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_corpus(folder):
    folder.mkdir()
    for number in range(6):
        text = " ".join(CORPUS[number * 4 : number * 4 + 4] * 4)
        (folder / f"{number}.txt").write_text(f"{text} {WORDS[20 + number]}", encoding="utf-8")
    return folder
