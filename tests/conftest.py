"""What several rooms share: a backbone of 16 units, tiny image tasks, one compute thread."""

import pytest
import torch
from transformers import ViTConfig, ViTModel

from remanence.generated import ContinualHyperTransformerLearner, HyperTransformerLearner
from remanence.generated.continual import ContinualHyperTransformer
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.target import TargetNet
from remanence.keys import keyed_rng
from remanence.testing import tiny_tasks
from remanence.tokens import MemoryTokens, VPTDeep
from remanence.weights import EWC, FineTuning, LinearProbe, LoRA, Prototypes, Replay


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_vit(seed=0, **settings):
    size = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 1}
    config = ViTConfig(**(size | {"num_attention_heads": 2, "intermediate_size": 32} | settings))
    with keyed_rng("tiny vit", seed):
        return ViTModel(config, add_pooling_layer=False).eval()


@pytest.fixture(scope="session")
def tiny_vit():
    return build_vit()


@pytest.fixture(scope="session")
def make_vit():
    return build_vit


@pytest.fixture(scope="session")
def tasks():
    """Three tasks of two classes, ten train and 32 test images each."""
    return tiny_tasks(3)


STEPS = {"epochs": 1, "batch_size": 4}
"""Three steps a task: enough for a first, a middle and a last one."""


@pytest.fixture(scope="session")
def tiny_writers():
    """A HyperTransformer and a continual one, both untrained."""
    size = {"max_ways": 4, "width": 16, "depth": 1, "heads": 2}
    with keyed_rng("tiny writers"):
        target = TargetNet(channels=4, image_size=8, n_layers=3, norm="group")
        return HyperTransformer(target, **size), ContinualHyperTransformer(target, **size)


@pytest.fixture(scope="session")
def makers(tiny_vit, tiny_writers):
    """Name -> (seed -> learner): all of them, in the variants that differ in what they store."""
    return {
        "fine-tuning": lambda seed=0: FineTuning(tiny_vit, forget_epochs=1, seed=seed, **STEPS),
        "fine-tuning local": lambda seed=0: FineTuning(tiny_vit, forget_epochs=1, local=True, seed=seed, **STEPS),
        "replay": lambda seed=0: Replay(tiny_vit, budget_bytes=6 * 272, replay_size=3, forget_epochs=1, seed=seed, **STEPS),
        "EWC": lambda seed=0: EWC(tiny_vit, decay=0.9, forget_epochs=1, seed=seed, **STEPS),
        "LoRA prototype": lambda seed=0: LoRA(tiny_vit, rank=2, seed=seed, **STEPS),
        "LoRA oracle": lambda seed=0: LoRA(tiny_vit, rank=2, router="oracle", seed=seed, **STEPS),
        "prototypes": lambda seed=0: Prototypes(tiny_vit, batch_size=4, seed=seed),
        "prototypes cosine": lambda seed=0: Prototypes(tiny_vit, metric="cosine", batch_size=4, seed=seed),
        "linear probe": lambda seed=0: LinearProbe(tiny_vit, lr=1e-2, forget_epochs=1, seed=seed, **STEPS),
        "memory tokens prototype": lambda seed=0: MemoryTokens(tiny_vit, tokens=2, seed=seed, **STEPS),
        "memory tokens energy": lambda seed=0: MemoryTokens(tiny_vit, mode="input", router="energy", seed=seed, **STEPS),
        "memory tokens confidence": lambda seed=0: MemoryTokens(tiny_vit, mode="class", router="confidence", seed=seed, **STEPS),
        "memory tokens oracle": lambda seed=0: MemoryTokens(tiny_vit, mode="head", cache_bytes=0, router="oracle", seed=seed, **STEPS),
        "VPT prototype": lambda seed=0: VPTDeep(tiny_vit, tokens=2, seed=seed, **STEPS),
        "VPT oracle": lambda seed=0: VPTDeep(tiny_vit, tokens=2, router="oracle", seed=seed, **STEPS),
        "HyperTransformer": lambda seed=0: HyperTransformerLearner(tiny_writers[0], seed=seed),
        "continual HyperTransformer": lambda seed=0: ContinualHyperTransformerLearner(
            tiny_writers[1], keep_supports=True, batch_size=4, seed=seed
        ),
    }
