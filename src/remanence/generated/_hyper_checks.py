"""What a HyperTransformer refuses: settings that contradict each other, and images that are not of its form."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from remanence.errors import DataError, SettingError
from remanence.generated.episode import Episode
from remanence.generated.target import TargetNet

_KNOWN: dict[str, tuple[str | None, ...]] = {
    "head": ("proto+delta", "prototype", "generated"),
    "allocation": ("output", "spatial"),
    "preset": (None, "paper"),
    "label_codes": ("learned", "random"),
    "bn_stats": ("query", "support"),
}
_COUNTS = ("width", "depth", "heads", "code_width", "shared_features")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of `HyperTransformer` that are unknown or contradict each other."""
    for name, known in _KNOWN.items():
        if settings[name] not in known:
            raise SettingError(f"HyperTransformer: {name}={settings[name]!r} is unknown; give one of {', '.join(map(repr, known))}.")
    for name in _COUNTS:
        if settings[name] < 1:
            raise SettingError(f"HyperTransformer: {name}={settings[name]} must be 1 or more.")
    if settings["max_ways"] < 2:
        raise SettingError(f"HyperTransformer: max_ways={settings['max_ways']}; a task has two classes or more.")
    if settings["label_codes"] == "random" and settings["max_ways"] > settings["code_width"]:
        raise SettingError(
            f"HyperTransformer: {settings['max_ways']} ways need as many orthonormal codes, and code_width={settings['code_width']} "
            f"holds fewer; raise code_width or lower max_ways."
        )
    if settings["generate_norm"] and settings["allocation"] != "output":
        raise SettingError("HyperTransformer: generate_norm needs allocation='output': a slice must belong to one channel.")


def written_layers(target: TargetNet, generate: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the convolutions that are written, in the net's order."""
    if generate == "all":
        return target.conv_names
    if generate == "logits":
        return ()
    names = (generate,) if isinstance(generate, str) else tuple(generate)
    unknown = [name for name in names if name not in target.conv_names]
    if unknown:
        known = ", ".join(target.conv_names)
        raise SettingError(f"HyperTransformer: generate names {unknown}; this net has {known}, or say 'all' or 'logits'.")
    return tuple(name for name in target.conv_names if name in names)


def require_fit(target: TargetNet, dtype: torch.dtype, x: Tensor) -> None:
    """Refuse images (B, S, C, H, W) that the target cannot take, or of another dtype than the parameters'."""
    target.require_fit(x)
    if dtype not in (torch.float32, torch.float64):
        raise DataError(f"the model's parameters are {dtype}, too narrow for its norms; use model.float(), and torch.autocast for speed.")
    if x.is_floating_point() and x.dtype != dtype:  # Episode has its say about bytes
        raise DataError(f"images are {x.dtype}, the model's parameters {dtype}; convert the images with x.to({dtype}).")


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse written weights that are NaN or infinite; the bias of a slot that is never the answer is -inf."""
    # one look at all of them costs a tenth of a look at each; -inf < inf holds, NaN < inf does not
    others = torch.cat([value.flatten() for name, value in tensors.items() if name != "logits.bias"])
    if bool(others.isfinite().all()) and bool((tensors["logits.bias"] < torch.inf).all()):
        return
    broken = [name for name, value in tensors.items() if not (value < torch.inf if name == "logits.bias" else value.isfinite()).all()]
    raise DataError(f"the weights written for {broken[0]} are not finite; look at the images' range, or go back to an earlier state.")


def has_lone_image(target: TargetNet, episode: Episode) -> bool:
    """Whether the statistics of a last map of 1 x 1 rest on a single support image of some task."""
    if target.norm == "group" or target.sides[-1] > 1:
        return False
    mask = episode.support_mask
    return (episode.support_x.shape[1] if mask is None else int(mask.sum(1).min())) == 1


def blanked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Images (B, S, C, H, W), black where absent: padding may hold numbers that overflow, and 0 times infinity is no number."""
    return x if mask is None else x.masked_fill(~mask[..., None, None, None], 0)
