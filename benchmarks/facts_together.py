"""G9: many injection runs in one, by torch.func, against the same runs one after the other.

    python benchmarks/facts_together.py      # eight runs of ten steps, about a minute on one core

The runs differ in one row of each batch. Their weights are stacked, the forward pass is mapped over the stack, and one AdamW moves all
of them, since it treats every entry alone. Gate: weights agree to 1e-5. The time is reported: on two cores the matrices of one run
already fill the arithmetic units, so nothing is gained, and facts.py runs seeds in processes instead.
"""

import copy
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from remanence.environment import environment
from remanence.grid import one_thread
from remanence.keys import generator, keyed_rng
from remanence.state import write_whole

RESULT = Path(__file__).parent / "results" / "facts_together.json"
RATE, TOLERANCE = 3e-4, 1e-5


def small_model(vocabulary: int = 3000, width: int = 96, depth: int = 2) -> nn.Module:
    """A GPT-2 as in facts.py; attention is written out, since the fused kernel has no rule for a mapped pass."""
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=depth, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    with keyed_rng("together"):
        return GPT2LMHeadModel(config).train()


def batches(n_runs: int, n_steps: int, vocabulary: int, size: int = 16, length: int = 41) -> Tensor:
    """(steps, runs, B, T + 1) ids; the first row is each run's own."""
    draw = generator("together", "batches")
    shared = torch.randint(vocabulary, (n_steps, 1, size, length), generator=draw).repeat(1, n_runs, 1, 1)
    shared[:, :, 0] = torch.randint(vocabulary, (n_runs, length), generator=draw)
    return shared


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def optimizer_of(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01, fused=True)


def one_by_one(model: nn.Module, data: Tensor) -> list[dict[str, Tensor]]:
    """Train a copy for each run; parameters by name."""
    found = []
    for run in range(data.shape[1]):
        twin: Any = copy.deepcopy(model)
        optimizer = optimizer_of(list(twin.parameters()))
        for ids in data[:, run]:
            loss_of(twin(ids[:, :-1], use_cache=False).logits, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append({name: value.detach() for name, value in twin.named_parameters()})
    return found


def together(model: nn.Module, data: Tensor) -> list[dict[str, Tensor]]:
    """Train all runs at once; parameters by name."""
    n_runs = data.shape[1]
    stacked, _ = stack_module_state([model] * n_runs)
    weights = {name: stacked[name].detach().requires_grad_() for name, _ in model.named_parameters()}
    optimizer = optimizer_of(list(weights.values()))

    def loss(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        return loss_of(functional_call(model, parameters, (ids[:, :-1],), {"use_cache": False}).logits, ids)

    for ids in data:
        vmap(loss)(weights, ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [{name: value.detach()[run] for name, value in weights.items()} for run in range(n_runs)]


def compare(model: nn.Module, data: Tensor) -> dict[str, float]:
    """Largest difference of any weight, and the seconds of both ways."""
    marks = [time.perf_counter()]
    found = []
    for way in (one_by_one, together):
        found.append(way(model, data))
        marks.append(time.perf_counter())
    difference = max(float((first[name] - second[name]).abs().max()) for first, second in zip(*found, strict=True) for name in first)
    return {"difference": difference, "seconds_one_by_one": marks[1] - marks[0], "seconds_together": marks[2] - marks[1]}


def main() -> None:
    with one_thread():
        found = compare(small_model(), batches(8, 10, 3000))
    passed = found["difference"] <= TOLERANCE
    ratio = found["seconds_together"] / found["seconds_one_by_one"]
    print(f"weights differ by {found['difference']:.1e} at most (limit {TOLERANCE:g}); together takes {ratio:.2f} of the time one by one")
    result = {"command": "python benchmarks/facts_together.py", "seed": "together", "passed": passed, **found, "environment": environment()}
    write_whole(RESULT, json.dumps(result, indent=1) + "\n")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
