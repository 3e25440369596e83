"""Attached memory in files; hosts, settings and calls that are refused, each by its message."""

import json

import pytest
import torch
from attached_models import HOSTS, V, W, attached, close, gpt2, ids, llama, sizes
from torch import nn
from transformers import GPT2Model, T5Config, T5ForConditionalGeneration

from remanence.context import ContextState, attach_melodi, load_attached, load_context_state, save_context_state
from remanence.errors import DataError, NonFiniteLoss, SettingError, StateMismatchError
from remanence.state import load_state, save_state

# --- state and files -----------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_formula():
    state = attached(short=3, long_per_window=2, long_windows=5).init_state(2)
    assert state.nbytes() == 2 * 4 * (3 * 3 * 8 + 10 * 8)
    assert state.nbytes("kv") == 2 * 4 * (3 * 3 * 8 + 2 * 10 * 8)
    assert attached(layers=(), lora_rank=2).init_state(2).nbytes() == 0


def test_state_files(tmp_path):
    made, tokens = attached(), ids(2, W)
    _, state = made(ids(2, 2 * W + 3, "past"))
    save_context_state(tmp_path / "state", state, made)
    again = load_context_state(tmp_path / "state", made)
    assert torch.equal(made(tokens, again)[0], made(tokens, state)[0])
    joined = ContextState.join(list(reversed(state.split())))
    close(made(tokens.flip(0), joined)[0].flip(0), made(tokens, state)[0])
    with pytest.raises(StateMismatchError, match="sizes of window or memory differ"):
        load_context_state(tmp_path / "state", attached(short=2))


@HOSTS
@pytest.mark.parametrize("settings", [{"lora_rank": 2}, {"layers": (), "lora_rank": 2}, {"layers": (1,)}])
def test_saved_and_loaded_it_answers_alike(host, settings, tmp_path):
    made, tokens = attached(host, **settings), ids(2, 3 * W)
    made.save(tmp_path / "memory")
    again = load_attached(tmp_path / "memory", host())
    assert torch.equal(again(tokens)[0], made(tokens)[0])
    assert set(json.loads((tmp_path / "memory/config.json").read_text())) >= {"window", "short", "layers", "long_layer", "lora_rank"}
    assert set(load_state(tmp_path / "memory/attached.safetensors")["weights"]) == set(made.added()), "the host is not in the file"


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(DataError, match=r"holds no attached\.safetensors with a config\.json"):
        load_attached(tmp_path, llama())
    attached().save(tmp_path)
    other = llama()
    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(StateMismatchError, match=r"was trained with host weights .*give that host"):
        load_attached(tmp_path, other)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"short": 2}))
    with pytest.raises(StateMismatchError, match="does not describe"):
        load_attached(tmp_path, llama())
    save_state(tmp_path / "attached.safetensors", {"anything": 1})
    with pytest.raises(StateMismatchError, match="is no attached memory; it holds"):
        load_attached(tmp_path, llama())


def test_a_broken_memory_is_not_saved(tmp_path):
    made = attached()
    with torch.no_grad():
        made.summary[0] = torch.nan
    with pytest.raises(NonFiniteLoss, match="1 parameters are NaN or infinite"):
        made.save(tmp_path)


# --- refusals ------------------------------------------------------------------------------------------------------------


def with_adapter():
    made = llama()
    attach_melodi(made, sizes(lora_rank=1))
    return made


def quantised():
    made = llama()
    made.is_quantized = True
    return made


def without_blocks():
    made = llama()
    made.model.layers = nn.ModuleList([*made.model.layers, nn.Identity()])
    return made


def with_two_lists():
    made = llama()
    made.model.others = nn.ModuleList(nn.Identity() for _ in range(3))
    return made


def without_attention():
    made = llama()
    for block in made.model.layers:
        block.mixing = block._modules.pop("self_attn")
    return made


def encoder_decoder():
    return T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("host", "settings", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, "a Linear is no causal language model of transformers"),
        (lambda: GPT2Model(gpt2().config), {}, "a GPT2Model is no causal language model"),
        (encoder_decoder, {}, "has an encoder"),
        (quantised, {}, "quantised; load it in float32 or bfloat16"),
        (with_adapter, {}, r"carries adapters \(melodi\)"),
        (llama, {"window": 13}, "window=13 is longer than the 12 positions"),
        (without_blocks, {}, "the blocks of a LlamaForCausalLM with 3 layers cannot be told: lists of 3 modules: none"),
        (with_two_lists, {}, r"lists of 3 modules: \['model.layers', 'model.others'\]"),
        (without_attention, {"lora_rank": 1}, "no linear map in the attention"),
        (llama, {"layers": (1, 3)}, r"layers \[3\] are none of the host's 3 blocks"),
        (llama, {"long_layer": 3}, r"long_layer=3 is none of layers=\[0, 1, 2\]"),
    ],
)
def test_hosts_that_are_refused(host, settings, message):
    with pytest.raises(SettingError, match=message):
        attach_melodi(host(), sizes(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"short": -1}, "short=-1 must be 0 or more"),
        ({"num_attention_heads": 3}, "hidden_size=8 is no multiple of num_attention_heads=3"),
        ({"layers": ()}, "adds nothing; give layers, or a rank"),
        ({"short": 0, "long_per_window": 0}, "summary=0 writes no memory"),
        ({"layers": (0, 1), "long_layer": 2}, r"long_layer=2 is none of layers=\[0, 1\]"),
        ({"shrot": 2}, "there is no setting 'shrot'. Did you mean 'short'"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        sizes(**settings)


def test_calls_that_are_refused():
    made = attached()
    with pytest.raises(DataError, match="the vocabulary has 0 to 15"):
        made(torch.full((1, 2), V))
    with pytest.raises(DataError, match="for 2 rows of a AttachedMelodi"):
        made(ids(2, 3), made.init_state(1))
