"""Every example of the README and of docs/own_learner.md runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_readme_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REMANENCE_CACHE", str(tmp_path))
    shared = {}
    found = blocks("README.md", "python")
    assert len(found) >= 8
    for block in found:
        exec(compile(block, "README.md", "exec"), shared)
    assert "bytes: weights, Fisher and anchor" in capsys.readouterr().out


def test_links_and_picture_of_the_readme_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_a_learner_in_a_file_of_ones_own_passes_the_contract_and_takes_part_in_a_recipe(tmp_path, monkeypatch):
    from remanence.cli import main
    from remanence.ledger import Ledger

    learner, contract = blocks("docs/own_learner.md", "python")
    (recipe,) = blocks("docs/own_learner.md", "yaml")
    assert len([line for line in learner.splitlines() if line.strip()]) <= 40
    exec(compile(learner + contract, "own_learner.md", "exec"), {})

    (tmp_path / "nearest_pixel.py").write_text(learner, encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["run", "mine.yaml", "--jobs", "1", "--out", "run"])
    assert ended.value.code == 0
    frame = Ledger.open(tmp_path / "run")
    ends = frame[(frame["probe"] == "accuracy") & (frame["metric"] == "accuracy") & frame["step"].isna()]
    assert ends[ends["event"] == 4]["value"].mean() > 0.9
    forgotten = ends[(ends["verb"] == "forget") & (ends["subject"] == ends["task"])]
    assert len(forgotten) == 2
    assert (forgotten["value"] == 0).all()
