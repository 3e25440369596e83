"""A small model of this room, pretrained on the bytes of a text source's train documents.

    folder = materialise(PretrainedContextLM(python_sources(), kind="melodi", config={"hidden_size": 96}))
    model = load_context_model(folder)
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from remanence.artifact import Artifact
from remanence.context.documents import DocumentReader
from remanence.context.evaluation import document_losses
from remanence.context.kinds import KINDS
from remanence.context.training import ContextTrainer
from remanence.errors import SettingError
from remanence.keys import keyed_rng
from remanence.learner import Progress
from remanence.parts.hosts import no_progress_bar
from remanence.parts.language_pretraining import Documents
from remanence.state import write_whole
from remanence.streams.long_documents import BYTE_BOS, IDS_EVERY, byte_ids, place_ids

ContextKind = Literal["melodi", "transformer-xl", "windowed", "memorizing", "block-recurrent"]


class PretrainedContextLM(Artifact):
    """A byte model of one of the five kinds, saved as a Hugging Face folder that `load_context_model` reads.

    Beside the model stands pretraining.json: bits per byte on the source's test documents, each read from its beginning, and the numbers
    of bytes and parameters. Trained with products in bfloat16.

    Args:
        source: documents to train on; those of its test side are only read to report the loss.
        kind: which model.
        config: settings of its configuration class, such as hidden_size; those that are not given are its own.
        steps: segments of every row to read.
        rows: documents read side by side.
        segment: bytes per row and step.
        lr: peak rate, see `ContextTrainer`.
        seed: key of initialisation and of the order of documents.

    Raises:
        SettingError: the kind is unknown, a setting of the configuration is wrong, or the vocabulary lacks bytes.
    """

    kind = "context"

    def __init__(
        self, source: Documents, kind: ContextKind = "melodi", config: dict[str, Any] | None = None, steps: int = 1000, rows: int = 8,
        segment: int = 512, lr: float = 8e-3, seed: int = 0,
    ) -> None:  # fmt: skip
        if kind not in KINDS:
            raise SettingError(f"PretrainedContextLM: kind '{kind}' is unknown; choose one of {', '.join(get_args(ContextKind))}.")
        for name, value in (("steps", steps), ("rows", rows), ("segment", segment), ("lr", lr)):
            if value <= 0:
                raise SettingError(f"PretrainedContextLM: {name}={value} must be above 0.")
        self.source, self.model_kind, self.config = source, kind, dict(config or {})
        self.steps, self.rows, self.segment, self.lr, self.seed = steps, rows, segment, lr, seed
        made = self._configuration()
        if made.vocab_size <= BYTE_BOS or made.bos_token_id != BYTE_BOS:
            raise SettingError(
                f"PretrainedContextLM: vocab_size={made.vocab_size} and bos_token_id={made.bos_token_id}; bytes need {BYTE_BOS + 1} rows "
                f"or more and BOS at {BYTE_BOS}. Leave both out."
            )

    def _configuration(self) -> Any:
        model, fixed = KINDS[self.model_kind]
        clash = sorted(fixed.keys() & self.config.keys())
        if clash:
            raise SettingError(f"PretrainedContextLM: {clash[0]} is {fixed[clash[0]]} for kind '{self.model_kind}'; leave it out.")
        return model.config_class(**fixed, **self.config)

    def settings(self) -> dict[str, Any]:
        names = ("steps", "rows", "segment", "lr", "seed")
        chosen = {name: getattr(self, name) for name in names}
        return {"data": self.source.fingerprint(), "name": self.source.name, "kind": self.model_kind, "config": self.config, **chosen}

    def seen(self) -> Tensor:
        """Ids of all places of the train documents, as a stream of `remanence.streams.documents` has them."""
        found = [place_ids(document, torch.arange(0, len(document), IDS_EVERY)) for document in self.documents]
        saw: Tensor = torch.unique(torch.cat(found))
        return saw

    def header(self) -> dict[str, Any]:
        return {"name": self.source.name}

    @cached_property
    def documents(self) -> list[Tensor]:
        """The bytes of the train documents."""
        return [byte_ids(text) for text in self.source.train if text]

    def build(self, folder: Path) -> Iterator[Progress]:
        model = self._model()
        reader = DocumentReader(self.documents, self.rows, self.segment, BYTE_BOS, self.seed)
        yield from ContextTrainer(model, reader, self.steps, lr=self.lr, folder=folder, autocast=True).run()
        report = self._report(model.eval())
        shutil.rmtree(folder)
        self._save(model, folder)
        write_whole(folder / "pretraining.json", json.dumps(report))

    def sketch(self, folder: Path) -> None:
        self._save(self._model(), folder)
        write_whole(folder / "header.json", json.dumps(self.header()))

    def _model(self) -> Any:
        with keyed_rng(self.seed, "initialise"):
            return KINDS[self.model_kind].model(self._configuration())

    def _report(self, model: Any) -> Mapping[str, float]:
        losses = torch.cat(document_losses(model, [byte_ids(text) for text in self.source.test], BYTE_BOS, self.rows, self.segment))
        return {
            "held_out_bits_per_byte": losses.double().mean().item() / math.log(2),
            "n_bytes": sum(map(len, self.documents)),
            "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        }

    @staticmethod
    def _save(model: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with no_progress_bar():
            model.save_pretrained(folder)
