"""A memory around frozen GPT-2 and Llama models of a few thousand numbers."""

import copy
import json
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from remanence.context import (
    AttachedMelodiConfig,
    ContextState,
    ContextTrainer,
    DocumentReader,
    attach_melodi,
    document_losses,
    load_attached,
    load_context_state,
    save_context_state,
)
from remanence.context._attached_call import visible_entries
from remanence.context._layout import lay_out
from remanence.errors import DataError, NonFiniteLoss, SettingError, StateMismatchError
from remanence.keys import generator, keyed_rng
from remanence.state import load_state, save_state

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


# --- at attach -----------------------------------------------------------------------------------------------------------


@HOSTS
@pytest.mark.parametrize("rank", [0, 2])
def test_at_attach_the_logits_are_the_bare_models_bit_for_bit(host, rank):
    tokens = ids(2, 4 * W)
    bare = host()(tokens.view(-1, W)).logits.view(2, -1, V)
    made = attach_melodi(host(), sizes(lora_rank=rank))
    logits, state = made(tokens)
    assert torch.equal(logits, bare)
    assert state.short.abs().max() > 0.1, "memory is written from the start, and read as nothing"
    assert not torch.equal(attached(host, lora_rank=rank)(tokens)[0], bare)


@HOSTS
def test_only_what_was_added_is_trained_and_the_host_never_drops(host):
    made = attach_melodi(host(), sizes(lora_rank=2)).train()
    trained = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert trained == set(made.added())
    assert any(".lora_" in name for name in trained)
    assert made.training
    assert made.layers.training
    assert not any(module.training for module in made.host.modules())
    mlp = [name for name in trained if "mlp" in name and name.startswith("host.")]
    assert mlp == [], "adapters stand in the attention alone"


@HOSTS
def test_the_host_by_itself_stays_the_bare_model(host):
    tokens = ids(2, W)
    made = attached(host)
    made(tokens)
    assert torch.equal(made.host(tokens).logits, host()(tokens).logits)


@HOSTS
def test_the_first_window_is_the_hosts_own_and_the_second_is_not(host):
    made, tokens = attached(host), ids(3, 2 * W)
    logits, bare = made(tokens)[0], host()(tokens.view(-1, W)).logits.view(3, -1, V)
    close(logits[:, :W], bare[:, :W])
    assert (logits[:, W:] - bare[:, W:]).abs().max() > 0.01


def test_a_host_in_bfloat16_keeps_its_dtype():
    made = attach_melodi(llama().bfloat16(), sizes())
    tokens = ids(1, 2 * W)
    logits, state = made(tokens)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, made.host(tokens.view(-1, W)).logits.view(1, -1, V))
    assert state.short.dtype == torch.float32


# --- reading -------------------------------------------------------------------------------------------------------------


@HOSTS
@pytest.mark.parametrize("place", [3, W - 1, W, 2 * W + 3])
def test_no_token_is_seen_before_it_is_read(host, place):
    made, tokens = attached(host), ids(2, 3 * W)
    other = tokens.clone()
    other[:, place] = (other[:, place] + 1) % V
    before, after = made(tokens)[0], made(other)[0]
    assert torch.equal(before[:, :place], after[:, :place])
    assert (before[:, place] != after[:, place]).any()
    assert (before[:, -1] - after[:, -1]).abs().max() > 1e-6 or place // W == 2


@HOSTS
@pytest.mark.parametrize("cuts", [[W, 2 * W], [5], [1, 2, W + 3], [3 * W - 1, 3 * W]])
def test_cuts_change_nothing(host, cuts):
    made, tokens = attached(host, lora_rank=2), ids(2, 5 * W + 3)
    logits, state = made(tokens)
    parts, carried = [], None
    for part in torch.tensor_split(tokens, cuts, dim=1):
        found, carried = made(part, carried)
        parts.append(found)
    close(torch.cat(parts, 1), logits)
    same_state(carried, state)


@pytest.mark.parametrize(
    "settings",
    [{}, {"short": 0}, {"long_per_window": 0}, {"long_windows": 0}, {"summary": 5}, {"layers": (1,)}, {"layers": (0, 2), "long_layer": 2}],
)
def test_every_part_can_be_left_out(settings):
    made, tokens = attached(**settings), ids(2, 3 * W)
    logits, state = made(tokens)
    first, carried = made(tokens[:, : W + 2])
    rest, carried = made(tokens[:, W + 2 :], carried)
    close(torch.cat([first, rest], 1), logits)
    same_state(carried, state)
    assert (logits - attached(is_trained=False, **settings)(tokens)[0]).abs().max() > 0.001


def test_rows_with_lengths_and_resets_read_as_if_alone():
    made, tokens = attached(), ids(4, 4 * W)
    lengths = torch.tensor([4 * W, 2 * W + 3, 0, 3 * W])
    reset = torch.zeros_like(tokens, dtype=torch.bool)
    reset[0, 11] = reset[1, 2 * W] = reset[3, 0] = reset[3, 9] = reset[3, 12] = True
    _, before = made(ids(4, 2 * W + 1, "before"))
    logits, state = made(tokens, before, lengths, reset)
    for row, alone in enumerate(before.split()):
        pieces, length = [], int(lengths[row])
        starts = [*sorted({0, *reset[row].nonzero()[:, 0].tolist()}), length]
        for begin, end in pairwise(starts):
            if reset[row, begin : begin + 1].any():
                alone = alone.reset(torch.tensor([True]))
            found, alone = made(tokens[row : row + 1, begin:end], alone)
            pieces.append(found)
        close(logits[row, :length], torch.cat(pieces, 1)[0])
        same_state(state.index_select(torch.tensor([row])), alone)


def test_nothing_of_an_earlier_document_stays_in_the_state():
    made = attached()
    _, state = made(ids(1, 3 * W))
    reset = torch.zeros(1, 4, dtype=torch.bool)
    reset[0, 1] = True
    _, state = made(ids(1, 4, "next"), state, reset=reset)
    assert state.n_tokens.tolist() == [3]
    assert not state.short.any()
    assert not state.long.any()


def test_the_queue_is_first_in_first_out():
    """However many windows a call has: the last three are kept, each as it was when it was written."""
    made = attached(long_windows=3)
    tokens, state, written = ids(1, 9 * W), None, {}
    for begin, n in ((0, 1), (1, 2), (3, 3), (6, 1), (7, 2)):
        _, state = made(tokens[:, begin * W : (begin + n) * W], state)
        places = {window: place for place, window in enumerate(state.long_window[0].tolist()) if window >= 0}
        assert sorted(places) == list(range(max(0, begin + n - 3), begin + n))
        for window, place in places.items():
            close(written.setdefault(window, state.long[0, 0, place]), state.long[0, 0, place])
    assert sorted(written) == list(range(9))


def test_forgetting_a_window_empties_its_places_in_the_queue():
    made, tokens = attached(long_windows=3), ids(1, W)
    _, state = made(ids(1, 3 * W, "past"))
    less = state.forget([1])
    assert less.long_window.tolist() == [[0, -1, 2]]
    assert (made(tokens, state)[0] - made(tokens, less)[0]).abs().max() > 1e-4


def test_a_window_sees_the_newest_entries_of_its_own_document():
    made = attached(long_windows=2)
    reset = torch.zeros(2, 4 * W, dtype=torch.bool)
    reset[1, 2 * W] = True
    state = made(ids(2, 2 * W))[1]
    layout = lay_out(ids(2, 4 * W), state, None, reset)
    n_used, seen = visible_entries(state.long_window, layout)  # a column a window: two old ones, then four
    assert n_used == 2
    seen = seen.long()
    assert seen[0].tolist() == [[1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]]
    assert seen[1].tolist() == [[1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]]


@pytest.mark.parametrize("part", ["short", "long"])
def test_both_memories_are_read(part):
    made, tokens = attached(), ids(1, W)
    _, state = made(ids(1, 2 * W, "past"))
    emptied = replace(state, **{part: torch.zeros_like(getattr(state, part))})
    assert (made(tokens, state)[0] - made(tokens, emptied)[0]).abs().max() > 1e-4


def test_empty_calls():
    made = attached()
    state = made.init_state(2)
    logits, same = made(torch.empty(2, 0, dtype=torch.int64), state)
    assert logits.shape == (2, 0, V)
    assert same is state
    assert made(torch.empty(0, 5, dtype=torch.int64))[0].shape == (0, 5, V)
    _, unread = made(ids(2, 3), state, lengths=torch.tensor([0, 0]))
    same_state(unread, state)


# --- gradients and training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "far"), [({"long_per_window": 0}, "short"), ({"short": 0}, "long")])
def test_gradients_flow_through_each_memory_inside_a_call_and_not_across_a_detach(settings, far):
    made, tokens = attached(**settings), ids(1, 3 * W)
    embedded = []
    made.host.get_input_embeddings().register_forward_hook(lambda module, args, output: embedded.append(output.requires_grad_()) or output)
    logits, _ = made(tokens)
    (gradient,) = torch.autograd.grad(logits[:, -1].sum(), embedded[0])
    assert gradient[0].abs().max() > 0, f"window 0 is reached through {far}"
    _, state = made(tokens[:, :W])
    assert getattr(state, far).requires_grad
    logits, _ = made(tokens[:, W:], state.detach())
    assert torch.autograd.grad(logits.sum(), embedded[1], allow_unused=True)[0] is None


def pairs(n_documents, *key):
    """Documents of two tokens each, at random: a window of four must find out which, unless memory tells."""
    return [row[torch.randint(2, (24,), generator=generator(*key, number))] for number, row in enumerate(ids(n_documents, 2, *key))]


def pretrained_host():
    """A host that was trained on windows of four of such documents."""
    host, table = llama(), torch.stack(pairs(512, "train"))
    inputs, targets = nn.functional.pad(table[:, :-1], (1, 0)).view(-1, 4), table.view(-1, 4)
    optimizer = torch.optim.AdamW(host.parameters(), lr=1e-2)
    for rows in torch.arange(len(inputs)).view(-1, 64)[:48].repeat(2, 1):
        loss = nn.functional.cross_entropy(host(inputs[rows]).logits.flatten(0, 1), targets[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return host


def test_training_with_memory_learns_what_adapters_alone_cannot():
    host, losses = pretrained_host(), {}
    for name, settings in {"memory": {}, "adapters": {"layers": (), "lora_rank": 8}}.items():
        made = attach_melodi(copy.deepcopy(host), sizes(**{"window": 4, "short": 4, "hidden_size": 16} | settings))
        reader = DocumentReader(pairs(512, "train"), rows=16, segment=12, bos=0)
        for _ in ContextTrainer(made, reader, steps=40, lr=1e-2).run():
            pass
        found = torch.stack(document_losses(made, pairs(32, "test"), bos=0, rows=32, segment=24))
        losses[name] = found[:, 4:].reshape(-1, 4).mean(0)  # by place in the window, from the second window on
    assert losses["memory"].mean() < losses["adapters"].mean() - 0.15
    assert losses["memory"][0] < losses["adapters"][0] - 0.3, "most at a window's beginning"


def test_a_training_step_leaves_the_host_as_it_was():
    made = attach_melodi(gpt2(), sizes(lora_rank=2))
    before = {name: parameter.clone() for name, parameter in made.named_parameters()}
    for _ in ContextTrainer(made, DocumentReader(pairs(4, 0), rows=2, segment=2 * W, bos=0), steps=2).run():
        pass
    changed = {name for name, parameter in made.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert changed <= set(made.added())


def test_the_loss_is_the_mean_over_targets():
    made, tokens, targets = attached(), ids(2, W + 3), ids(2, W + 3, "targets")
    targets[0, 2:] = -1
    loss, _ = made.loss(tokens, targets)
    log_p = made(tokens)[0].log_softmax(-1)
    wanted = [-log_p[row, place, targets[row, place]] for row in range(2) for place in range(W + 3) if targets[row, place] >= 0]
    close(loss, torch.stack(wanted).mean())


def test_generating_goes_on_as_reading_does_and_leaves_the_state():
    made, prompt = attached(), ids(2, W + 3)
    _, state = made(ids(2, 2 * W + 5, "past"))
    copy = state.fork()
    new = torch.stack(list(made.generate(prompt, state, max_new_tokens=2 * W, temperature=0)), 1)
    same_state(state, copy)
    logits, _ = made(torch.cat([prompt, new], 1), state)
    assert torch.equal(logits[:, W + 2 : -1].argmax(-1), new)
    drawn = [torch.stack(list(made.generate(prompt, state, 5, generator=generator(1), top_k=3))) for _ in range(2)]
    assert torch.equal(*drawn)


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
