"""The rivals that the HyperTransformer is measured against: fixed embeddings with class means, and neighbours on pixels.

    rival = ProtoNet(TargetNet(8))
    loss = MetaTrainer(rival.parameters(), n_steps=1200).update(episode_loss(rival(episode), episode))

All have the small CNN of `TargetNet`, its norm and its order of blocks, and answer all tasks of an episode in one call. MAML and
fine-tuning stand in `hypertransformer_maml.py` and `hypertransformer_finetuning.py`.

Elastic weight consolidation is left out: fine-tuning with all earlier supports at hand is what it approximates.

Axes: B tasks or sequences; T tasks of a sequence; S support; Q queries; N images; C channels; D embedding width; n ways; P classes so far.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from remanence.errors import SettingError
from remanence.generated.continual import ContinualHyperTransformer
from remanence.generated.episode import Episode
from remanence.generated.heads import class_means, prototype_layer, squared_distances
from remanence.generated.target import TargetNet, flat, grouped

Tensors = dict[str, Tensor]


class TinyCNN(nn.Module):
    """The convolutions of `target` with weights of their own; what all rivals are made from, not one itself.

    Its parameters have the names that a HyperTransformer gives to what it does not write.

    Attributes:
        bn_stats: which statistics a "batch" norm gives the queries: "query", their own, or "support".
    """

    def __init__(self, target: TargetNet, bn_stats: Literal["query", "support"] = "query") -> None:
        super().__init__()
        self.target, self.bn_stats = target, bn_stats
        self.kernels = nn.ParameterDict({name: _kernel(target, name) for name in target.conv_names})
        self.gamma = nn.ParameterDict({name: nn.Parameter(torch.ones(target.channels)) for name in target.conv_names})
        self.beta = nn.ParameterDict({name: nn.Parameter(torch.zeros(target.channels)) for name in target.conv_names})

    def body(self, n_tasks: int) -> Tensors:
        """Tensors of the blocks: kernels (out, in, K, K), which all tasks share, gamma and beta as (B, C)."""
        found: Tensors = {}
        for name in self.target.conv_names:
            found[f"{name}.weight"] = self.kernels[name]
            found |= {f"{name}.{kind}": getattr(self, kind)[name].expand(n_tasks, -1) for kind in ("gamma", "beta")}
        return found

    def start(self, n_tasks: int, n_ways: int) -> Tensors:
        """What fine-tuning starts from: the blocks for each task and a last layer of zeros, all detached, each (B, ...)."""
        body = {name: value.detach() for name, value in self.body(n_tasks).items()}
        zeros = body["conv1.gamma"].new_zeros(n_tasks, n_ways, self.target.embedding_width + 1)
        return per_task(body, n_tasks) | {"logits.weight": zeros[..., :-1], "logits.bias": zeros[..., -1]}


class ProtoNet(TinyCNN):
    """One embedding for all tasks; queries go to the nearest class mean.

    Source: Snell, Swersky and Zemel 2017 (arXiv 1703.05175). ours: the temperature of the squared distance is learned, as in the
        HyperTransformer, so that at equal parameters both give the same logits.
    """

    def __init__(self, target: TargetNet, bn_stats: Literal["query", "support"] = "query") -> None:
        super().__init__(target, bn_stats)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(target.embedding_width)))

    def adapt(self, support_x: Tensor, support_y: Tensor, mask: Tensor | None = None, n_ways: int | None = None) -> Tensors:
        """Images (B, S, C, H, W) and slots (B, S) -> tensors of the CNN for each task, statistics of the support recorded.

        Kernels stay (out, in, K, K): one ordinary convolution over all B * N images is faster than B grouped ones.
        """
        n_ways = int(support_y.max()) + 1 if n_ways is None else n_ways
        embeddings, tensors = recorded(self.target, support_x, self.body(len(support_x)), mask)
        means, counts = class_means(embeddings, support_y, n_ways, mask)
        weight, bias = prototype_layer(means, self.log_scale.exp())
        return tensors | {"logits.weight": weight, "logits.bias": bias.masked_fill(counts == 0, -torch.inf)}

    def forward(self, episode: Episode) -> Tensor:
        """Logits (B, Q, n) of an episode's queries; -inf for slots without a labelled sample."""
        tensors = self.adapt(episode.support_x, episode.support_y, episode.support_mask, episode.n_max)
        return self.target.functional(episode.query_x, tensors, self.bn_stats)


class ConstPN(TinyCNN):
    """One embedding for a whole stream; class means are appended, and none ever grows stale: it forgets nothing.

    Trained with `continual_loss` of `unroll`, as the Continual HyperTransformer is.

    Args:
        target: with norm="group".
        scenario: who is asked: "class", all classes so far, or "task", those of the query's own task.

    Raises:
        SettingError: another norm or scenario.

    Source: ProtoNet over a stream; Snell, Swersky and Zemel 2017 (arXiv 1703.05175).
    """

    def __init__(self, target: TargetNet, scenario: Literal["class", "task"] = "class") -> None:
        if target.norm != "group":
            raise SettingError(f"ConstPN: norm='{target.norm}' lets the answers of a stream depend on each other; give 'group'.")
        if scenario not in ("class", "task"):
            raise SettingError(f"ConstPN: scenario='{scenario}' is unknown; give 'class' or 'task'.")
        super().__init__(target)
        self.scenario = scenario
        self.log_scale = nn.Parameter(torch.tensor(-math.log(target.embedding_width)))

    def unroll(self, sequence: Sequence[Episode]) -> list[Tensor]:
        """Answer, after every task, the queries of all tasks so far.

        Args:
            sequence: T episodes of the same B sequences, no class in two of them.

        Returns:
            For each t, logits (B, (t + 1) * Q, P), the queries of task 0 first; with scenario "task", -inf outside of a query's task.
        """
        # an embedding that never changes is computed once for the whole stream
        queries = self._embed([episode.query_x for episode in sequence])
        supports = self._embed([episode.support_x for episode in sequence])
        means = [
            class_means(z, episode.support_y, episode.n_max, episode.support_mask)[0]
            for z, episode in zip(supports, sequence, strict=True)
        ]
        owner = _repeated([mean.shape[1] for mean in means])
        asker = _repeated([z.shape[1] for z in queries])
        distances = self.log_scale.exp() * squared_distances(torch.cat(queries, 1), torch.cat(means, 1))
        if self.scenario == "task":
            distances = distances.masked_fill(asker[:, None] != owner, torch.inf)
        return [-distances[:, asker <= t][..., owner <= t] for t in range(len(sequence))]

    def _embed(self, images: list[Tensor]) -> list[Tensor]:
        z = self.target.embed(torch.cat(images, 1), self.body(len(images[0])))
        return list(z.split([len(x[0]) for x in images], 1))


def pixel_nearest_neighbour(episode: Episode) -> Tensor:
    """Logits (B, Q, n): minus the squared distance, on pixels, to the nearest labelled support sample of each class."""
    labelled = episode.support_y >= 0
    if episode.support_mask is not None:
        labelled = labelled & episode.support_mask
    support, queries = episode.support_x.flatten(2), episode.query_x.flatten(2)
    distances = torch.cdist(queries, support).square().masked_fill(~labelled[:, None], torch.inf)
    slots = episode.support_y.clamp(min=0)[:, None].expand_as(distances)
    nearest = distances.new_full((*distances.shape[:2], episode.n_max), torch.inf).scatter_reduce(2, slots, distances, "amin")
    return -nearest


@torch.no_grad()
def multi_ht_task_accuracy(model: ContinualHyperTransformer, sequence: Sequence[Episode]) -> Tensor:
    """Accuracy (B, T) of weights that are kept for every task apart, each asked about its own classes.

    Every task is the first one of a stream of its own, so it does not matter whether `model` carries. The memory grows with T.
    """
    found = []
    for episode in sequence:
        state = model.step(model.init_state(len(episode)), episode.support_x, episode.support_y, episode.support_mask)
        found.append(accuracy(model.predict(state, episode.query_x), episode))
    return torch.stack(found, 1)


# --- shared by the rivals --------------------------------------------------------------------------------------


def accuracy(logits: Tensor, episode: Episode, offset: int = 0) -> Tensor:
    """Share (B,) of queries answered right by logits (B, Q, P), where slot j of the episode is class `offset` + j."""
    assert episode.query_y is not None
    return (logits.argmax(-1) == episode.query_y + offset).float().mean(1)


def recorded(target: TargetNet, x: Tensor, tensors: Mapping[str, Tensor], mask: Tensor | None = None) -> tuple[Tensor, Tensors]:
    """Images (B, N, C, H, W) -> embeddings (B, N, D), and the tensors with the statistics of these images."""
    z, found = grouped(x), dict(tensors)
    for name in target.conv_names:
        z = target.convolve(z, tensors[f"{name}.weight"])
        statistics = None
        if target.norm == "batch":
            statistics = target.statistics(z, len(x), mask)
            found |= {f"{name}.mean": statistics[0], f"{name}.var": statistics[1]}
        z = target.normalise(z, tensors[f"{name}.gamma"], tensors[f"{name}.beta"], statistics)
    return flat(z, len(x)), found


def per_task(tensors: Mapping[str, Tensor], n_tasks: int) -> Tensors:
    """Kernels that tasks share as a view (B, out, in, K, K); gradients with respect to it are those of each task."""
    return {name: value.expand(n_tasks, *value.shape) if value.dim() == 4 else value for name, value in tensors.items()}


def _kernel(target: TargetNet, name: str) -> nn.Parameter:
    kernel = torch.empty(target.kernel_shape(name))
    nn.init.kaiming_normal_(kernel, nonlinearity="relu")
    return nn.Parameter(kernel)


def _repeated(counts: list[int]) -> Tensor:
    """Which task each row belongs to."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
