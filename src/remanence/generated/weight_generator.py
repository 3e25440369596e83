"""One layer's weights, written by a transformer that reads the support set.

A layer's weights are cut into T slices. Each slice is a token that asks; each support sample is a token that answers: its label's
code, features of its activations, features of its image. No position is encoded, so that the order of the samples does not matter.

Axes: B tasks, S support samples, T slices, b numbers in a slice, e code width, D token width.

Source: Zhmoginov, Sandler and Vladymyrov 2022 (arXiv 2201.04182); the slices' former contents as input, Vladymyrov, Zhmoginov and
    Sandler 2023 (arXiv 2301.04584).
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from remanence.errors import SettingError
from remanence.generated.attention import Block, attend_to

Allocation = Literal["output", "spatial"]


class WeightGenerator(nn.Module):
    """Support tokens -> what to write into the slices of one layer.

    Args:
        n_slices, slice_size: T and b.
        feature_width: of a sample's features.
        n_classes: how many label codes are learned; one more stands for "no label".
        code_width: e.
        width, depth, heads: of the transformer; its ReLU layers have 2 x width units.
        std: of what is written at the start, per number.
        is_silent: write nothing at the start.
        reads_previous: the tokens also see what the slices held before.
        by_class: slice j stands for class j, and begins with its code.

    Source: as the module. ours: pre-LN blocks of a fixed width between linear read-in and read-out, and a start in which tokens attend to
        their likes: keys begin as queries, codes are read alike in slices and samples, and "no label" says nothing. Without it a
        generated head needs hundreds of steps to find out which samples are its class's. The paper's form is `PaperWeightGenerator`.
    """

    def __init__(
        self, n_slices: int, slice_size: int, feature_width: int, n_classes: int, code_width: int = 32, width: int = 64, depth: int = 2,
        heads: int = 4, std: float = 0.1, reads_previous: bool = False, by_class: bool = False, is_silent: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads:
            raise SettingError(f"WeightGenerator: heads={heads} must divide width={width}.")
        self.label_codes = nn.Parameter(torch.randn(n_classes + 1, code_width))
        self.slice_codes = nn.Parameter(torch.randn(n_slices, code_width))
        self.read_sample, self.read_slice = nn.Linear(code_width + feature_width, width), nn.Linear(code_width, width)
        self.read_previous = nn.Linear(slice_size, width, bias=False) if reads_previous else None
        self.blocks = nn.ModuleList(Block(width, heads, 2 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.write = nn.Linear(width, slice_size)
        # the scale stands outside of the weights, so that a step of Adam moves what is written by a share of it, not by its multiple
        self.scale = std / math.sqrt(width)
        nn.init.normal_(self.write.weight, std=0.0 if is_silent else 1.0)
        nn.init.zeros_(self.write.bias)
        with torch.no_grad():
            self.label_codes[-1] = 0
            self.read_slice.weight.copy_(self.read_sample.weight[:, :code_width])
            for block in self.blocks:
                block.begin_alike()  # type: ignore[operator]
            if by_class:
                self.slice_codes.copy_(self.label_codes[:n_slices])

    def forward(
        self, features: Tensor, labels: Tensor, present: Tensor | None = None, codes: Tensor | None = None, previous: Tensor | None = None,
        classes: Tensor | None = None, used: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T, b), to be added to what the slices hold.

        Args:
            features: (B, S, feature_width).
            labels: (B, S) int64 rows of the code table, the last one for "no label".
            present: (B, S) bool; None when all are.
            codes: (B, n, e) codes of these tasks' classes, in place of the learned ones; row n is then "no label", which stays learned.
            previous: (B, T, b), with `reads_previous`.
            classes: (B, T, e) codes of the slices, where a slice stands for a class; the learned table by default.
            used: (B, T) bool, False for a slice that no other token may read; None when all are.
        """
        samples = self.read_sample(torch.cat([_coded(self.label_codes, labels, codes), features], -1))
        slices = self.read_slice(self.slice_codes.expand(len(labels), -1, -1) if classes is None else classes)
        if self.read_previous is not None and previous is not None:
            slices = slices + self.read_previous(previous)
        return self.scale * self.write(self.norm(_run(self.blocks, slices, samples, present, used)))  # type: ignore[no-any-return]


class PaperWeightGenerator(nn.Module):
    """The form of the paper: tokens are as wide as code and contents need, and the residual stream itself carries the weights.

    Post-LN blocks, whose last operation is a normalisation: tokens leave with unit variance whatever the fan-in, and with the
    reference's start (Glorot, no biases) their weights have nearly as much.
    Arguments as `WeightGenerator`; the width is max(e + b, e + feature_width), rounded up to a multiple of the heads.

    Source: as the module, its public TensorFlow code.
    """

    def __init__(
        self, n_slices: int, slice_size: int, feature_width: int, n_classes: int, code_width: int = 32, depth: int = 3, heads: int = 2,
        reads_previous: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        needed = code_width + max(slice_size, feature_width)
        self.width, self.slice_size, self.reads_previous = needed + -needed % heads, slice_size, reads_previous
        self.label_codes = nn.Parameter(torch.randn(n_classes + 1, code_width))
        self.slice_codes = nn.Parameter(torch.randn(n_slices, code_width))
        self.blocks = nn.ModuleList(Block(self.width, heads, self.width, norm_first=False) for _ in range(depth))
        for linear in (part for part in self.modules() if isinstance(part, nn.Linear)):
            nn.init.zeros_(linear.bias)
            for matrix in torch.split(linear.weight.detach(), self.width):  # keys and values share a layer
                nn.init.xavier_uniform_(matrix)

    def forward(
        self, features: Tensor, labels: Tensor, present: Tensor | None = None, codes: Tensor | None = None, previous: Tensor | None = None,
        classes: Tensor | None = None, used: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `WeightGenerator.forward`."""
        samples = self._pad(torch.cat([_coded(self.label_codes, labels, codes), features], -1))
        slices = self.slice_codes.expand(len(labels), -1, -1) if classes is None else classes
        if self.reads_previous and previous is not None:
            slices = torch.cat([slices, previous], -1)
        e = self.label_codes.shape[1]
        return _run(self.blocks, self._pad(slices), samples, present, used)[..., e : e + self.slice_size]

    def _pad(self, tokens: Tensor) -> Tensor:
        return nn.functional.pad(tokens, (0, self.width - tokens.shape[-1]))


def _coded(learned: Tensor, labels: Tensor, codes: Tensor | None) -> Tensor:
    """(B, S, e) codes of the labels: rows of the learned table, or of these tasks' codes and behind them the learned "no label"."""
    table = learned.expand(len(labels), -1, -1)
    if codes is not None:
        table = torch.cat([codes, table[:, -1:]], 1)
    return table.gather(1, labels[..., None].expand(-1, -1, table.shape[2]))


def _run(blocks: nn.ModuleList, slices: Tensor, samples: Tensor, present: Tensor | None, used: Tensor | None) -> Tensor:
    """The slices' tokens after all blocks; the last block answers them alone."""
    n_slices = slices.shape[1]
    if used is not None and present is None:
        present = used.new_ones(samples.shape[:2])
    tokens, mask = torch.cat([slices, samples], 1), attend_to(present, n_slices, used)
    for block in list(blocks)[:-1]:
        tokens = block(tokens, mask=mask)
    return blocks[-1](tokens, n_slices, mask)  # type: ignore[no-any-return]


def slice_layout(kernel: tuple[int, int, int, int], allocation: Allocation) -> tuple[int, int]:
    """(T, b) of a kernel (out, in, K, K): a slice is an output channel ("output") or a kernel position ("spatial")."""
    n_out, n_in, side, _ = kernel
    return (n_out, n_in * side**2) if allocation == "output" else (side**2, n_in * n_out)


def assemble(slices: Tensor, kernel: tuple[int, int, int, int], allocation: Allocation) -> Tensor:
    """Slices (B, T, b) -> kernels (B, out, in, K, K)."""
    n_out, n_in, side, _ = kernel
    if allocation == "output":
        return slices.reshape(len(slices), n_out, n_in, side, side)
    return slices.reshape(len(slices), side, side, n_out, n_in).permute(0, 3, 4, 1, 2)


def cut(kernel: Tensor, allocation: Allocation) -> Tensor:
    """A kernel (out, in, K, K) -> its slices (T, b); undoes `assemble`."""
    if allocation == "output":
        return kernel.flatten(1)
    return kernel.permute(2, 3, 0, 1).flatten(2).flatten(0, 1)
