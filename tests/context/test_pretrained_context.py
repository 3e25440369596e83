"""Pretrained models as artifacts: every kind from its folder, killed and resumed; and what is refused."""

import json
from functools import partial

import pytest
import torch
from reader_models import KINDS, SIZES, SOURCE

from remanence.artifact import materialise, refuse_overlap
from remanence.context import ContextTrainer, PretrainedContextLM, document_losses, load_context_model, pretraining
from remanence.errors import DataError, SettingError
from remanence.streams import TextSource, documents


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_pretrained_and_read_from_its_folder(kind, tmp_path):
    artifact = PretrainedContextLM(SOURCE, kind, SIZES[kind], steps=3, rows=2, segment=32)
    folder = materialise(artifact, cache=tmp_path)
    loaded = load_context_model(folder)
    assert type(loaded) is KINDS[kind][0]
    if kind == "windowed":
        assert loaded.config.cache == 0
    report = json.loads((folder / "pretraining.json").read_text())
    nats = torch.cat(document_losses(loaded, [torch.tensor(list(text.encode())) for text in SOURCE.test], bos=256))
    assert report["held_out_bits_per_byte"] == pytest.approx(nats.mean().item() / 0.6931472, abs=1e-4)
    assert report["n_bytes"] == sum(len(text) for text in SOURCE.train)
    assert report["n_parameters"] == sum(parameter.numel() for parameter in loaded.parameters())
    artifact.sketch(tmp_path / "sketch")
    assert type(load_context_model(tmp_path / "sketch")) is KINDS[kind][0]
    assert json.loads((tmp_path / "sketch" / "header.json").read_text()) == {"name": "four texts"}


def test_a_pretraining_that_was_killed_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "ContextTrainer", partial(ContextTrainer, save_every=2))

    def build():
        return PretrainedContextLM(SOURCE, "melodi", SIZES["melodi"], steps=5, rows=1, segment=16)

    class KilledError(RuntimeError):
        pass

    steps = []

    def kill(progress):
        steps.append(progress.step)
        if progress.step == 3:
            raise KilledError

    with pytest.raises(KilledError):
        materialise(build(), kill, tmp_path / "first")
    folder = materialise(build(), lambda progress: steps.append(progress.step), tmp_path / "first")
    assert steps == [1, 2, 3, 3, 4, 5]
    whole = materialise(build(), cache=tmp_path / "second")
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_stream_of_documents_that_were_pretrained_on_is_refused():
    saw = PretrainedContextLM(SOURCE, "melodi", SIZES["melodi"]).seen()
    settings = {"window": 80, "n_windows": 1, "n_test": 2, "n_documents": 2}
    refuse_overlap(saw, "model", documents(SOURCE, **settings))
    swapped = TextSource("swapped", train=SOURCE.test, test=SOURCE.train)
    with pytest.raises(DataError, match=r"2 of 2 test examples of 'document . *' .* are in the training data"):
        refuse_overlap(saw, "model", documents(swapped, **settings))


def test_settings_of_an_artifact_are_checked_before_anything_is_trained():
    first, second = (PretrainedContextLM(SOURCE, "melodi", SIZES["melodi"] | more) for more in ({}, {"short": 3}))
    assert first.fingerprint() != second.fingerprint()
    with pytest.raises(SettingError, match="kind 'mamba' is unknown; choose one of melodi"):
        PretrainedContextLM(SOURCE, "mamba")
    with pytest.raises(SettingError, match="steps=0 must be above 0"):
        PretrainedContextLM(SOURCE, steps=0)
    with pytest.raises(SettingError, match="no setting 'shorts'"):
        PretrainedContextLM(SOURCE, config={"shorts": 3})
    with pytest.raises(SettingError, match="cache is 0 for kind 'windowed'; leave it out"):
        PretrainedContextLM(SOURCE, "windowed", {"cache": 64})
    with pytest.raises(SettingError, match="vocab_size=100 and bos_token_id=99; bytes need 257 rows"):
        PretrainedContextLM(SOURCE, config={"vocab_size": 100})
