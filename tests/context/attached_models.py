"""Tiny GPT-2 and Llama hosts, and a memory around them with noise in place of training."""

from dataclasses import fields

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from remanence.context import AttachedMelodiConfig, attach_melodi
from remanence.keys import generator, keyed_rng

W, V = 8, 16
TOKENS = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2(**settings):
    size = {"n_positions": 12, "n_embd": 16, "n_layer": 3, "n_head": 2, "resid_pdrop": 0.3}
    with keyed_rng("host"):
        return GPT2LMHeadModel(GPT2Config(**TOKENS | size | settings)).eval()


def llama(**settings):
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 12}
    with keyed_rng("host"):
        return LlamaForCausalLM(LlamaConfig(**TOKENS | size | settings)).eval()


HOSTS = pytest.mark.parametrize("host", [gpt2, llama], ids=["gpt2", "llama"])


def sizes(**settings):
    small = {"window": W, "hidden_size": 8, "num_attention_heads": 2, "short": 3, "long_per_window": 2, "long_windows": 2}
    return AttachedMelodiConfig(**small | settings)


def attached(host=llama, is_trained=True, **settings):
    """An attached memory; in place of training, noise on everything that was added."""
    made = attach_melodi(host(), sizes(**settings))
    with torch.no_grad(), keyed_rng("noise"):
        for parameter in made.added().values():
            parameter.add_(0.3 * is_trained * torch.randn_like(parameter))
    return made


def ids(batch, length, *key):
    return torch.randint(V, (batch, length), generator=generator("ids", *key))


def close(one, two):
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def same_state(one, two):
    for field in fields(one):
        if field.name == "tail":
            kept = torch.arange(W) < one.n_tail[:, None]
            assert torch.equal(one.tail.where(kept, 0), two.tail.where(kept, 0))
        elif field.name != "cache":
            close(getattr(one, field.name), getattr(two, field.name))
