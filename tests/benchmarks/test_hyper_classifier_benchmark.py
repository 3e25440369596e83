"""The classifier's benchmark draws fairly, says what it cannot measure, and writes a file of the common form."""

import json
from pathlib import Path

import numpy as np
import pytest
from benchmark_files import load

from remanence.errors import DataError
from remanence.generated.files import save_hypertransformer
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.target import TargetNet
from remanence.keys import keyed_rng
from remanence.streams import digits

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    return load("hyper_classifier")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with keyed_rng("tiny"):
        model = HyperTransformer(TargetNet(4, norm="group"), head="prototype", label_codes="random", width=16, depth=1, heads=2)
    path = tmp_path_factory.mktemp("ht")
    save_hypertransformer(model, path)
    return path


def test_a_draw_is_balanced_disjoint_and_keyed(bench):
    data = bench.from_source(digits())
    support, test = bench.draw(data, 5, 5, "digits", 0)
    assert np.unique(data.labels[support], return_counts=True)[1].tolist() == [5] * 5
    assert np.unique(data.labels[test], return_counts=True)[1].tolist() == [40] * 5
    assert set(support).isdisjoint(test)
    assert np.array_equal(support, bench.draw(data, 5, 5, "digits", 0)[0])
    assert not np.array_equal(support, bench.draw(data, 5, 5, "digits", 1)[0])


def test_a_cell_without_test_images_is_unavailable(bench):
    data = bench.Labelled(np.zeros((40, 4, 4)), np.repeat([3, 4], 20))
    row = bench.cell("toy", data, 2, 20, 3, None)
    assert "unavailable: a class has 20 images" in next(bench.lines(row))


def test_the_file_has_the_common_form(bench, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SETS", {"digits": lambda: bench.from_source(digits())})
    assert bench.main(["--quick", "--model", str(folder), "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["command"] == f"python benchmarks/hyper_classifier.py --quick --model {folder.name}"
    assert [(row["ways"], row["shots"]) for row in result["rows"]] == [(5, 1), (5, 5)]
    assert result["gates"] == []
    row = result["rows"][1]
    ours, means = (row["classifiers"][name]["accuracy"] for name in (bench.OURS, "nearest class means"))
    assert row["differences"]["nearest class means"]["mean"] == pytest.approx(ours - means)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_sign_digits_are_checked(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "find_set", lambda name: tmp_path / name / f"{name}.npz")
    with pytest.raises(DataError, match="'sign_digits' is not on this machine"):
        bench.sign_digits()
    (tmp_path / "sign_digits").mkdir()
    (tmp_path / "sign_digits" / "sign_digits.npz").write_bytes(b"other")
    with pytest.raises(DataError, match="is not the known set 'sign_digits'"):
        bench.sign_digits()
