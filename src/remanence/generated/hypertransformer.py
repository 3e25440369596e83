"""HyperTransformer: one forward pass turns a support set into the weights of a small CNN.

    model = HyperTransformer(TargetNet(channels=8))
    weights = model.generate(support_x, support_y)        # (B, S, C, H, W), (B, S): B tasks in one pass
    cnn = weights.to_module()                             # a plain nn.Module for the first of them

Layers are written one after the other: the support's activations behind layer l, under the weights just written, are what
the transformer of layer l + 1 reads. There is no inner loop: training differentiates through the whole chain.

Source: Zhmoginov, Sandler and Vladymyrov 2022, "HyperTransformer: Model Generation for Supervised and Semi-Supervised
    Few-Shot Learning" (arXiv 2201.04182). ours: a trained base that every task's weights depart from, a fixed-width
    transformer, and class means as the head's starting point; `preset="paper"` takes all three back.

Axes: B tasks, S support samples, Q queries, C channels, H, W pixels, n ways, D embedding width, e code width.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from remanence.errors import DataError
from remanence.generated._hyper_checks import blanked, check_settings, has_lone_image, require_finite, require_fit, written_layers
from remanence.generated.episode import UNLABELED, Episode
from remanence.generated.features import FlatFeatures, LocalFeatures, SharedFeatures
from remanence.generated.heads import class_means, linear, prototype_layer, squared_distances
from remanence.generated.support import Support, random_codes
from remanence.generated.target import TargetNet, flat, grouped
from remanence.generated.task_weights import TaskWeights
from remanence.generated.weight_generator import Allocation, PaperWeightGenerator, WeightGenerator, assemble, cut, slice_layout

Head = Literal["proto+delta", "prototype", "generated"]
Slices = dict[str, Tensor]
"""What the generated layers hold: name -> (B, T, b)."""
_IMAGES_AT_ONCE = 1024
"""Support images of one pass without gradients: beyond it the activations leave the cache, and a loop would be faster."""


class HyperTransformer(nn.Module):
    """Writes the weights of `target` from labelled, and possibly unlabelled, images.

    Args:
        target: the CNN to write for.
        generate: which convolutions are written: "all", "logits" (none of them), or names such as ("conv3", "conv4"); the
            others are trained and shared by all tasks. The last linear layer always belongs to the task.
        head: the last linear layer is written by a transformer ("generated"), made of the class means ("prototype"), or is the
            sum of both ("proto+delta"), the written part being zero at the start.
        max_ways: most classes of a task; with random codes, `code_width` at most.
        allocation: what a slice is: an "output" channel, or a "spatial" position of the kernel.
        label_codes: "learned", or "random": orthonormal codes drawn for each task, the same for a class's samples and its slice of the
            last layer. Renaming the classes then renames the answers, exactly in distribution.
        width, depth, heads: of each layer's transformer.
        code_width: e.
        shared_features: width of the features that all layers read.
        bn_stats: which statistics normalise the queries in `forward`: "query" (their own: transductive) or "support".
        generate_norm: also write what is added to gamma and beta; needs allocation "output".
        preset: "paper" takes the reference's form: a residual stream that carries the weights, post-LN, three layers of two heads,
            a generated head fed by a convolution, no base. `width`, `depth`, `heads` and `head` are then the preset's.

    Raises:
        SettingError: a setting is unknown or contradicts another.

    Attributes:
        settings: all arguments but the target, as they were given.
        base: what the slices of each written layer start from, shared by all tasks.
    """

    def __init__(
        self, target: TargetNet, generate: Literal["all", "logits"] | Sequence[str] = "all", head: Head = "proto+delta", max_ways: int = 20,
        allocation: Allocation = "output", label_codes: Literal["learned", "random"] = "learned", width: int = 64, depth: int = 2,
        heads: int = 4, code_width: int = 32, shared_features: int = 32, bn_stats: Literal["query", "support"] = "query",
        generate_norm: bool = False, preset: Literal["paper"] | None = None,
    ) -> None:  # fmt: skip
        settings = {name: value for name, value in locals().items() if name not in ("self", "target", "__class__")}
        check_settings(settings)
        super().__init__()
        self.settings = settings
        self.target, self.head, self.max_ways = target, "generated" if preset == "paper" else head, max_ways
        self.allocation, self.label_codes, self.code_width = allocation, label_codes, code_width
        self.bn_stats, self.generate_norm, self.preset = bn_stats, generate_norm, preset
        self._width, self._depth, self._heads = width, depth, heads
        self.written = written_layers(target, generate)
        self.shared = SharedFeatures(target.in_channels, shared_features)
        self.local, self.generators = nn.ModuleDict(), nn.ModuleDict()
        self.base, self.kernels = nn.ParameterDict(), nn.ParameterDict()
        self.gamma, self.beta = nn.ParameterDict(), nn.ParameterDict()
        for name, side in zip(target.conv_names, target.sides, strict=False):
            self._make_block(name, side)
        self._make_head()

    # --- construction ------------------------------------------------------------------------------------------

    reads_previous = False
    written_share = 0.3
    """Length of what is written to a slice over that of its base, at the start; nearly all of it is the same for every task then."""
    _has_warned = False

    def _make_block(self, name: str, side: int) -> None:
        target, kernel = self.target, torch.empty(self.target.kernel_shape(name))
        nn.init.kaiming_normal_(kernel, nonlinearity="relu")
        self.gamma[name], self.beta[name] = nn.Parameter(torch.ones(target.channels)), nn.Parameter(torch.zeros(target.channels))
        if name not in self.written:
            self.kernels[name] = nn.Parameter(kernel)
            return
        self.local[name] = LocalFeatures(target.in_width(name), target.channels, side)
        n_slices, size = slice_layout(target.kernel_shape(name), self.allocation)
        start = cut(kernel, self.allocation)
        if self.generate_norm:
            size, start = size + 2, torch.cat([start, start.new_zeros(n_slices, 2)], 1)
        self.generators[name] = self._generator(n_slices, size, self.local[name].width, self.written_share / math.sqrt(size))  # type: ignore[arg-type]
        if self.preset is None:
            self.base[name] = nn.Parameter(start)

    def _make_head(self) -> None:
        target = self.target
        self.log_scale = nn.Parameter(torch.tensor(-math.log(target.embedding_width)))
        if self.head == "prototype":
            return
        channels, side = target.channels, target.sides[-1]
        self.local["logits"] = LocalFeatures(channels, channels, side, 1) if self.preset else FlatFeatures(channels, side)
        std = 1 / math.sqrt(target.embedding_width)
        n_slices = 0 if self.label_codes == "random" else self.max_ways  # with random codes a class's slice has the class's own
        self.generators["logits"] = self._generator(n_slices, target.embedding_width + 1, self.local["logits"].width, std, by_class=True)  # type: ignore[arg-type]

    def _generator(self, n_slices: int, size: int, local_width: int, std: float, by_class: bool = False) -> nn.Module:
        features = local_width + self.shared.width
        n_codes = 0 if self.label_codes == "random" else self.max_ways
        if self.preset == "paper":
            return PaperWeightGenerator(n_slices, size, features, n_codes, self.code_width, reads_previous=self.reads_previous)
        return WeightGenerator(
            n_slices, size, features, n_codes, self.code_width, self._width, self._depth, self._heads, std, self.reads_previous, by_class,
            is_silent=by_class and self.head == "proto+delta",
        )  # fmt: skip

    def cnn_parameters(self) -> list[nn.Parameter]:
        """The trained numbers that stand in the small CNN as they are: bases, shared kernels, gamma, beta and the scale.

        They want a rate about ten times that of the transformers; at one rate for all, either the base learns too slowly or the
        transformers do not settle (see `MetaTrainer`).
        """
        return [*self.base.values(), *self.kernels.values(), *self.gamma.values(), *self.beta.values(), self.log_scale]

    # --- the one pass ------------------------------------------------------------------------------------------

    def generate(
        self, support_x: Tensor, support_y: Tensor, mask: Tensor | None = None, class_names: Sequence[Sequence[str]] = (),
        allow_empty: bool = False,
    ) -> TaskWeights:  # fmt: skip
        """Write the weights of B tasks.

        Args:
            support_x: (B, S, C, H, W) float.
            support_y: (B, S) int64 slots 0..n-1 of the classes, or `UNLABELED`.
            mask: (B, S) bool, True = present; None when all are. An absent sample changes nothing.
            class_names: for each task, the names of its slots.
            allow_empty: a class may have no labelled sample; it is then never the answer.

        Returns:
            Weights with a leading task axis, with the statistics of the support set recorded.

        Raises:
            DataError: shapes, labels or pixels are not as said above, or the written weights are not finite.
        """
        require_fit(self.target, self.log_scale.dtype, support_x)
        episode = Episode(
            support_x, support_y, support_x[:, :0], support_mask=mask, class_names=tuple(map(tuple, class_names)), allow_empty=allow_empty
        )
        if not self._has_warned and has_lone_image(self.target, episode):
            self._has_warned = True
            warnings.warn(
                "a task has one support image and the last map is 1 x 1: its variance is 0, and its embedding says nothing of the image. "
                "Give more images, or use norm='group'.",
                stacklevel=2,
            )
        tensors = self._in_chunks(support_x, support_y, mask, episode.n_max)
        require_finite(tensors)
        return TaskWeights(self.target, tensors, episode.ways, episode.class_names)

    def forward(self, episode: Episode, draw: torch.Generator | None = None) -> Tensor:
        """Logits (B, Q, n) of an episode's queries; -inf for slots that a task does not use.

        Args:
            episode: B tasks.
            draw: with random label codes, what they are drawn from; by default they are the same at every call.

        Raises:
            DataError: images of another form or dtype than the model's, more ways than it knows, or a lone query on a 1 x 1 map
                under bn_stats="query".
        """
        return self.answers(episode, draw)[0]

    def answers(self, episode: Episode, draw: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, Q, n) of the head, as `forward`, and those of plain class means on the same embeddings.

        A generated head learns nothing for long while the embeddings below it say nothing. Adding the loss of the class means,
        and letting it fade, gets it off the ground (see `warm_up_share`).
        """
        require_fit(self.target, self.log_scale.dtype, episode.support_x)
        x = blanked(episode.support_x, episode.support_mask)
        support = self.read(x, episode.support_y, episode.support_mask, episode.n_max, self._codes(len(x), draw))
        tensors, embeddings, _ = self.trunk(x, support)
        tensors |= self.last_layer(embeddings, support)
        queries = self.target.embed(episode.query_x, tensors, self.bn_stats)
        means, counts = class_means(embeddings, support.labels, support.n_ways, support.mask)
        by_means = -self.log_scale.exp() * squared_distances(queries, means)
        return linear(queries, tensors), by_means.masked_fill((counts == 0)[:, None], -torch.inf)

    def _in_chunks(self, x: Tensor, y: Tensor, mask: Tensor | None, n_ways: int) -> dict[str, Tensor]:
        """All tasks at once while gradients are kept; else so many at a time as fit the cache."""
        n_tasks = len(x)
        size = n_tasks if torch.is_grad_enabled() else max(1, _IMAGES_AT_ONCE // x.shape[1])
        parts = []
        for first in range(0, n_tasks, size):
            rows = slice(first, first + size)
            parts.append(self._write(x[rows], y[rows], None if mask is None else mask[rows], n_ways))
        return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _write(self, x: Tensor, y: Tensor, mask: Tensor | None, n_ways: int) -> dict[str, Tensor]:
        x = blanked(x, mask)
        support = self.read(x, y, mask, n_ways, self._codes(len(x), None))
        tensors, embeddings, _ = self.trunk(x, support)
        for name in self.kernels:
            tensors[f"{name}.weight"] = self.kernels[name].expand(len(x), -1, -1, -1, -1)
        return tensors | self.last_layer(embeddings, support)

    def read(self, x: Tensor, y: Tensor, mask: Tensor | None, n_ways: int, codes: Tensor | None) -> Support:
        """What all layers read of a support set of images (B, S, C, H, W) and slots (B, S).

        Raises:
            DataError: more ways than the model was made for.
        """
        if n_ways > self.max_ways:
            raise DataError(
                f"a task of {n_ways} ways, but this HyperTransformer was trained for at most {self.max_ways}; train one with larger "
                f"max_ways. With label_codes='random' it may be larger than any task of the training, up to code_width."
            )
        shared = self.shared(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return Support(torch.where(y == UNLABELED, self.max_ways, y), shared, mask, codes, n_ways)

    def _codes(self, n_tasks: int, draw: torch.Generator | None) -> Tensor | None:
        """(B, max_ways, e) codes of the classes; None with learned ones."""
        if self.label_codes == "learned":
            return None
        return random_codes(n_tasks, self.max_ways, self.code_width, draw).to(self.log_scale)

    def trunk(self, x: Tensor, support: Support, previous: Slices | None = None) -> tuple[dict[str, Tensor], Tensor, Slices]:
        """Write the convolutions one after the other.

        Args:
            x: (B, S, C, H, W).
            support: what is read of these images.
            previous: what the layers held before; the base by default.

        Returns:
            Tensors of the convolutions; embeddings of the support (B, S, D); what the layers hold now.
        """
        n_tasks, z = len(x), grouped(x)
        tensors: dict[str, Tensor] = {}
        held: Slices = {}
        for name in self.target.conv_names:
            gamma, beta = (values[name].expand(n_tasks, -1) for values in (self.gamma, self.beta))
            if name in self.written:
                features = torch.cat([self._local(name, z, n_tasks), support.shared], -1)
                held[name] = self.update(name, features, support, None if previous is None else previous[name])
                kernel, gamma, beta = self._parse(name, held[name], gamma, beta)
            else:
                kernel = self.kernels[name]
            z = self.target.convolve(z, kernel)
            if self.target.norm == "batch":
                mean, variance = self.target.statistics(z, n_tasks, support.mask)
                tensors |= {f"{name}.mean": mean, f"{name}.var": variance}
                z = self.target.normalise(z, gamma, beta, (mean, variance))
            else:
                z = self.target.normalise(z, gamma, beta)
            tensors |= {f"{name}.weight": kernel, f"{name}.gamma": gamma, f"{name}.beta": beta}
        return tensors, flat(z, n_tasks), held

    def update(self, name: str, features: Tensor, support: Support, previous: Tensor | None) -> Tensor:
        """What a layer's slices hold after this support set: (B, T, b)."""
        written: Tensor = self.generators[name](features, support.labels, support.mask, support.codes)
        if name in self.base:
            written = self.base[name] + self.lengths(name) * written
        return written

    def lengths(self, name: str) -> Tensor:
        """(T, 1) lengths of a base's slices, in units of which a transformer writes.

        Behind a norm the base's length means nothing and grows with training; written in its units, what depends on the task keeps its
        share.
        """
        lengths: Tensor = self.base[name].norm(dim=-1, keepdim=True)
        return lengths

    def _local(self, name: str, z: Tensor, n_tasks: int) -> Tensor:
        """(S, B*C, H, W) -> (B, S, width): features that the layer's transformer reads of its activations."""
        per_sample = self.local[name](z.unflatten(1, (n_tasks, -1)).flatten(0, 1))  # type: ignore[no-untyped-call]
        return per_sample.unflatten(0, (len(z), n_tasks)).transpose(0, 1)  # type: ignore[no-any-return]

    def _parse(self, name: str, slices: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.generate_norm:
            gamma, beta = gamma + slices[..., -2], beta + slices[..., -1]
            slices = slices[..., :-2]
        return assemble(slices, self.target.kernel_shape(name), self.allocation), gamma, beta

    def last_layer(self, embeddings: Tensor, support: Support) -> dict[str, Tensor]:
        """The task's linear layer from the support's embeddings (B, S, D).

        Returns:
            "logits.weight" (B, n, D) and "logits.bias" (B, n), -inf where a slot has no labelled sample.
        """
        means, counts = class_means(embeddings, support.labels, support.n_ways, support.mask)
        empty = counts == 0
        parts = []
        if self.head != "generated":
            parts.append(prototype_layer(means, self.log_scale.exp()))
        if self.head != "prototype":
            used = ~empty if empty.any() else None  # a task must not depend on how many slots its neighbours in the batch fill
            held = self.write_head(embeddings, support, used=used)
            parts.append((held[..., :-1], held[..., -1]))
        weights, biases = zip(*parts, strict=True)
        return {"logits.weight": sum(weights), "logits.bias": sum(biases).masked_fill(empty, -torch.inf)}

    def write_head(
        self, embeddings: Tensor, support: Support, previous: Tensor | None = None, used: Tensor | None = None
    ) -> Tensor:
        """The written part of the last layer: (B, n, D + 1), weight rows with their bias.

        Args:
            used: (B, n) bool, which slots other slots may read; None when all may be.
        """
        side, generator = self.target.sides[-1], self.generators["logits"]
        codes: Tensor = generator.slice_codes if support.codes is None else support.codes  # type: ignore[assignment]
        maps = embeddings.reshape(-1, self.target.channels, side, side)
        local = self.local["logits"](maps).unflatten(0, embeddings.shape[:2])
        classes = codes.expand(len(embeddings), -1, -1)[:, : support.n_ways]
        features = torch.cat([local, support.shared], -1)
        written: Tensor = generator(features, support.labels, support.mask, support.codes, previous, classes, used)
        return written

    def episode_variation(self, episode: Episode) -> dict[str, float]:
        """How far the written kernels move between tasks: name -> standard deviation over tasks / norm of the mean.

        A value near zero says that the support set is ignored and the base does all the work. The paper reports 10 to 15 %.
        """
        with torch.no_grad():
            weights = self.generate(episode.support_x, episode.support_y, episode.support_mask, allow_empty=episode.allow_empty)
        found = {}
        for name in self.written:
            kernels = weights.tensors[f"{name}.weight"].flatten(1)
            deviation = (kernels - kernels.mean(0)).square().sum(1).mean().sqrt()
            found[name] = (deviation / kernels.mean(0).norm()).item()
        return found

