"""Other people's models as hosts of new knowledge.

Axes: B batch, C channels, H, W pixels, D width.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remanence.errors import DataError, SettingError
from remanence.learner import Prediction


class VisionHost(nn.Module):
    """A Hugging Face ViT as a feature extractor, together with the head that it came with.

    It stays in evaluation mode, also while it is fine-tuned: dropout of a user's backbone would make its answers random.

    Args:
        vit: a `transformers.ViTModel`, or any module with the same forward and config.
        name: the task that the model was trained for; a bystander of this name is answered by the old head.
        classes: source labels of the old head's rows; empty when there is no old head.
        old_head: linear map from features to the old classes.
        mean, std: pixel statistics of the model's processor, one for all channels.
    """

    def __init__(
        self,
        vit: nn.Module,
        name: str = "",
        classes: tuple[int, ...] = (),
        old_head: nn.Linear | None = None,
        mean: float = 0.5,
        std: float = 0.5,
    ) -> None:
        super().__init__()
        self.vit, self.old_head = vit, old_head
        self.name, self.classes, self.mean, self.std = name, classes, mean, std

    @property
    def width(self) -> int:
        """D of the features."""
        return int(self._config.hidden_size)

    @property
    def _config(self) -> Any:
        return self.vit.config

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of the class token.

        Args:
            pixels: (B, C, H, W) in [0, 1].

        Returns:
            (B, D).
        """
        if not len(pixels):  # transformers cannot reshape an empty batch
            return pixels.new_empty(0, self.width)
        hidden: Tensor = self.vit(pixel_values=pixels.sub(self.mean).div_(self.std)).last_hidden_state
        return hidden[:, 0]

    def is_old(self, task: str | None) -> bool:
        """Whether this is the task that the model came with, which its own head answers."""
        return task is not None and task == self.name and bool(self.classes)

    def answer_old(self, features: Tensor) -> Prediction:
        """What the model's own head says of features (B, D).

        Raises:
            SettingError: the model came without a head.
        """
        if self.old_head is None:
            raise SettingError("this backbone came without a head; there is no old task to answer.")
        return Prediction(self.old_head(features), torch.tensor(self.classes, device=features.device))

    def require_fit(self, inputs: Tensor, name: str) -> None:
        """Refuse images that the model cannot take.

        Raises:
            DataError: channels or size differ from the model's; both are shown.
        """
        size = self._config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        wanted = (self._config.num_channels, height, width)
        if tuple(inputs.shape[1:]) != wanted:
            raise DataError(
                f"'{name}' has inputs of shape {tuple(inputs.shape[1:])} (channels, height, width), the backbone takes {wanted}. "
                f"Resize the images where they are read, or use a backbone of their size."
            )

    @classmethod
    def load(cls, source: "str | Path | VisionHost | nn.Module") -> "VisionHost":
        """A host of one's own, from a folder that `save_pretrained` wrote or from a model in memory.

        It is in evaluation mode whatever the source's: dropout would make `predict` random and Fisher estimates impossible.

        Args:
            source: folder of a ViTModel or ViTForImageClassification (read once per process), a ViTModel, or a host.

        Raises:
            SettingError: the folder is absent or holds no ViT.
        """
        if isinstance(source, VisionHost):
            return copy.deepcopy(source).eval()
        if isinstance(source, nn.Module):
            return cls(copy.deepcopy(source)).eval()
        return copy.deepcopy(_read(Path(source).expanduser().resolve())).eval()


@lru_cache(maxsize=4)
def _read(folder: Path) -> VisionHost:
    if not (folder / "config.json").exists():
        found = sorted(path.name for path in folder.iterdir())[:5] if folder.is_dir() else "no such folder"
        raise SettingError(f"backbone {folder} has no config.json ({found}). Give a folder that save_pretrained of a ViT wrote.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "vit":
        kind = config.get("model_type")
        raise SettingError(f"backbone {folder} is a '{kind}' model; this learner takes a ViT folder (model_type 'vit').")
    has_head = "ViTForImageClassification" in (config.get("architectures") or ())
    vit, head = _from_pretrained(folder, has_head)
    header = json.loads(header_path.read_text(encoding="utf-8")) if (header_path := folder / "header.json").exists() else {}
    classes = tuple(header.get("classes", range(head.out_features))) if head is not None else ()
    mean, std = _pixel_statistics(folder)
    return VisionHost(vit.eval(), header.get("name", folder.name), classes, head, mean, std)


def _from_pretrained(folder: Path, has_head: bool) -> tuple[nn.Module, nn.Linear | None]:
    from transformers import ViTForImageClassification, ViTModel

    with no_progress_bar():
        if not has_head:
            return ViTModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False), None
        model = ViTForImageClassification.from_pretrained(folder, local_files_only=True)
        return model.vit, model.classifier


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar for the blink that reading or writing a small model takes."""
    from transformers.utils import logging

    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bar:
            logging.enable_progress_bar()


def _pixel_statistics(folder: Path) -> tuple[float, float]:
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    mean, std = (torch.tensor(settings.get(key, [0.5])).mean().item() for key in ("image_mean", "image_std"))
    return mean, std
