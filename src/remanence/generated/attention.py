"""A transformer block in which only the first tokens may ask: the last block of a stack needs no other answers.

Axes: B tasks, T tokens, D width, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-6


class Block(nn.Module):
    """Self-attention and a ReLU layer, each with a residual connection.

    Args:
        width: D, a multiple of `heads`.
        inner: hidden units of the ReLU layer.
        norm_first: normalise what goes into a branch ("pre-LN"); otherwise what comes out of the sum ("post-LN").
    """

    def __init__(self, width: int, heads: int, inner: int, norm_first: bool = True) -> None:
        super().__init__()
        self.heads, self.norm_first = heads, norm_first
        self.attention_norm, self.inner_norm = nn.LayerNorm(width, LAYER_NORM_EPS), nn.LayerNorm(width, LAYER_NORM_EPS)
        self.queries, self.keys_values = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, inner), nn.Linear(inner, width)

    @torch.no_grad()
    def begin_alike(self) -> None:
        """Let keys begin as queries: a token attends to its likes."""
        self.keys_values.weight[: len(self.queries.weight)] = self.queries.weight

    def forward(self, x: Tensor, n_asking: int | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, n_asking, D).

        Args:
            n_asking: how many of the first tokens are answered; all by default.
            mask: (B, 1, 1, T) bool, True = may be attended to.
        """
        asking = x[:, :n_asking]
        if self.norm_first:
            known = self.attention_norm(x)
            asking = asking + self._attend(known[:, :n_asking], known, mask)
            return asking + self.down(self.up(self.inner_norm(asking)).relu())  # type: ignore[no-any-return]
        asking = self.attention_norm(asking + self._attend(asking, x, mask))
        return self.inner_norm(asking + self.down(self.up(asking).relu()))  # type: ignore[no-any-return]

    def _attend(self, asking: Tensor, known: Tensor, mask: Tensor | None) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.reshape(len(y), y.shape[1], self.heads, -1).transpose(1, 2)

        keys, values = self.keys_values(known).chunk(2, -1)
        mixed = F.scaled_dot_product_attention(split(self.queries(asking)), split(keys), split(values), attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def attend_to(present: Tensor | None, n_first: int, first: Tensor | None = None) -> Tensor | None:
    """The mask of a sequence of `n_first` tokens, followed by tokens that `present` (B, S) tells of.

    Args:
        first: (B, n_first) bool; by default the first tokens are always there.

    Returns:
        (B, 1, 1, n_first + S) bool, True = may be attended to; None where nothing is absent.
    """
    if present is None:
        return None
    return torch.cat([present.new_ones(len(present), n_first) if first is None else first, present], 1)[:, None, None]
