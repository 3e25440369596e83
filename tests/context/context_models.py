"""Tiny models of every kind and variant, for the suites that hold them all to the same rules.

Every number of a model is drawn at random, biases, gates and position tables included, so that nothing that is read is zero by chance.

Axes: B rows; T tokens; W tokens of a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch

from remanence.context.block_recurrent import BlockRecurrentTransformer
from remanence.context.configuration import MelodiConfig
from remanence.context.melodi import MelodiLM
from remanence.context.memorizing import MemorizingTransformer
from remanence.context.transformer_xl import TransformerXL
from remanence.keys import generator, keyed_rng

WINDOW, VOCAB = 4, 11
BOS, RARE = 10, 9
"""BOS begins documents; RARE stands only where a test puts it."""
SIZES = {"vocab_size": VOCAB, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3, "window": WINDOW}
_MELODI = {"short": 2, "long_per_window": 2, "long_windows": 3, "long_layers": [1]}


def _melodi(**changes):
    return MelodiLM(MelodiConfig(**SIZES | _MELODI | changes))


def _baseline(kind, **changes):
    return kind(kind.config_class(**SIZES | changes))


ZOO = {
    "melodi": _melodi,
    "melodi empty zero": partial(_melodi, empty="zero"),
    "melodi token gate, two queues": partial(_melodi, gate="token", long_layers=[0, 2]),
    "melodi summary 3": partial(_melodi, summary=3),
    "melodi without short": partial(_melodi, short=0),
    "melodi without long": partial(_melodi, long_per_window=0),
    "melodi without branching": partial(_melodi, branching=False),
    "melodi without residual": partial(_melodi, mixer_residual=False),
    "melodi attends to itself": partial(_melodi, attend_self=True),
    "melodi without memory": partial(_melodi, short=0, long_per_window=0),
    "windowed": partial(_baseline, TransformerXL, cache=0),
    "transformer-xl": partial(_baseline, TransformerXL, cache=WINDOW),
    "transformer-xl, two windows": partial(_baseline, TransformerXL, cache=2 * WINDOW, attend_self=True),
    "memorizing": partial(_baseline, MemorizingTransformer, cache=WINDOW, memory=3 * WINDOW, memory_layer=1),
    "memorizing without cache": partial(_baseline, MemorizingTransformer, cache=0, memory=2 * WINDOW, memory_layer=0),
    "block-recurrent": partial(_baseline, BlockRecurrentTransformer, cache=WINDOW, states=3, recurrent_layer=1),
    "block-recurrent without cache": partial(_baseline, BlockRecurrentTransformer, cache=0, states=5, recurrent_layer=2),
}
CARRY_NOTHING = ("melodi without memory", "windowed")
KINDS = ("melodi", "windowed", "transformer-xl", "memorizing", "block-recurrent")
"""One of each class, the windowed transformer besides."""
every = pytest.mark.parametrize("name", ZOO)
every_kind = pytest.mark.parametrize("name", KINDS)


def randomised(model, dtype=torch.float64, spread=0.3):
    """The same model with every parameter moved at random, one temperature below zero, ready to be evaluated."""
    source = generator("randomised")
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_(spread * torch.randn(value.shape, generator=source))
            if name.endswith("temperature"):
                value[0].neg_()
    return model.to(dtype).eval()


def fresh(name, dtype=torch.float64, spread=None, **changes):
    """A model of its own, the same each time; in single precision near its initialisation, where rounding is not amplified."""
    with keyed_rng("context zoo", name):
        return randomised(ZOO[name](**changes), dtype, spread or (0.3 if dtype == torch.float64 else 0.05))


@cache
def shared(name, dtype=torch.float64):
    """The same model for every test that leaves it as it is."""
    return fresh(name, dtype).requires_grad_(False)


def start(model, batch):
    """An empty state that is as precise as the model."""
    return model.init_state(batch, dtype=model.dtype)


def ids(batch, length, *key, high=RARE):
    """Random ids (B, T) below `high`."""
    return torch.randint(high, (batch, length), generator=generator("context ids", *key))


def in_pieces(read, tokens, state, cuts):
    """tokens (B, T) read by `read` in calls that end at `cuts` and at T -> logits, state."""
    found = []
    for piece in torch.tensor_split(tokens, list(cuts), dim=1):
        logits, state = read(piece, state)
        found.append(logits)
    return torch.cat(found, dim=1), state


def close(one, two, tolerance=1e-10):
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def same_memory(one, two, tolerance=1e-10):
    """Two states carry the same, whatever stands in the tail beyond its end."""
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    for name in first.keys() - {"tail", "document"}:
        close(first[name], second[name], tolerance)
    kept = torch.arange(one.tail.shape[1]) < one.n_tail[:, None]
    assert torch.equal(one.tail.masked_fill(~kept, 0), two.tail.masked_fill(~kept, 0))


@dataclass(frozen=True)
class Call:
    """One call of a plan: tokens (B, T), lengths (B,) or None, reset (B, T) or None."""

    tokens: torch.Tensor
    lengths: torch.Tensor | None
    reset: torch.Tensor | None


def documents_of(calls: Sequence[Call]):
    """For each row its documents, as lists of (call, place, id), the plain way; a reset where no token is begins nothing."""
    rows = []
    for row in range(len(calls[0].tokens)):
        documents = [[]]
        for number, call in enumerate(calls):
            length = call.tokens.shape[1] if call.lengths is None else int(call.lengths[row])
            for place in range(length):
                if call.reset is not None and bool(call.reset[row, place]):
                    documents.append([])
                documents[-1].append((number, place, int(call.tokens[row, place])))
        rows.append(documents)
    return rows
