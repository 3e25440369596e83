"""MELODI against a slow reference written from the equations; and T1 to T8."""

import gc
import math
import os
import subprocess
import sys

import pytest
import torch
from context_models import RARE, SIZES, WINDOW, close, fresh, ids, in_pieces, same_memory, shared, start

from remanence.context.body import _matrix
from remanence.context.configuration import MelodiConfig, MemorizingConfig, TransformerXLConfig
from remanence.context.melodi import MelodiLM
from remanence.context.memorizing import MemorizingTransformer
from remanence.context.state import load_context_state, save_context_state
from remanence.context.transformer_xl import TransformerXL
from remanence.state import load_state, save_state

# --- the equations, one number at a time: no code is shared with the package --------------------------------------------


def rms(x, scale):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def bucket(distance):
    """T5: 16 buckets for single distances, 16 logarithmic ones up to 128."""
    if distance < 16:
        return distance
    return min(31, 16 + int(math.log(distance / 16) / math.log(128 / 16) * 16))


def softmax(logits, values, width):
    """Weights of the values by their logits, beside a floor of -1000 that says nothing."""
    if not logits:
        return torch.zeros(width, dtype=torch.float64)
    weights = torch.stack([*logits, torch.tensor(-1000.0, dtype=torch.float64)]).softmax(0)
    return sum(weight * value for weight, value in zip(weights, values, strict=False))


class Plain:
    """One document, one window at a time, one query at a time. Section 3 of the specification, in its order."""

    def __init__(self, model):
        self.c, self.w = model.config, dict(model.named_parameters())
        self.h, self.e = self.c.num_attention_heads, self.c.hidden_size // self.c.num_attention_heads

    def layer(self, number, name):
        return self.w[f"layers.{number}.{name}"]

    def project(self, number, y):
        """(T, d) -> queries, keys, values, each a list over heads of (T, e)."""
        normed = rms(y, self.layer(number, "attention.norm.weight"))
        parts = (normed @ self.layer(number, "attention.qkv.weight").T).split(self.c.hidden_size, dim=-1)
        q, k, v = (part.split(self.e, dim=-1) for part in parts)
        return [unit(x) for x in q], [unit(x) for x in k], v

    def mixed(self, number, name, x, u, norm):
        y = torch.cat([x, u])
        y = rms(y, self.layer(number, f"{name}.norm.weight")) if norm else y
        return self.layer(number, f"{name}.weight") @ y + self.layer(number, f"{name}.bias")[:, None]

    def near(self, number, head, query, i, keys, values, n_past):
        """Query i, at the right end of keys [z; x; u]."""
        tau = self.layer(number, "attention.temperature")[head].abs()
        table = self.layer(number, "position.table")[:, head]
        logits, found = [], []
        for j in range(len(keys)):
            distance = i + n_past - j
            if distance > 0 or (distance == 0 and self.c.attend_self):
                logits.append(tau * (query @ keys[j] + table[bucket(distance)]))
                found.append(values[j])
        return softmax(logits, found, self.e)

    def far(self, number, head, query, keys, values, n_empty):
        """Query over the queue: no positions; slots that are empty are absent, or have the logit 0 and say 0."""
        tau = self.layer(number, "attention.temperature")[head].abs()
        nothing = torch.zeros((), dtype=torch.float64)
        logits = [tau * (query @ key) for key in keys] + [nothing] * n_empty
        return softmax(logits, [*values, *[torch.zeros(self.e, dtype=torch.float64)] * n_empty], self.e)

    def gated(self, number, head, said_near, said_far, y):
        logit = self.layer(number, "gate.logit")[head, 0]
        if self.c.gate == "token":
            logit = logit + (self.layer(number, "gate.token.weight") @ y).split(self.e)[head]
        alpha = logit.sigmoid()
        return alpha * said_near + (1 - alpha) * said_far

    def attention(self, number, y, z, queue, is_first):
        c = self.c
        q, k, v = self.project(number, y)
        has_z = c.short > 0 and (not is_first or c.empty == "zero")
        past = self.project(number, z)[1:] if has_z else ([k[0][:0]] * self.h, [k[0][:0]] * self.h)
        is_long = number in c.long_layers and c.queue > 0
        old = self.project(number, torch.cat(queue))[1:] if is_long and queue else ([[]] * self.h, [[]] * self.h)
        n_empty = (c.queue - c.long_per_window * len(queue)) if c.empty == "zero" else 0
        rows = []
        for i in range(len(y)):
            heads = []
            for head in range(self.h):
                keys, values = torch.cat([past[0][head], k[head]]), torch.cat([past[1][head], v[head]])
                said = self.near(number, head, q[head][i], i, keys, values, len(past[0][head]))
                if is_long:
                    said = self.gated(number, head, said, self.far(number, head, q[head][i], old[0][head], old[1][head], n_empty), y[i])
                heads.append(said)
            rows.append(self.layer(number, "attention.out.weight") @ torch.cat(heads))
        return torch.stack(rows)

    def feed_forward(self, number, y):
        hidden = rms(y, self.layer(number, "feed_forward.norm.weight")) @ self.layer(number, "feed_forward.wide.weight").T
        hidden = (hidden + self.layer(number, "feed_forward.wide.bias")).clamp_min(0)
        return hidden @ self.layer(number, "feed_forward.narrow.weight").T + self.layer(number, "feed_forward.narrow.bias")

    def read(self, document):
        """Ids (whole windows) -> logits (T, V), z of every layer, queues of the long layers."""
        c = self.c
        z = [torch.zeros(c.short, c.hidden_size, dtype=torch.float64) for _ in range(c.num_hidden_layers)]
        queues = {layer: [] for layer in c.long_layers}
        logits = []
        for begin in range(0, len(document), c.window):
            x, u = self.w["embedding.weight"][document[begin : begin + c.window]], self.w["seeds"]
            for number in range(c.num_hidden_layers):
                y = torch.cat([x, u])
                y = y + self.attention(number, y, z[number], queues.get(number, []), begin == 0)
                y = y + self.feed_forward(number, y)
                x, u = y.split([c.window, len(u)])
                if number in queues and c.queue:
                    queues[number] = [*queues[number], self.mixed(number, "mix_long", x, u, norm=False)][-c.long_windows :]
                is_level = c.short == c.summary
                if c.short:
                    z[number] = self.mixed(number, "mix_short", x, u, norm=is_level) + (u if is_level and c.mixer_residual else 0)
                if len(u) and number < c.num_hidden_layers - 1:
                    mixer = "mix_summary" if c.branching else "mix_short"
                    u = self.mixed(number, mixer, x, u, norm=True) + (u if c.mixer_residual else 0)
            logits.append(rms(x, self.w["norm.weight"]) @ self.w["head.weight"].T)
        return torch.cat(logits), z, queues


VARIANTS = [
    "melodi", "melodi empty zero", "melodi token gate, two queues", "melodi summary 3", "melodi without short", "melodi without long",
    "melodi without branching", "melodi without residual", "melodi attends to itself", "melodi without memory",
]  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients_are_those_of_the_equations(name):
    tokens, found = ids(2, 5 * WINDOW, "equations"), []
    weight = torch.randn(2, 5 * WINDOW, SIZES["vocab_size"], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for is_plain in (True, False):
        model = fresh(name)
        if is_plain:
            logits, z, queues = zip(*(Plain(model).read(row) for row in tokens), strict=True)
            logits = torch.stack(logits)
        else:
            logits, state = model(tokens, start(model, 2))
        (logits * weight).sum().backward()
        found.append((logits, {key: value.grad for key, value in model.named_parameters() if value.grad is not None}))
    tolerance = 1e-6 if "zero" in name else 1e-9  # the number of empty slots goes through a logarithm in single precision
    close(found[0][0], found[1][0], tolerance)
    assert found[0][1].keys() <= found[1][1].keys()
    for key, gradient in found[1][1].items():
        close(gradient, found[0][1].get(key, torch.zeros_like(gradient)), 100 * tolerance)
    for row in range(2):
        close(state.short[row], torch.stack(z[row]), tolerance)
        for place, layer in enumerate(model.config.long_layers if model.config.queue else []):
            ring = dict(zip(state.long_window[row].tolist(), state.long[row, place], strict=True))
            kept = range(5 - model.config.long_windows, 5)
            close(torch.stack([ring[window] for window in kept]), torch.stack(queues[row][layer]), tolerance)


def test_distances_up_to_and_beyond_the_last_bucket():
    """W = 160: distances of both kinds of bucket, and of those that all share the last."""
    sizes = {"window": 160, "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 4, "long_layers": [0], "long_per_window": 1}
    model = fresh("melodi", **sizes)
    tokens = ids(1, 160, "buckets")
    buckets = _matrix(162, 2, False, None, torch.device("cpu"))[0][:, 1:]
    assert buckets[:, 0].tolist() == [bucket(distance) for distance in range(2, 164)]
    assert buckets.max() == 31
    with torch.no_grad():
        close(model(tokens, start(model, 1))[0][0], Plain(model).read(tokens[0])[0], 1e-9)


# --- T1 to T8 -------------------------------------------------------------------------------------------------------------


def test_t1_a_token_of_a_long_segment_changes_nothing_before_it():
    model, tokens = shared("melodi", torch.float32), ids(1, 512, "t1")
    base, _ = model(tokens)
    for place in (7, 256, 509):
        changed = tokens.clone()
        changed[0, place] = RARE
        assert (model(changed)[0] - base)[0, :place].abs().max() == 0.0


def test_t2_layer_by_layer_is_window_by_window():
    model, tokens = shared("melodi", torch.float32), ids(2, 16 * WINDOW, "t2")
    whole, after = model(tokens)
    logits, state = in_pieces(model, tokens, None, range(WINDOW, 16 * WINDOW, WINDOW))
    close(logits, whole, 1e-5)
    same_memory(state, after, 1e-5)
    for cut in range(1, 2 * WINDOW + 2):
        close(in_pieces(model, tokens, None, [cut])[0], whole, 1e-5)


def test_t3_rows_of_other_lengths_and_resets_are_as_they_are_alone():
    model, tokens = shared("melodi", torch.float32), ids(3, 30, "t3")
    lengths, reset = torch.tensor([30, 17, 5]), torch.zeros(3, 30, dtype=torch.bool)
    reset[0, 13] = reset[1, 4] = True
    logits, _ = model(tokens, None, lengths, reset)
    for row, first, last in ((0, 0, 13), (0, 13, 30), (1, 0, 4), (1, 4, 17), (2, 0, 5)):
        close(logits[row, first:last], model(tokens[row : row + 1, first:last])[0][0], 1e-5)


@pytest.mark.parametrize("gate", ["static", "token"])
def test_t4_an_empty_queue_says_zero_and_the_gate_still_weighs_the_window(gate):
    model = fresh("melodi", gate=gate)
    tokens, layer = ids(1, 1, "t4"), model.layers[1]
    reads = {}
    layer.gate.register_forward_hook(lambda _, given, out: reads.update(near=given[0], far=given[1], out=out))
    logits, _ = model(tokens, start(model, 1))
    assert logits.isfinite().all()
    assert reads["far"].abs().max() == 0.0
    first = reads["near"][:, :, 0]
    assert first.abs().max() == 0.0  # the document's first token sees no key at all
    model(ids(1, WINDOW, "t4"), start(model, 1))
    assert reads["far"].abs().max() == 0.0
    if gate == "static":
        close(reads["out"], layer.gate.logit.sigmoid() * reads["near"])


def far_gradient(**changes):
    """Gradient from window 7 to a token that only window 0 holds, layers of one so that depth adds no reach."""
    model, tokens = fresh("melodi", long_windows=8, spread=0.1, **changes), ids(1, 8 * WINDOW, "t5")
    tokens[0, 2] = RARE
    logits, _ = model(tokens, start(model, 1))
    torch.nn.functional.cross_entropy(logits[0, -WINDOW:], tokens[0, -WINDOW:]).backward()
    return model.embedding.weight.grad[RARE].abs().max().item()


def test_t5_the_last_window_of_a_segment_teaches_the_first_through_either_memory():
    assert far_gradient(long_per_window=0) > 1e-12
    assert far_gradient(short=0) > 1e-9
    assert far_gradient() > 1e-9
    assert far_gradient(short=0, long_per_window=0) == 0.0


def test_t5_nothing_crosses_a_detach():
    model, tokens = fresh("melodi"), ids(1, 8 * WINDOW, "t5")
    tokens[0, 2] = RARE
    _, state = model(tokens[:, : 4 * WINDOW], start(model, 1))
    assert state.short.requires_grad
    assert state.long.requires_grad
    model(tokens[:, 4 * WINDOW :], state.detach())[0].square().sum().backward()
    assert model.embedding.weight.grad[RARE].abs().max() == 0.0


def live_bytes():
    gc.collect()
    return sum(each.nbytes for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))


def test_t5_memory_is_flat_over_200_segments():
    model, tokens = fresh("melodi", torch.float32, num_hidden_layers=2), ids(1, WINDOW + 1, "flat")
    optimizer, state, found = torch.optim.SGD(model.parameters(), lr=1e-3), model.init_state(1), []
    for segment in range(200):
        loss, state = model.loss(tokens, tokens, state.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if segment in (20, 199):
            del loss
            found.append(live_bytes())
    assert abs(found[1] - found[0]) <= 0.01 * found[0]


@pytest.mark.parametrize("begin", range(3))
def test_t6_the_ring_is_the_last_windows_in_order_from_every_head_position(begin):
    """Read window by window for 3 Q windows; after each, the ring holds what a list that drops its oldest would."""
    model = shared("melodi")
    n_kept, tokens = 3, ids(2, (begin + 9) * WINDOW, "ring")
    _, whole = model(tokens, start(model, 2))
    _, state = model(tokens[:, : begin * WINDOW], start(model, 2))
    plain = [(window, state.long[:, 0, window]) for window in range(begin)]
    for window in range(begin, begin + 9):
        _, state = model(tokens[:, window * WINDOW : (window + 1) * WINDOW], state)
        plain = [*plain, (window, state.long[:, 0, window % n_kept])][-n_kept:]
        for number, entry in plain:
            assert state.long_window[:, number % n_kept].tolist() == [number] * 2
            close(state.long[:, 0, number % n_kept], entry, 0.0)
        assert (state.long_window >= 0).sum(1).tolist() == [len(plain)] * 2
    same_memory(state, whole)


@pytest.mark.parametrize("first", [1, 2, 3, 4, 7, 11])
def test_t6_a_call_that_pushes_out_more_than_the_ring_holds(first):
    model, tokens = shared("melodi"), ids(1, 12 * WINDOW, "push")
    whole, after = model(tokens, start(model, 1))
    logits, state = in_pieces(model, tokens, start(model, 1), [first * WINDOW])
    close(logits, whole)
    same_memory(state, after)
    assert state.long_window.tolist() == [[9, 10, 11]]


_CONTINUE = """
import sys, torch
from remanence.context import load_context_model, load_context_state
from remanence.state import load_state, save_state
from pathlib import Path
torch.set_num_threads(1)
folder = Path(sys.argv[1])
model = load_context_model(folder / "model")
with torch.no_grad():
    logits, _ = model(load_state(folder / "tokens")["tokens"], load_context_state(folder / "state", model))
save_state(folder / "logits", {"logits": logits})
"""


def test_t7_a_new_process_goes_on_with_equal_logits(tmp_path):
    model, tokens = fresh("melodi", torch.float32), ids(2, 6 * 10, "t7")
    state = None
    for segment in tokens[:, :50].split(10, dim=1):
        _, state = model(segment, state)
    save_context_state(tmp_path / "state", state, model)
    save_state(tmp_path / "tokens", {"tokens": tokens[:, 50:]})
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected, _ = model(tokens[:, 50:], state)
        assert torch.equal(model(tokens[:, 50:], load_context_state(tmp_path / "state", model))[0], expected)
    subprocess.run([sys.executable, "-c", _CONTINUE, str(tmp_path)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=400)
    assert torch.equal(load_state(tmp_path / "logits")["logits"], expected)


_PAPER = {"vocab_size": 257, "hidden_size": 1024, "num_hidden_layers": 13, "num_attention_heads": 8, "window": 512}


def million_floats(kind, stored="kv", **sizes):
    with torch.device("meta"):
        model = kind(kind.config_class(**_PAPER | sizes))
    state = model.init_state(1)
    assert state.tail.is_meta
    return state.nbytes(stored) / 4e6


def test_t8_the_papers_table_of_memory():
    memorizing = {"memory": 65_536, "memory_layer": 6}
    n_memorizing = million_floats(MemorizingTransformer, cache=0, **memorizing) + 13 * 512 * 2 * 1024 / 1e6  # caches in all 13 layers
    assert n_memorizing == pytest.approx(147.85, abs=0.005)
    assert million_floats(MemorizingTransformer, cache=512, **memorizing) == pytest.approx(146.80, abs=0.005)
    assert million_floats(TransformerXL, cache=512) == pytest.approx(13.63, abs=0.005)
    for short, long, floats, ratio in ((192, 32, 10.94, "13.5"), (128, 64, 18.48, "8.00"), (192, 96, 27.72, "5.33")):
        found = million_floats(MelodiLM, short=short, long_per_window=long, long_windows=128, long_layers=[6])
        assert found == pytest.approx(floats, abs=0.006)
        assert f"{n_memorizing / found:.{len(ratio.split('.')[1])}f}" == ratio
    stored = million_floats(MelodiLM, "stored", short=128, long_per_window=64, long_windows=128, long_layers=[6])
    assert stored == pytest.approx(10.09, abs=0.005)
    assert n_memorizing / stored == pytest.approx(14.6, abs=0.06)


def test_t8_block_recurrent_and_the_sizes_of_the_book_experiment():
    from remanence.context.block_recurrent import BlockRecurrentTransformer

    assert million_floats(BlockRecurrentTransformer, cache=512, states=512, recurrent_layer=6) == pytest.approx(14.16, abs=0.005)
    ours = MelodiLM(MelodiConfig(short=12, long_per_window=8, long_windows=64)).init_state(1).nbytes("kv") // 4
    theirs = MemorizingTransformer(MemorizingConfig(cache=64, memory=4096)).init_state(1).nbytes("kv") // 4
    longer = TransformerXL(TransformerXLConfig(cache=128)).init_state(1).nbytes("kv") // 4
    assert (ours, theirs, longer) == (137_216, 1_097_728, 131_072)
    assert 8 * ours == theirs
