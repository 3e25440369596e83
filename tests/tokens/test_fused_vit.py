"""Transformers with one fused qkv layer, as timm builds them: through a stand-in with its names, and through timm itself.

Axes: B batch, n tokens, D width, H heads.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from vision_zoo import images, memory_of

from remanence.errors import SettingError
from remanence.keys import keyed_rng
from remanence.tokens import MemoryViT


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, hidden):
        return hidden * self.gamma


class Attention(nn.Module):
    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.LayerNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, hidden):
        batch, n, width = hidden.shape
        query, key, value = self.qkv(hidden).reshape(batch, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, n, width))


class Block(nn.Module):
    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width), Attention(width, heads, qk_norm), Scale(width)
        self.norm2, self.ls2 = nn.LayerNorm(width), Scale(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden):
        hidden = hidden + self.ls1(self.attn(self.norm1(hidden)))
        return hidden + self.ls2(self.mlp(self.norm2(hidden)))


class Patches(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.img_size, self.proj = (8, 8), nn.Conv2d(1, width, 2, 2)

    def forward(self, pixels):
        return self.proj(pixels).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """timm's attribute names; its answer is read off the class token, or off the mean of the patches."""

    def __init__(self, width=16, heads=2, qk_norm=False, pool="token"):
        super().__init__()
        self.embed_dim, self.patch_embed = width, Patches(width)
        self.cls_token, self.reg_token = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 2, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(Block(width, heads, qk_norm) for _ in range(3)))
        self.norm = nn.LayerNorm(width) if pool == "token" else nn.Identity()
        self.head = nn.Linear(width, 5)

    def forward(self, pixels):
        hidden = torch.cat([self.cls_token.expand(len(pixels), -1, -1), self.patch_embed(pixels)], 1) + self.pos_embed
        hidden = torch.cat([hidden[:, :1], self.reg_token.expand(len(pixels), -1, -1), hidden[:, 1:]], 1)
        return self.head(self.norm(self.blocks(hidden))[:, 0])


def build(**settings):
    with keyed_rng("fused"):
        return VisionTransformer(**settings).eval()


def plain_side_stream(model, pixels, task):
    """One task of one memory, block by block, with the class token behind the backbone's tokens and memory after it."""
    hidden = torch.cat([model.cls_token.expand(len(pixels), -1, -1), model.patch_embed(pixels)], 1) + model.pos_embed
    hidden = torch.cat([hidden[:, :1], model.reg_token.expand(len(pixels), -1, -1), hidden[:, 1:]], 1)
    token = task.class_token.expand(len(pixels), 1, -1)
    for block, memory in zip(model.blocks, task.memory, strict=True):
        rows = block.norm1(torch.cat([token, hidden, memory.expand(len(pixels), -1, -1)], 1))
        token = token + block.ls1(block.attn(rows)[:, :1])
        token = token + block.ls2(block.mlp(block.norm2(token)))
        hidden = block(hidden)
    return task.head(model.norm(token)[:, 0])


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "q and k normed"])
def test_the_fused_layer_is_read_as_it_computes(qk_norm):
    model, pixels = build(qk_norm=qk_norm), images(5)
    untouched = copy.deepcopy(model)(pixels)
    memory = memory_of(model, "a", "b")
    assert memory.view.n_tokens == 19
    output = memory(pixels)
    assert torch.equal(output.base, untouched)
    for name in memory.tasks:
        wanted = plain_side_stream(model, pixels, memory.task(name))
        assert wanted.std() > 1e-2
        assert (output.logits[name] - wanted).abs().max() < 1e-5


def test_a_model_without_a_class_token_to_read_is_refused():
    with pytest.raises(SettingError, match=r"mean of its patches.*global_pool='token'"):
        MemoryViT(build(pool="avg"))
    bare = build()
    bare.cls_token = None
    with pytest.raises(SettingError, match=r"none of embeddings.cls_token, cls_token"):
        MemoryViT(bare)


def test_timm_itself():
    timm = pytest.importorskip("timm", reason="timm needs torchvision, which is not installed", exc_type=ImportError)
    settings = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    for extra in ({}, {"qk_norm": True, "init_values": 0.5}, {"reg_tokens": 2}):
        model = timm.models.vision_transformer.VisionTransformer(**settings, **extra).eval()
        wanted = copy.deepcopy(model)(images())
        memory = memory_of(model, "a")
        output = memory(images())
        assert torch.equal(output.base, wanted)
        assert output.logits["a"].shape == (4, 2)
