"""A memory around frozen GPT-2 and Llama models of a few thousand numbers."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from attached_models import HOSTS, V, W, attached, close, gpt2, ids, llama, same_state, sizes
from torch import nn

from remanence.context import ContextTrainer, DocumentReader, attach_melodi, document_losses
from remanence.context._attached_call import visible_entries
from remanence.context._layout import lay_out
from remanence.keys import generator

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
    _, later = made(ids(1, 1, "next"), state)
    assert state.long.any()
    assert torch.equal(later.long, state.long), "a call that completes no window leaves memory as it is"


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
