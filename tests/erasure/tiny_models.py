"""Models of width 8 for the tests of erasure, and changes to their weights."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from remanence.keys import generator, keyed_rng


def tiny_gpt2(seed=0, **settings):
    size = {"vocab_size": 13, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with keyed_rng("tiny gpt2", seed):
        return GPT2LMHeadModel(GPT2Config(**(size | still | settings)))


def tiny_llama(seed=0, **settings):
    size = {"vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    with keyed_rng("tiny llama", seed):
        return LlamaForCausalLM(LlamaConfig(**(size | more | settings)))


@torch.no_grad()
def drift(model, *key):
    """Move every weight of a model, as training would."""
    rng = generator("drift", *key)
    for parameter in model.parameters():
        parameter += (torch.randn(parameter.shape, generator=rng) * 0.01).to(parameter.dtype)
    return model
