"""Artifacts: built once, resumed after a crash with an equal result, then only read."""

import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from list_stream import ListStream
from recipe_files import shapes

from remanence.artifact import Artifact, cache_folder, materialise, refuse_overlap
from remanence.errors import DataError
from remanence.learner import Progress
from remanence.parts import PretrainedViT, VisionHost
from remanence.parts.pretraining import _CHECKPOINT
from remanence.task import Data, Task, example_ids


def small(seed=0, **settings):
    size = {"width": 16, "depth": 1, "heads": 2, "patch": 4, "epochs": 2, "batch_size": 8}
    return PretrainedViT(shapes("old"), **(size | settings), seed=seed)


class Slow(Artifact):
    kind = "slow"

    def __init__(self, log: Path, seconds: float = 0.3):
        self.log, self.seconds = log, seconds

    def settings(self):
        return {}

    def seen(self):
        return torch.arange(3)

    def build(self, folder):
        with self.log.open("a") as log:
            log.write("built\n")
        time.sleep(self.seconds)
        (folder / "weights").write_text("w")
        yield Progress(1, 1, None, 0)

    def sketch(self, folder):
        folder.mkdir()


def weights_of(folder):
    return VisionHost.load(folder).vit.state_dict()


def test_a_cache_hit_trains_nothing(tmp_path):
    told = []
    first = materialise(small(), told.append, tmp_path)
    assert [progress.step for progress in told] == list(range(1, 11))
    again = materialise(small(), told.append, tmp_path)
    assert (again, len(told)) == (first, 10)
    assert materialise(small(seed=1), None, tmp_path) != first


def test_the_header_lists_what_was_seen(tmp_path):
    header = json.loads((materialise(small(), None, tmp_path) / "header.json").read_text())
    assert header["saw"] == sorted(shapes("old").train.ids.tolist())
    assert (header["kind"], header["name"], header["classes"]) == ("vit", "old", [0, 1, 2, 3])
    assert header["settings"]["width"] == 16


def test_an_interrupted_build_is_resumed_with_an_equal_result(tmp_path, monkeypatch):
    monkeypatch.setattr("remanence.parts.pretraining._CHECKPOINT_STEPS", 3)
    whole = materialise(small(), None, tmp_path / "whole")
    seen = []

    def crash_at(step):
        def on_progress(progress):
            seen.append(progress.step)
            if progress.step == step:
                raise KeyboardInterrupt

        return on_progress

    for step in (5, 8):
        with pytest.raises(KeyboardInterrupt):
            materialise(small(), crash_at(step), tmp_path / "cut")
        assert not list((tmp_path / "cut").glob("vit-*"))
        assert list((tmp_path / "cut").glob(f".vit-*/{_CHECKPOINT}"))
    cut = materialise(small(), crash_at(0), tmp_path / "cut")
    assert seen == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 7, 8, 9, 10]
    assert cut.name == whole.name
    first, second = weights_of(whole), weights_of(cut)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "header.json").read_bytes() == (cut / "header.json").read_bytes()
    assert not list((tmp_path / "cut").glob(".vit-*partial"))


def test_a_build_touches_neither_the_global_generator_nor_the_data(tmp_path):
    source = shapes("old")
    before, images = torch.default_generator.get_state(), source.images.clone()
    for _ in PretrainedViT(source, width=16, depth=1, heads=2, patch=4, epochs=1, batch_size=8).build(_made(tmp_path / "b")):
        assert torch.equal(torch.default_generator.get_state(), before)
    assert torch.equal(source.images, images)


def _made(folder):
    folder.mkdir()
    return folder


def test_the_backbone_learned_something(tmp_path):
    folder = materialise(small(epochs=40, lr=5e-3), None, tmp_path)
    assert json.loads((folder / "pretraining.json").read_text())["test_accuracy"] > 0.6


def test_a_sketch_has_the_shape_of_the_real_thing(tmp_path):
    small().sketch(tmp_path / "sketch")
    sketch, real = VisionHost.load(tmp_path / "sketch"), VisionHost.load(materialise(small(), None, tmp_path))
    assert (sketch.name, sketch.classes, sketch.width) == (real.name, real.classes, real.width) == ("old", (0, 1, 2, 3), 16)
    assert {k: v.shape for k, v in sketch.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}


def test_a_second_process_waits_for_the_first(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=materialise, args=(Slow(tmp_path / "log"), None, tmp_path / "cache")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "built\n"


def test_the_cache_stands_where_the_user_wants_it(tmp_path, monkeypatch):
    monkeypatch.setenv("REMANENCE_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    assert materialise(Slow(tmp_path / "log", 0)).parent == tmp_path / "here"
    monkeypatch.delenv("REMANENCE_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "remanence"


def test_a_stream_whose_test_data_was_seen_is_refused():
    rows = torch.arange(4)
    train, test = (Data(torch.zeros(4, 1), torch.zeros(4).long(), example_ids("digits", rows + first)) for first in (0, 10))
    stream = ListStream(("learn", Task("t", train, test)))
    refuse_overlap(train.ids, "backbone", stream)  # training data may be shared
    turned = example_ids("digits", torch.tensor([11, 99]), variant=3)
    with pytest.raises(DataError, match=r"1 of 4 test examples of 't' \(stream 'list'\) are in the training data of artifact 'backbone'"):
        refuse_overlap(turned, "backbone", stream)
    bystander = ListStream(("learn", Task("t", None, train)), bystanders=[Task("old", None, test)])
    with pytest.raises(DataError, match="test examples of 'old'"):
        refuse_overlap(turned, "backbone", bystander)
