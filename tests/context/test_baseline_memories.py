"""The four baselines against slow references: one token at a time, whole documents, no code shared with the package."""

import math

import pytest
import torch
from context_models import SIZES, WINDOW, close, fresh, ids, shared, start

DOUBLE = torch.float64


def rms(x, scale):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def bucket(distance):
    return distance if distance < 16 else min(31, 16 + int(math.log(distance / 16) / math.log(8) * 16))


def softmax(logits, values, width):
    """Weights of the values by their logits, beside a floor of -1000 that says nothing."""
    if not logits:
        return torch.zeros(width, dtype=DOUBLE)
    weights = torch.stack([*logits, torch.tensor(-1000.0, dtype=DOUBLE)]).softmax(0)
    return sum(weight * value for weight, value in zip(weights, values, strict=False))


class Plain:
    """A document in one piece: a layer at a time, and in it a query and a head at a time."""

    def __init__(self, model):
        self.c, self.w = model.config, dict(model.named_parameters())
        self.h, self.e = self.c.num_attention_heads, self.c.hidden_size // self.c.num_attention_heads

    def heads(self, x):
        return x.split(self.e, dim=-1)

    def project(self, at, x):
        parts = (rms(x, self.w[f"{at}.attention.norm.weight"]) @ self.w[f"{at}.attention.qkv.weight"].T).split(self.c.hidden_size, dim=-1)
        q, k, v = map(self.heads, parts)
        return list(map(unit, q)), list(map(unit, k)), v

    def local(self, at, q, k, v, place, head, cache):
        """A token and the C before it, or those of its own window where there is no cache."""
        tau, table = self.w[f"{at}.attention.temperature"][head].abs(), self.w[f"{at}.position.table"][:, head]
        first = place - cache if cache else place // self.c.window * self.c.window
        places = range(max(0, first), place + 1 if self.c.attend_self else place)
        logits = [tau * (q[head][place] @ k[head][j] + table[bucket(place - j)]) for j in places]
        return softmax(logits, [v[head][j] for j in places], self.e)

    def remembered(self, at, q, k, v, place, head):
        """One softmax over the last N tokens of complete windows and the own window so far; no positions."""
        tau, window = self.w[f"{at}.attention.temperature"][head].abs(), place // self.c.window
        first = max(0, window - self.c.memory // self.c.window) * self.c.window
        places = range(first, place + 1 if self.c.attend_self else place)
        return softmax([tau * (q[head][place] @ k[head][j]) for j in places], [v[head][j] for j in places], self.e)

    def out(self, at, x, read):
        x = x + read @ self.w[f"{at}.attention.out.weight"].T
        hidden = rms(x, self.w[f"{at}.feed_forward.norm.weight"]) @ self.w[f"{at}.feed_forward.wide.weight"].T
        hidden = (hidden + self.w[f"{at}.feed_forward.wide.bias"]).clamp_min(0)
        return x + hidden @ self.w[f"{at}.feed_forward.narrow.weight"].T + self.w[f"{at}.feed_forward.narrow.bias"]

    def layer(self, number, x):
        at, kind = f"layers.{number}", type(self.c).__name__
        q, k, v = self.project(at, x)
        is_memory = kind == "MemorizingConfig" and number == self.c.memory_layer
        rows = []
        for place in range(len(x)):
            said = (
                self.remembered(at, q, k, v, place, head) if is_memory else self.local(at, q, k, v, place, head, self.c.cache)
                for head in range(self.h)
            )
            rows.append(torch.cat(list(said)))
        read = torch.stack(rows)
        if kind == "BlockRecurrentConfig" and number == self.c.recurrent_layer:
            read = torch.cat([read, self.recurrent(at, x, k, v)], dim=-1)
        return self.out(at, x, read)

    def recurrent(self, at, x, k, v):
        """Tokens read the state as it was when their window began; a complete window rewrites it."""
        states, self.states = self.w[f"{at}.initial"], None
        found = []
        for begin in range(0, len(x), self.c.window):
            end = begin + self.c.window
            normed = rms(states + self.w[f"{at}.place"], self.w[f"{at}.state_norm.weight"])
            keys, values = map(self.heads, (normed @ self.w[f"{at}.state_memory.weight"].T).split(self.c.hidden_size, dim=-1))
            asked = rms(x[begin:end], self.w[f"{at}.attention.norm.weight"]) @ self.w[f"{at}.across.weight"].T
            found.append(self.whole(at, self.heads(asked), list(map(unit, keys)), values))
            if end <= len(x):
                to_self, to_tokens = (normed @ self.w[f"{at}.state_queries.weight"].T).split(self.c.hidden_size, dim=-1)
                one = self.whole(at, self.heads(to_self), list(map(unit, keys)), values)
                two = self.whole(at, self.heads(to_tokens), [head[begin:end] for head in k], [head[begin:end] for head in v])
                new = torch.cat([one, two], dim=-1) @ self.w[f"{at}.state_out.weight"].T
                kept = self.w[f"{at}.gate"].sigmoid()
                states = self.states = kept * states + (1 - kept) * new
        return torch.cat(found)

    def whole(self, at, queries, keys, values):
        """Attention without a mask, heads side by side."""
        tau = self.w[f"{at}.attention.temperature"].abs()
        reads = [(tau[head] * unit(queries[head]) @ keys[head].T).softmax(-1) @ values[head] for head in range(self.h)]
        return torch.cat(reads, dim=-1)

    def read(self, document):
        x = self.w["embedding.weight"][document]
        for number in range(self.c.num_hidden_layers):
            x = self.layer(number, x)
        return rms(x, self.w["norm.weight"]) @ self.w["head.weight"].T


BASELINES = [
    "windowed", "transformer-xl", "transformer-xl, two windows", "memorizing", "memorizing without cache", "block-recurrent",
    "block-recurrent without cache",
]  # fmt: skip


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("length", [5 * WINDOW, 5 * WINDOW + 3])
def test_values_and_gradients_are_those_of_the_references(name, length):
    tokens, found = ids(2, length, "plain"), []
    weight = torch.randn(2, length, SIZES["vocab_size"], generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    for is_plain in (True, False):
        model = fresh(name)
        plain = Plain(model)
        logits = torch.stack([plain.read(row) for row in tokens]) if is_plain else model(tokens, start(model, 2))[0]
        (logits * weight).sum().backward()
        found.append((logits, {key: value.grad for key, value in model.named_parameters() if value.grad is not None}))
    close(found[0][0], found[1][0], 1e-9)
    assert found[0][1].keys() == found[1][1].keys()
    for key, gradient in found[1][1].items():
        close(gradient, found[0][1][key], 1e-7)


def changed_logits(name, place, length, **sizes):
    """Which logits of a document of `length` a change of the token at `place` reaches."""
    model, tokens = fresh(name, **sizes).requires_grad_(False), ids(1, length, "reach")
    other = tokens.clone()
    other[0, place] = 9
    difference = (model(tokens, start(model, 1))[0] - model(other, start(model, 1))[0]).abs().amax(-1)[0]
    return [where for where in range(length) if difference[where] > 1e-12]


@pytest.mark.parametrize("cache", [WINDOW, 2 * WINDOW, 4 * WINDOW])
@pytest.mark.parametrize("place", [0, 1, 3, 6])
def test_transformer_xl_reaches_exactly_its_cache(cache, place):
    reached = changed_logits("transformer-xl", place, 30, num_hidden_layers=1, cache=cache)
    assert reached == [where for where in range(30) if place <= where <= place + cache]


def test_transformer_xl_reaches_a_cache_further_in_every_layer():
    assert max(changed_logits("transformer-xl", 2, 40, num_hidden_layers=3)) == 2 + 3 * WINDOW


def test_without_a_cache_a_window_sees_itself():
    """A cache of 0 crashed peers (fastai PR 1569)."""
    assert changed_logits("windowed", 5, 20) == [5, 6, 7]


def test_memorizing_forgets_first_what_came_first():
    """Windows 0 to 2 are seen from window 3, and window 0 no longer from window 4 on: never is all of it dropped at once."""
    sizes = {"num_hidden_layers": 1, "memory_layer": 0, "cache": 0, "memory": 3 * WINDOW}
    reached = changed_logits("memorizing", 1, 8 * WINDOW, **sizes)
    assert reached == list(range(1, 4 * WINDOW))
    assert changed_logits("memorizing", 2 * WINDOW, 8 * WINDOW, **sizes) == list(range(2 * WINDOW, 6 * WINDOW))


def test_memorizing_keeps_the_keys_of_their_time():
    """Between calls, and so between optimizer steps, what was stored stays as it was: the staleness that MELODI's queue has not."""
    model = fresh("memorizing")
    _, state = model(ids(1, 2 * WINDOW, "stale"), start(model, 1))
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.5)
    _, after = model(ids(1, WINDOW, "stale on"), state.detach())
    assert torch.equal(after.memory_keys[:, :2], state.memory_keys[:, :2])
    assert after.memory_window.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("cuts", [(), (WINDOW,), (3, 7, 12), (8, 16)])
def test_transformer_xl_caches_are_the_newest_keys(cuts):
    """Swapped lengths of query and memory once kept the wrong ones (kimiyoung/transformer-xl issue 59)."""
    for name, cache in (("transformer-xl", WINDOW), ("transformer-xl, two windows", 2 * WINDOW)):
        model, tokens = shared(name), ids(2, 18, "newest")
        state = start(model, 2)
        for piece in torch.tensor_split(tokens, list(cuts), dim=1):
            _, state = model(piece, state)
        _, keys, values = model.layers[0].attention(model.embedding(tokens[:, :16]))
        close(state.keys[:, 0], keys[:, :, -cache:])
        close(state.values[:, 0], values[:, :, -cache:])


def test_the_recurrent_state_is_the_references():
    model, tokens = shared("block-recurrent"), ids(1, 4 * WINDOW + 2, "states")
    plain = Plain(model)
    plain.read(tokens[0])
    _, state = model(tokens, start(model, 1))
    close(state.states[0], plain.states)
    assert model(tokens[:, :3], start(model, 1))[1].states.abs().max() == 0.0  # nothing is written before a window is complete


def test_the_recurrent_state_carries_what_no_cache_reaches():
    sizes = {"cache": 0, "recurrent_layer": 0, "num_hidden_layers": 1}
    assert max(changed_logits("block-recurrent", 2, 40, **sizes)) == 39
