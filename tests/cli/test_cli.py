"""The command line as a person meets it: the first command, the first error, the second run."""

import json
import subprocess
import sys

import pytest

from remanence.cli import main
from remanence.ledger import Ledger
from remanence.probes import five_verbs
from remanence.recipes import shipped


def call(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """The shipped quick recipe, run once for all tests below, with two processes."""
    folder = tmp_path_factory.mktemp("quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMANENCE_CACHE", str(folder / "cache"))
        code = call("run", "digits-quick", "--out", str(folder / "run"), "--jobs", "2")
    return code, folder


def test_the_quick_recipe_gives_what_it_states(quick_run):
    code, folder = quick_run
    assert code == 0
    assert (folder / "run" / "report.html").stat().st_size > 1_000_000


def test_the_run_folder_tells_how_it_came_about(quick_run):
    manifest = json.loads((quick_run[1] / "run" / "run.json").read_text(encoding="utf-8"))
    assert manifest["environment"]["torch"]
    assert manifest["seeds"] == [0, 1]
    assert len(manifest["cells"]) == 8
    for cell in manifest["cells"]:
        assert (quick_run[1] / "run" / "cells" / cell / "ledger.jsonl").exists()


def test_a_second_run_resumes_and_changes_no_ledger(quick_run, capsys, monkeypatch):
    folder = quick_run[1]
    monkeypatch.setenv("REMANENCE_CACHE", str(folder / "cache"))
    ledgers = sorted((folder / "run" / "cells").glob("*/ledger.jsonl"))
    before = [path.read_bytes() for path in ledgers]
    assert call("run", "digits-quick", "--out", str(folder / "run"), "--jobs", "1") == 0
    assert [path.read_bytes() for path in ledgers] == before
    printed = capsys.readouterr().out
    assert "as stated" in printed
    assert "NOT STATED" not in printed
    assert "report.html" in printed


def test_the_number_of_processes_changes_no_exact_row(quick_run, tmp_path, monkeypatch):
    folder = quick_run[1]
    monkeypatch.setenv("REMANENCE_CACHE", str(folder / "cache"))
    settings = ["--set", "seeds=[1]", "--set", "cells=[{stream: in turn, learners: [prototypes]}]"]
    assert call("run", "digits-quick", *settings, "--out", str(tmp_path / "run"), "--jobs", "1") == 0
    name = "cells/in-turn--prototypes--1/ledger.jsonl"

    def exact_rows(path):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{key: value for key, value in row.items() if key != "run"} for row in rows if row["exact"]]

    assert exact_rows(folder / "run" / name) == exact_rows(tmp_path / "run" / name)


def test_compare_and_report_read_a_run(quick_run, capsys, tmp_path):
    run = str(quick_run[1] / "run")
    assert call("compare", run, run) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("learn", "keep", "disturb", "forget", "cost", "chance", "never learned", "prototypes"))
    assert call("report", run, "--out", str(tmp_path / "page.html")) == 0
    assert (tmp_path / "page.html").exists()


def test_another_recipe_is_refused_in_the_same_folder(quick_run, capsys, monkeypatch):
    monkeypatch.setenv("REMANENCE_CACHE", str(quick_run[1] / "cache"))
    assert call("run", "digits-quick", "--set", "seeds=[5]", "--out", str(quick_run[1] / "run")) == 2
    assert "begun with another recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digitss"], "Did you mean 'digits'?"),
        (["run", "absent.yaml"], "no recipe at absent.yaml"),
        (["run", "digits", "--set", "seeds"], "write it as KEY=VALUE"),
        (
            ["run", "digits", "--set", "learners.replay.lrr=1"],
            "learners.replay.lrr: remanence.weights.Replay has no setting 'lrr'. Did you mean",
        ),
        (["run", "digits", "--set", "learners.replai.lr=1"], "Did you mean 'replay'?"),
        (["run", "digits", "--set", "learners.replay.lr=fast"], "must be float, got 'fast'"),
        (
            ["run", "digits", "--dry-run", "--set", "learners.replay.lr=-1"],
            "learners.replay: on stream 'in turn': Replay: lr=-1.0 must be above 0",
        ),
        (["run", "digits", "--dry-run", "--set", "learners.LoRA per task.router=oracle"], "needs to be told the task's name"),
        (["run", "digits", "--dry-run", "--set", "device=cuda"], "device: 'cuda' is not available"),
        (["run", "digits", "--jobs", "0"], "give at least 1 process"),
        (["run", "images", "--dry-run", "--set", "sources.images.path=nowhere"], "nowhere"),
        (["compare", "nowhere"], "not a run folder"),
        (["report", "nowhere"], "not a run folder"),
    ],
)
def test_wrong_input_ends_with_one_clear_line_and_code_2(arguments, message, capsys):
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("command", ["run", "compare", "report", "list"])
def test_every_command_has_help_with_an_example(command, capsys):
    assert call(command, "--help") == 0
    assert f"remanence {command}" in capsys.readouterr().out.split("example:")[1]


def test_list_names_every_recipe_and_the_learners(capsys):
    assert call("list") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*shipped(), "remanence.weights.Replay", "remanence.streams.episodes", "remanence.probes.Cost"))


def test_every_shipped_recipe_states_its_command_and_its_subject():
    import yaml

    for name, path in shipped().items():
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert recipe["name"] == name
        assert recipe["about"]
        trains = "streams" not in recipe
        assert recipe["command"].startswith(f"remanence {'meta-train' if trains else 'run'} {name}")
        assert recipe["minutes"] > 0
        assert trains or recipe.get("expect") or name == "images", "only the recipe for one's own images cannot state its result"


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "remanence", "run", "digitss"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("remanence: no shipped recipe")


def test_importing_the_package_is_cheap_and_pulls_in_no_model_library():
    count = "print(len(set(sys.modules) - before), 'transformers' in sys.modules)"
    code = f"import torch, sys; before = set(sys.modules); import remanence; {count}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    n_modules, pulled = done.stdout.split()
    assert int(n_modules) < 10
    assert pulled == "False"


EPISODES = """
name: few
sources: {digits: {call: remanence.streams.digits}}
streams:
  episodes: {call: remanence.streams.episodes, source: $digits, ways: 3, shots: 2, queries: 4, n: 6}
learners:
  prototypes: {call: remanence.weights.Prototypes, backbone: vit}
probes:
  - {call: remanence.probes.Accuracy}
  - {call: remanence.probes.Cost}
seeds: [0, 1]
"""


def test_episodes_are_run_compared_and_reported(tmp_path, monkeypatch, capsys, tiny_vit):
    monkeypatch.chdir(tmp_path)
    tiny_vit.save_pretrained(tmp_path / "vit")
    (tmp_path / "few.yaml").write_text(EPISODES, encoding="utf-8")
    assert call("run", "few.yaml", "--jobs", "1", "--out", "run") == 0
    printed = capsys.readouterr().out
    assert "chance" in printed
    assert "33.3" in printed
    assert (tmp_path / "run" / "report.html").exists()

    frame = Ledger.open(tmp_path / "run")
    last = frame[(frame["metric"] == "total_bytes") & (frame["event"] == 5) & (frame["seed"] == 0)]
    verbs = five_verbs(frame)
    (per_task,) = verbs[verbs["metric"] == "bytes_per_task"]["mean"]
    assert per_task == last["value"].item() > 0  # every episode starts from the base state


def test_a_vit_folder_takes_the_place_of_an_artifact(tmp_path, monkeypatch, tiny_vit, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_vit.save_pretrained(tmp_path / "vit")
    few = ["--set", "seeds=[0]", "--set", "cells=[{stream: in turn, learners: [prototypes]}]", "--jobs", "1", "--out", "run"]
    assert call("run", "digits-quick", "--set", "artifacts.backbone=vit", *few) == 0
    assert "prototypes" in capsys.readouterr().out
    assert call("run", "digits-quick", "--set", "artifacts.backbone=elsewhere", "--dry-run") == 2
    assert "there is no folder" in capsys.readouterr().err
