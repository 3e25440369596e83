"""A small ViT, pretrained by supervised classification on data that the stream does not use.

Source: the architecture is Dosovitskiy et al. 2021 (arXiv 2010.11929) as `transformers.ViTForImageClassification`.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.artifact import Artifact, TrainingSource
from remanence.errors import SettingError
from remanence.keys import keyed_rng
from remanence.learner import Progress
from remanence.parts.hosts import no_progress_bar
from remanence.parts.learning_rate import warm_cosine
from remanence.parts.optimizer_state import load_moments, moments
from remanence.state import load_state, save_state, write_whole

_CHECKPOINT, _CHECKPOINT_STEPS = "training.safetensors", 200


class PretrainedViT(Artifact):
    """A ViT backbone with the head of its own classes, saved as a Hugging Face folder.

    Args:
        source: what to train on; its test set is only read to report the accuracy.
        width, depth, heads: of the transformer; the hidden layer of its MLP has 2 x width units.
        patch: side of a patch in pixels; must divide the image size.
        epochs, batch_size, lr: AdamW with weight decay 0.05, linear warm-up over a tenth, then cosine to zero.
        seed: key of initialisation and order.

    Raises:
        SettingError: the patch does not divide the image, or the heads do not divide the width.
    """

    kind = "vit"

    def __init__(
        self, source: TrainingSource, width: int = 64, depth: int = 4, heads: int = 4, patch: int = 2, epochs: int = 30,
        batch_size: int = 64, lr: float = 1e-3, seed: int = 0,
    ) -> None:  # fmt: skip
        self.source = source
        side = source.train.inputs.shape[-1]
        if side % patch or width % heads:
            raise SettingError(f"PretrainedViT: patch={patch} must divide the image side {side}, and heads={heads} the width {width}.")
        self.width, self.depth, self.heads, self.patch = width, depth, heads, patch
        self.epochs, self.batch_size, self.lr, self.seed = epochs, batch_size, lr, seed

    def settings(self) -> dict[str, Any]:
        names = ("width", "depth", "heads", "patch", "epochs", "batch_size", "lr", "seed")
        return {"data": self.source.fingerprint(), **{name: getattr(self, name) for name in names}}

    def seen(self) -> Tensor:
        return self.source.train.ids

    def header(self) -> dict[str, Any]:
        return {"name": self.source.name, "classes": torch.unique(self.source.train.targets).tolist()}

    def build(self, folder: Path) -> Iterator[Progress]:
        model, data = self._model(), self.source.train
        classes, columns = torch.unique(data.targets, return_inverse=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.05, fused=True)
        n_steps, first = data.steps(self.epochs, self.batch_size), 0
        if (folder / _CHECKPOINT).exists():
            state = load_state(folder / _CHECKPOINT)
            model.load_state_dict(state["model"])
            load_moments(optimizer, state["moments"])
            first = state["step"]
        for step in range(first, n_steps):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * warm_cosine(step, n_steps, warm_share=0.1)
            rows = data.rows(step, self.batch_size, self.seed, "pretrain")
            with torch.enable_grad(), keyed_rng(self.seed, "pretrain", step):
                loss = F.cross_entropy(model(pixel_values=(data.inputs[rows] - 0.5) / 0.5).logits, columns[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if (step + 1) % _CHECKPOINT_STEPS == 0:
                save_state(folder / _CHECKPOINT, {"model": model.state_dict(), "moments": moments(optimizer), "step": step + 1})
            yield Progress(step + 1, n_steps, loss.detach(), len(rows))
        self._save(model.eval(), classes, folder)

    def sketch(self, folder: Path) -> None:
        with no_progress_bar():
            self._model().save_pretrained(folder)
        write_whole(folder / "header.json", json.dumps(self.header()))

    def _model(self) -> Any:
        from transformers import ViTConfig, ViTForImageClassification

        _, channels, height, _ = self.source.train.inputs.shape
        config = ViTConfig(
            image_size=height, patch_size=self.patch, num_channels=channels, hidden_size=self.width, num_hidden_layers=self.depth,
            num_attention_heads=self.heads, intermediate_size=2 * self.width, num_labels=len(torch.unique(self.source.train.targets)),
        )  # fmt: skip
        with keyed_rng(self.seed, "initialise"):
            return ViTForImageClassification(config)

    @torch.no_grad()
    def _save(self, model: Any, classes: Tensor, folder: Path) -> None:
        test = self.source.test
        answers = [model(pixel_values=(batch - 0.5) / 0.5).logits.argmax(1) for batch in torch.split(test.inputs, 256)]
        accuracy = (classes[torch.cat(answers)] == test.targets).double().mean().item() if len(test) else math.nan
        shutil.rmtree(folder)
        folder.mkdir()
        with no_progress_bar():
            model.save_pretrained(folder)
        write_whole(folder / "preprocessor_config.json", json.dumps({"image_mean": [0.5], "image_std": [0.5]}))
        write_whole(
            folder / "pretraining.json", json.dumps({"test_accuracy": accuracy, "n_classes": len(classes), "n_examples": len(self.seen())})
        )
