"""A vision transformer taken apart: what a side stream needs of each layer, whatever library built it.

Axes: B batch, n tokens of the backbone, D width, H heads, d = D / H.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remanence.errors import SettingError

Map = Callable[[Tensor], Tensor]


def _same(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Layer:
    """One pre-norm layer: x + scale1(out(attention(norm1 x))), then + scale2(mlp(norm2 .)).

    Args:
        module: the layer itself.
        projections: the modules that make queries, keys and values: (q, k, v), or one fused (qkv,).
        query_norm, key_norm: on heads (..., d), where a layer has them.
    """

    module: nn.Module
    projections: tuple[nn.Module, ...]
    norm1: Map
    out: Map
    norm2: Map
    mlp: Map
    scale1: Map = _same
    scale2: Map = _same
    query_norm: Map = _same
    key_norm: Map = _same

    @property
    def watched(self) -> tuple[nn.Module, ...]:
        """The modules whose outputs hold the keys and the values."""
        return self.projections[-2:]

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) -> queries, keys and values, each (..., D); through the modules, so that adapters and quantised weights count."""
        if len(self.projections) == 1:
            query, key, value = self.projections[0](hidden).chunk(3, -1)
        else:
            query, key, value = (projection(hidden) for projection in self.projections)
        return query, key, value

    def finish(self, token: Tensor, attended: Tensor) -> Tensor:
        """Residuals, layer scales and MLP around an attention result (..., D)."""
        token = token + self.scale1(self.out(attended))
        return token + self.scale2(self.mlp(self.norm2(token)))


@dataclass(frozen=True)
class Capture:
    """What a pass of the untouched backbone left behind.

    Args:
        output: the model's own output object; None for rows that come from a cache.
        keys, values: per layer (B, H, n, d).
        last: (B, D) the class token as it leaves the model, after the final norm.
        model: which model it was; a capture is never read on top of another one.
    """

    output: Any
    keys: list[Tensor]
    values: list[Tensor]
    last: Tensor
    model: nn.Module | None = None

    def select(self, rows: Tensor) -> "Capture":
        """The pass of these images; `rows` is an index or a mask over B."""
        keys, values = [key[rows] for key in self.keys], [value[rows] for value in self.values]
        return Capture(None, keys, values, self.last[rows], self.model)


class ViTView:
    """Reads a ViT, DeiT or DINOv2 of transformers, or a timm VisionTransformer, without changing it.

    Args:
        model: a `ViTModel`, a `ViTForImageClassification` or their kin, with a class token in front.

    Raises:
        SettingError: a part is not where these libraries keep it, or a layer does not compute what it should.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # a classifier of transformers keeps the transformer under its base model's name
        self.trunk: Any = getattr(model, getattr(model, "base_model_prefix", "") or "-", model)
        blocks = _find(self.trunk, "layers", "encoder.layer", "blocks")
        self.final_norm: nn.Module = _find(self.trunk, "layernorm", "norm")
        _find(self.trunk, "embeddings.cls_token", "cls_token")
        if isinstance(self.final_norm, nn.Identity):
            raise SettingError(
                f"{type(self.trunk).__name__} reads its answer from the mean of its patches; give a model whose class token "
                f"passes a final norm (timm: global_pool='token')."
            )
        self.n_heads = int(_find(blocks[0], "attention.num_attention_heads", "attn.num_heads"))
        self.width = int(_find(self.trunk, "config.hidden_size", "embed_dim"))
        self.image_shape = _image_shape(self.trunk)
        self.layers = [_layer(block) for block in blocks]
        self.scale = 1 / math.sqrt(self.width // self.n_heads)
        self.n_tokens = self._check_layers()

    def split(self, projected: Tensor) -> Tensor:
        """(..., n, D) -> (..., H, n, d)."""
        return projected.reshape(*projected.shape[:-1], self.n_heads, self.width // self.n_heads).transpose(-3, -2)

    def merge(self, heads: Tensor) -> Tensor:
        """(..., H, n, d) -> (..., n, D)."""
        return heads.transpose(-3, -2).flatten(-2)

    @torch.no_grad()
    def capture(self, pixels: Tensor, **model_inputs: Any) -> Capture:
        """Run the model as it is and keep what its key and value projections gave; nothing is computed twice.

        Args:
            pixels: (B, C, height, width), normalised as the model expects.
            model_inputs: what else the model's forward takes.

        Raises:
            SettingError: the model is in training mode, or runs as compiled code that passes the hooks by.
        """
        if self.model.training:
            raise SettingError(
                f"{type(self.model).__name__} is in training mode, so that dropout would change its old answers; call eval() on it."
            )
        seen: dict[nn.Module, Tensor] = {}
        with _watching([*(module for layer in self.layers for module in layer.watched), self.final_norm], seen):
            output = self.model(pixels, **model_inputs)
        keys, values = [], []
        for index, layer in enumerate(self.layers):
            if not all(module in seen for module in layer.watched):
                raise SettingError(
                    f"layer {index} ran without calling the hooks on its key and value projections, as compiled code does. "
                    f"Give the model that was not compiled."
                )
            outputs = [seen[module] for module in layer.watched]
            key, value = outputs if len(outputs) == 2 else outputs[0].chunk(3, -1)[1:]
            keys.append(layer.key_norm(self.split(key)))
            values.append(self.split(value))
        return Capture(output, keys, values, seen[self.final_norm][:, 0], self.model)

    @torch.no_grad()
    def class_token(self) -> Tensor:
        """(D,) the class token as it enters the first layer, position included; it does not depend on the image."""
        return self._layer_inputs(torch.zeros(1, *self.image_shape))[0][0, 0].clone()

    def _layer_inputs(self, pixels: Tensor) -> list[Tensor]:
        """Inputs of all layers and the output of the last, each (B, n, D)."""
        parameter = next(self.trunk.parameters())
        inputs: dict[int, Tensor] = {}
        handles = [
            layer.module.register_forward_pre_hook(lambda module, args, index=index: inputs.__setitem__(index, args[0]))
            for index, layer in enumerate(self.layers)
        ]
        seen: dict[nn.Module, Any] = {}
        try:
            with _watching([self.layers[-1].module], seen):
                self.model(pixels.to(parameter.device, parameter.dtype))
        finally:
            for handle in handles:
                handle.remove()
        last = seen[self.layers[-1].module]
        return [*(inputs[index] for index in range(len(self.layers))), last[0] if isinstance(last, tuple) else last]

    @torch.no_grad()
    def _check_layers(self) -> int:
        """Rebuild each layer's class-token row from the view and compare it with the layer's own output; gives n."""
        pixels = torch.rand(2, *self.image_shape, generator=torch.Generator().manual_seed(0))
        inputs = self._layer_inputs(pixels)
        for index, layer in enumerate(self.layers):
            query, key, value = (self.split(part) for part in layer.project(layer.norm1(inputs[index])))
            weights = (layer.query_norm(query[..., :1, :]) @ layer.key_norm(key).transpose(-1, -2) * self.scale).softmax(-1)
            rebuilt = layer.finish(inputs[index][:, :1], self.merge(weights @ value))[:, 0]
            real = inputs[index + 1][:, 0]
            # relative to the largest unit: trained models have a few that are a thousand times larger than the rest
            bound = max(1.0, float(real.abs().max())) * (1e-4 if real.dtype in (torch.float32, torch.float64) else 0.05)
            if not bool((rebuilt - real).abs().max() <= bound):
                raise SettingError(
                    f"layer {index} ({type(layer.module).__name__}) does not compute plain pre-norm attention and MLP: its class token "
                    f"differs by {(rebuilt - real).abs().max():.2g}. Parallel blocks, rotary positions and windows are not supported."
                )
        return inputs[0].shape[1]


@contextmanager
def _watching(modules: list[nn.Module], seen: dict[nn.Module, Any]) -> Iterator[None]:
    """Keep the output of each module's next call."""
    handles = [module.register_forward_hook(lambda this, args, output: seen.__setitem__(this, output)) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer(block: Any) -> Layer:
    attention = _find(block, "attention", "attn")
    if hasattr(attention, "qkv"):
        projections: tuple[nn.Module, ...] = (attention.qkv,)
        out = attention.proj
    else:
        projections = tuple(_find(attention, f"{name}_proj") for name in "qkv")
        out = _find(attention, "o_proj")
    return Layer(
        module=block,
        projections=projections,
        norm1=_find(block, "layernorm_before", "norm1"),
        out=out,
        norm2=_find(block, "layernorm_after", "norm2"),
        mlp=_find(block, "mlp"),
        scale1=getattr(block, "layer_scale1", getattr(block, "ls1", _same)),
        scale2=getattr(block, "layer_scale2", getattr(block, "ls2", _same)),
        query_norm=getattr(attention, "q_norm", _same),
        key_norm=getattr(attention, "k_norm", _same),
    )


def _image_shape(trunk: Any) -> tuple[int, int, int]:
    size = _find(trunk, "config.image_size", "patch_embed.img_size")
    channels = int(_find(trunk, "config.num_channels", "patch_embed.proj.in_channels"))
    height, width = (size, size) if isinstance(size, int) else size
    return channels, int(height), int(width)


def _find(owner: Any, *paths: str) -> Any:
    """The first attribute path that exists."""
    for path in paths:
        found = owner
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    raise SettingError(
        f"{type(owner).__name__} has none of {', '.join(paths)}; give a ViT, DeiT or DINOv2 of transformers, or a timm VisionTransformer."
    )
