"""What all the models are made of: normalised attention with a temperature, T5's position bias, the MLP.

Axes: B rows; T queries; P keys of the past; W tokens of a window; d width; h heads; e size of a head.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_N_BUCKETS, _MAX_DISTANCE = 32, 128
FLOOR = -1000.0
"""Logit of the sink: a query that sees no key reads zeros, and no row of a softmax is ever empty."""


class RMSNorm(nn.RMSNorm):
    """Root mean square norm with a scale and no bias (Zhang & Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d) in the weight's dtype; what a product made under autocast is shorter."""
        return super().forward(x.to(self.weight.dtype))


class FeedForward(nn.Module):
    """x + W2 ReLU(W1 RMS(x)), hidden layer of 4 d."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        hidden = F.relu(self.wide(self.norm(x)))
        added: Tensor = self.dropout(self.narrow(hidden))
        return x + added


class Attention(nn.Module):
    """Projections of one layer: queries and keys of unit length, queries times a learned temperature per head.

    Which keys a query meets is the layer's affair. Source: q-k normalisation with a temperature, Henry et al. 2020 (arXiv 2010.04245).

    Args:
        config: a `ContextConfig`.
        n_reads: reads that the output projection takes side by side (heads concatenated).
    """

    def __init__(self, config: Any, n_reads: int = 1) -> None:
        super().__init__()
        self.n_heads, self.head_size, width = config.num_attention_heads, config.head_size, config.hidden_size
        self.norm = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(n_reads * width, width, bias=False)
        self.temperature = nn.Parameter(torch.full((self.n_heads,), float(config.initial_temperature)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., T, d) -> queries, keys, values, each (..., h, T, e)."""
        query, key, value = self.heads(self.qkv(self.norm(x)), 3)
        return unit(query) * self.scale, unit(key), value

    @property
    def scale(self) -> Tensor:
        """What products and biases are multiplied by, (h, 1, 1)."""
        return self.temperature.abs()[:, None, None]

    def memory(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., T, d) -> keys, values, each (..., h, T, e), by the same weights."""
        width = x.shape[-1]
        key, value = self.heads(F.linear(self.norm(x), self.qkv.weight[width:]), 2)
        return unit(key), value

    def merge(self, read: Tensor) -> Tensor:
        """(..., h, T, e) -> (..., T, h e)."""
        return read.transpose(-3, -2).flatten(-2)

    def heads(self, x: Tensor, n: int) -> tuple[Tensor, ...]:
        """x (..., T, n d) -> n of (..., h, T, e)."""
        parts = x.view(*x.shape[:-1], n, self.n_heads, self.head_size).transpose(-4, -2)  # (..., h, n, T, e)
        return torch.unbind(parts, dim=-3)


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis; zero stays zero."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def with_sink(*parts: Tensor) -> Tensor:
    """Keys or values, parts (..., P, e) one after the other, behind a zero one (..., 1 + P, e), whose logit is the floor."""
    first = parts[0]
    return torch.cat([first.new_zeros(*first.shape[:-2], 1, first.shape[-1]), *parts], dim=-2)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention, (..., h, T, e) over (..., h, P, e); `bias` is added to the logits and holds the masks."""
    if query.is_cpu and torch.is_grad_enabled():  # the fused kernel's backward takes two to three times as long there
        logits = query @ key.mT
        return (logits if bias is None else logits + bias.to(logits.dtype)).softmax(-1) @ value
    # torch reads a mask of another dtype than the queries' wrongly, without a word
    mask = None if bias is None else bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)


class PositionBias(nn.Module):
    """T5's relative bias and the causal mask as one matrix: queries stand at the right end of the keys, after a sink.

    Source: Raffel et al. 2020 (arXiv 1910.10683): half of the 32 buckets for single distances, the others logarithmic up to 128.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attend_self = config.attend_self
        self.table = nn.Parameter(torch.zeros(_N_BUCKETS, config.num_attention_heads))

    def forward(self, n_queries: int, n_past: int, scale: Tensor, reach: int | None = None) -> Tensor:
        """The matrix (h, T, 1 + P + T) that is added to the logits: -inf where a key is not seen.

        Args:
            n_queries: T; the last T keys are their own.
            n_past: P keys before them.
            scale: (h, 1, 1), multiplies the bias as it multiplies the products.
            reach: how many previous tokens a token sees; None is all.
        """
        buckets, mask = _matrix(n_queries, n_past, self.attend_self, reach, self.table.device)
        return self.table.T[:, buckets] * scale + mask


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is cached must serve training too
def _matrix(n_queries: int, n_past: int, attend_self: bool, reach: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Buckets (T, 1 + P + T), and what is added to the logits: 0, -inf, or the floor at the sink."""
    distance = (torch.arange(n_queries)[:, None] + n_past) - torch.arange(n_past + n_queries)
    is_seen = distance >= 0 if attend_self else distance > 0
    if reach is not None:
        is_seen &= distance <= reach
    mask = F.pad(torch.where(is_seen, 0.0, -torch.inf), (1, 0), value=FLOOR)
    return F.pad(_bucket(distance.clamp_min(0)), (1, 0)).to(device), mask.to(device)


def _bucket(distance: Tensor) -> Tensor:
    n_exact = _N_BUCKETS // 2
    far = n_exact + (distance.clamp_min(1) / n_exact).log() / math.log(_MAX_DISTANCE / n_exact) * (_N_BUCKETS - n_exact)
    return torch.where(distance < n_exact, distance, far.long().clamp_max(_N_BUCKETS - 1))


def seen(is_seen: Tensor) -> Tensor:
    """A mask over keys (..., P) as a bias (..., 1, 1, 1 + P) for all heads and queries, with the sink."""
    return F.pad(torch.where(is_seen, 0.0, -torch.inf), (1, 0), value=FLOOR)[..., None, None, :]


def put(cache: tuple[Tensor, Tensor], key: Tensor, value: Tensor, place: Tensor) -> None:
    """Write keys and values (B, h, t, e) of tokens at `place` (B, t) into a window's cache, each (B, h, W, e)."""
    where = place[:, None, :, None].expand_as(key)
    for held, new in zip(cache, (key, value), strict=True):
        held.scatter_(2, where, new.to(held.dtype))  # under autocast they are shorter


def in_a_row(x: Tensor) -> Tensor:
    """Windows (B, K, h, W, e) one after the other, (B, h, K W, e)."""
    return x.transpose(1, 2).flatten(2, 3)
