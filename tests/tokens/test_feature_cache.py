"""Training from kept keys and values equals training through the backbone."""

import pytest
import torch
from vision_zoo import backbone, images, memory_of, train

from remanence.errors import DataError, SettingError, StateMismatchError
from remanence.tokens import FeatureCache, MemoryViT


@pytest.mark.parametrize("kind", ["ViTModel", "Dinov2ForImageClassification"])
def test_training_from_the_cache_equals_training_without(kind):
    pixels, labels = images(12), torch.arange(12) % 2
    through, cached = memory_of(backbone(kind), "a"), memory_of(backbone(kind), "a")
    cache = FeatureCache(cached, pixels, batch_size=5)
    assert len(cache) == 12
    rows = torch.tensor([3, 1, 8, 8])
    train(through, "a", pixels[rows], labels[rows], steps=5)
    train(cached, "a", None, labels[rows], steps=5, read=lambda: cached.read(cache[rows], ["a"])["a"])
    for name, value in through.task("a").state_dict().items():
        assert (cached.task("a").state_dict()[name] - value).abs().max() < 1e-5, name
    assert (cached(pixels).logits["a"] - through(pixels).logits["a"]).abs().max() < 1e-5


def test_a_cache_says_its_size_before_it_is_made():
    memory = MemoryViT(backbone())
    per_image = (2 * 3 * 17 + 1) * 16 * 4
    assert FeatureCache.bytes_per_image(memory) == per_image
    cache = FeatureCache(memory, images(3))
    held = sum(table.numel() * table.element_size() for table in (*cache.keys, *cache.values, cache.last))
    assert cache.n_bytes == held == 3 * per_image
    with pytest.raises(SettingError, match=r"cache of 1000 images needs 6\.59e\+06 bytes, max_bytes is 1e\+06"):
        FeatureCache(memory, torch.zeros(1, 1, 8, 8).expand(1000, 1, 8, 8), max_bytes=1e6)


def test_half_the_bytes_are_near_enough():
    memory = memory_of(backbone(), "a")
    cache = FeatureCache(memory, images(6), dtype=torch.float16)
    assert cache.n_bytes * 2 == FeatureCache(memory, images(6)).n_bytes
    read = memory.read(cache[torch.arange(6)])["a"]
    assert read.dtype == torch.float32
    assert (read - memory(images(6)).logits["a"]).abs().max() < 0.02


def test_what_cannot_be_cached():
    memory = memory_of(backbone(), "a")
    with pytest.raises(DataError, match="no image to cache"):
        FeatureCache(memory, images(0))
    cache = FeatureCache(memory, images(2))
    with pytest.raises(StateMismatchError, match="captured on another ViTModel"):
        memory_of(backbone(seed=1), "a").read(cache[torch.tensor([0])])
