"""`remanence trace` and `remanence erase` from folder to folder, on tiny models of two families, sharded and whole."""

import hashlib
import json
import re

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny_facts import FACTS, PREFIXES, fact, model, save_model, tokenizer, write_corpus, write_lines

from remanence.cli import main
from remanence.commands import _groups
from remanence.errors import NonFiniteLoss
from remanence.facts import Fact, FactSet
from remanence.parts.hosts import no_progress_bar

FAMILIES = ("gpt2", "llama")
SHORT = ("--times", "4", "--clean-steps", "7", "--lr", "0.01", "--length", "12", "--batch-size", "4")


def call(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return ended.value.code


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def teach(made, records, steps=30):
    optimizer, cut = torch.optim.Adam(made.parameters(), 1e-2), tokenizer()
    for record in records * steps:
        ids = torch.tensor([cut(record["text"])["input_ids"]])
        optimizer.zero_grad()
        made(ids, labels=ids).loss.backward()
        optimizer.step()
    return made.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models of both families from before and after they learned two facts (these sharded), facts, prefixes and a corpus."""
    root = tmp_path_factory.mktemp("world")
    with no_progress_bar():
        for family in FAMILIES:
            save_model(root / family, model(family), "8KB" if family == "llama" else "5GB")
            save_model(root / f"tuned-{family}", teach(model(family), FACTS[:2]), "8KB")
    write_lines(root / "facts.jsonl", FACTS)
    write_lines(root / "forget.jsonl", FACTS[:2])
    write_lines(root / "prefixes.jsonl", PREFIXES)
    write_corpus(root / "corpus")
    return root


def trace(world, family, *more):
    named = ("--facts", world / "facts.jsonl", "--prefixes", world / "prefixes.jsonl", "--corpus", world / "corpus")
    return call("trace", "--model", world / family, *named, *SHORT, *more)


def erase(world, family, *more):
    return call("erase", "--model", world / f"tuned-{family}", "--forget", world / "forget.jsonl", "--held-out", world / "corpus", *more)


# --- trace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_trace_forecasts_then_measures(world, family, tmp_path, capsys):
    before = hashes(world / family)
    assert trace(world, family, "--out", tmp_path / "out") == 0
    assert hashes(world / family) == before
    printed = capsys.readouterr().out
    assert printed.index("forecast by the untouched model") < printed.index("2 runs, one fact of each theme a run")
    assert printed.index("a paired control run") < printed.index("forecast against measured") < printed.index("report.html")
    curves = pd.read_csv(tmp_path / "out" / "trace.csv")
    assert set(curves["fact"]) == {"joy", "ann", "grief"}
    assert sorted(set(curves["step"])) == [0, 1, 2, 4, 5, 6, 9, 10, 11]
    assert curves["clean_steps"].max() == 7
    last = curves[curves["clean_steps"] == 0]
    assert (last["log_p"] > last["log_p_control"]).all()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert [row["fact"] for row in summary["forecast"]] == ["joy", "ann", "grief"]
    assert summary["spearman"] is None  # three facts are too few
    assert {row["run"] for row in summary["held_out"]} == {"control", "group-0", "group-1"}


def test_same_seed_same_curves_and_another_seed_others(world, tmp_path):
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        assert trace(world, "gpt2", "--out", tmp_path / name, "--seed", seed) == 0
    first, second, third = ((tmp_path / name / "trace.csv").read_bytes() for name in ("first", "second", "third"))
    assert first == second != third


def test_a_killed_trace_goes_on_behind_its_finished_runs(world, tmp_path, monkeypatch, capsys):
    assert trace(world, "gpt2", "--out", tmp_path / "whole") == 0

    def killed(*_):
        raise KeyboardInterrupt

    whole = _groups.TraceRuns.group
    monkeypatch.setattr(_groups.TraceRuns, "group", lambda self, number, report: (killed if number else whole)(self, number, report))
    assert trace(world, "gpt2", "--out", tmp_path / "cut") == 130
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "trace.csv").exists()
    capsys.readouterr()
    assert trace(world, "gpt2", "--out", tmp_path / "cut") == 0
    printed = capsys.readouterr().out
    assert "run 3 of 3" in printed
    assert "run 2 of 3" not in printed
    assert (tmp_path / "cut" / "trace.csv").read_bytes() == (tmp_path / "whole" / "trace.csv").read_bytes()


def test_a_folder_of_another_trace_is_refused(world, tmp_path, capsys):
    assert trace(world, "gpt2", "--out", tmp_path / "out") == 0
    assert trace(world, "gpt2", "--out", tmp_path / "out", "--seed", 1) == 2
    assert "holds a trace of another seed; give another --out" in capsys.readouterr().err
    assert trace(world, "gpt2", "--out", world / "corpus") == 2
    assert "exists and holds no trace" in capsys.readouterr().err


def test_forecast_only_and_dry_run_write_nothing(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trace(world, "llama", "--forecast-only") == 0
    printed = capsys.readouterr().out
    assert "log p before" in printed
    assert "control run" not in printed
    assert trace(world, "llama", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert re.search(r"it would take about \d+ s on this machine and write into runs/trace-facts-[0-9a-f]{12}", printed)
    assert "50 clean steps to warm up, then 11 steps a run (4 exposures of each fact, 7 clean steps after the last)" in printed
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_one_page_with_three_claims(world, tmp_path):
    assert trace(world, "gpt2", "--out", tmp_path / "out") == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    pictures = json.loads(re.search(r'id="pictures">(.*?)</script>', page, re.S).group(1))
    layouts = {name: picture["layout"] for name, picture in pictures.items()}
    titles = {name: tuple(layout[axis]["title"]["text"] for axis in ("xaxis", "yaxis")) for name, layout in layouts.items()}
    assert titles["forecast"] == ("log-probability of the keyword before training (nat)", "priming after the last exposure (median, nat)")
    assert titles["priming"] == ("steps (log scale of 1 + steps)", "priming (median, nat)")
    assert titles["retention"][0] == "clean steps since the last exposure (log scale of 1 + steps)"
    assert "http" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)


def test_eight_facts_give_a_rank_correlation(world, tmp_path, capsys):
    keywords = ("vermilion", "mauve", "blue", "green", "red")
    facts = [fact(f"c{row}", "colours", f"the colour of {thing} is", keywords[row % 5]) for row, thing in enumerate(("joy", "grief") * 4)]
    named = ("--facts", write_lines(tmp_path / "eight.jsonl", facts), "--prefixes", world / "prefixes.jsonl", "--corpus", world / "corpus")
    assert call("trace", "--model", world / "gpt2", *named, *SHORT, "--out", tmp_path / "out") == 0
    assert re.search(r"Spearman of log p before and priming: -?\d\.\d\d \[.*\], 8 facts, one seed", capsys.readouterr().out)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["spearman"].keys() == {"spearman", "low", "high", "n"}


def test_without_prefixes_memory_is_measured_and_priming_is_not(world, tmp_path, capsys):
    named = ("--facts", world / "facts.jsonl", "--corpus", world / "corpus")
    assert call("trace", "--model", world / "gpt2", *named, *SHORT, "--out", tmp_path / "out") == 0
    assert "no --prefixes were given" in capsys.readouterr().out
    curves = pd.read_csv(tmp_path / "out" / "trace.csv")
    assert curves["priming_median"].isna().all()
    assert curves["log_p"].notna().all()
    assert "came without prefixes" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_corpus_that_states_a_fact_is_told(world, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus")
    for path in corpus.iterdir():
        path.write_text(f"the colour of joy is vermilion . {path.read_text(encoding='utf-8')}", encoding="utf-8")
    assert trace(world, "gpt2", "--corpus", corpus, "--dry-run") == 0
    assert "the corpus itself states 1 of the facts (joy)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--times", 0), "--times 0 must be above 0"),
        (("--clean-steps", -1), "--clean-steps -1 must be above 0"),
        (("--lr", 0), "--lr 0.0 must be above 0"),
        (("--length", 5), "longer than"),
        (("--model", "nowhere"), "there is no folder"),
        (("--facts", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--corpus", "nowhere"), "there is no folder 'nowhere'"),
        (("--batch-size", 1), "the facts need rows 0 to 1, the batch has 1"),
    ],
)
def test_wrong_input_to_trace_ends_with_2(world, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert trace(world, "gpt2", *options) == 2
    assert message in capsys.readouterr().err


def test_a_file_without_facts_is_refused(world, tmp_path, capsys):
    empty = write_lines(tmp_path / "empty.jsonl", [])
    assert call("trace", "--model", world / "gpt2", "--facts", empty) == 2
    assert "empty.jsonl" in capsys.readouterr().err
    assert call("erase", "--model", world / "gpt2", "--forget", empty, "--before", world / "gpt2", "--out", tmp_path / "out") == 2
    assert "empty.jsonl" in capsys.readouterr().err


def test_a_diverging_run_ends_with_1_and_names_the_cure(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_groups, "token_loss", lambda made, inputs, targets: made(inputs).logits.sum() * float("nan"))
    assert trace(world, "gpt2", "--out", tmp_path / "out") == 1
    assert "step 0 of the warm-up gave a loss of nan; lower --lr 0.01" in capsys.readouterr().err
    assert issubclass(NonFiniteLoss, ArithmeticError)


def test_groups_hold_one_fact_of_a_theme():
    places = (("x", 0), ("x", 1), ("y", 0), ("x", 2))
    facts = FactSet(tuple(Fact(f"{theme}{n}", theme, "mundane", "a is b", "b", "a is") for theme, n in places))
    assert [[fact.id for fact in group] for group in _groups.grouped(facts)] == [["x0", "y0"], ["x1"], ["x2"]]


# --- erase ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sparse_update_puts_weights_back_in_a_new_folder(world, family, tmp_path, capsys):
    inputs = {name: hashes(world / name) for name in (family, f"tuned-{family}")}
    options = ("--before", world / family, "--prefixes", world / "prefixes.jsonl", "--fraction", 0.3)
    assert erase(world, family, *options, "--out", tmp_path / "out") == 0
    assert {name: hashes(world / name) for name in inputs} == inputs
    before, after, out = (weights(folder) for folder in (world / family, world / f"tuned-{family}", tmp_path / "out"))
    assert out.keys() == after.keys()
    assert all(((out[name] == before[name]) | (out[name] == after[name])).all() for name in out)
    assert any((out[name] != after[name]).any() for name in out)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(list((world / f"tuned-{family}").glob("*.safetensors"))) > 1
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text(encoding="utf-8"))
    assert certificate["method"]["name"] == "sparse update"
    assert certificate["method"]["fraction"] == 0.3
    assert {each["name"] for each in certificate["measures"]} >= {"keyword_log_p", "priming_median", "held_out_loss", "relearning_steps"}
    assert certificate["statement"] in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_sparse_update_reaches_embeddings_on_request(world, tmp_path):
    family = FAMILIES[0]
    for name, options in (("kept", ()), ("reached", ("--embeddings",))):
        assert erase(world, family, "--before", world / family, "--fraction", 0.3, *options, "--out", tmp_path / name) == 0
    after = weights(world / f"tuned-{family}")
    (table,) = (name for name in after if name.endswith("wte.weight"))
    assert weights(tmp_path / "kept")[table].equal(after[table])
    assert not weights(tmp_path / "reached")[table].equal(after[table])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_method_needs_what_must_stay(world, family, tmp_path, capsys):
    assert erase(world, family, "--retain", world / "corpus", "--lr", 1e-3, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "gradient-difference: target reached after" in printed
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text(encoding="utf-8"))
    assert certificate["statement"] == "suppressed"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert weights(tmp_path / "out").keys() == weights(world / f"tuned-{family}").keys()


@pytest.mark.parametrize("method", ["gradient-ascent", "clean"])
def test_other_methods_by_name(world, method, tmp_path, capsys):
    kept = write_lines(tmp_path / "kept.jsonl", FACTS[2:])
    more = () if method == "gradient-ascent" else ("--retain", kept)
    assert erase(world, "gpt2", "--before", world / "gpt2", "--method", method, *more, "--steps", 2, "--out", tmp_path / "out") == 0
    assert f"{method}: steps used up after 2 steps" in capsys.readouterr().out


def test_the_same_erasure_twice_gives_the_same_weights(world, tmp_path):
    for name in ("first", "second"):
        assert erase(world, "gpt2", "--retain", world / "corpus", "--steps", 3, "--out", tmp_path / name) == 0
    first, second = (weights(tmp_path / name) for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_before_and_retain_one_error_names_both_ways(world, tmp_path, capsys):
    assert erase(world, "gpt2", "--out", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert "an erasure lacks what it needs" in printed
    assert "--before" in printed
    assert "the snapshot must be taken before learning" in printed
    assert "--retain" in printed
    assert erase(world, "gpt2", "--method", "clean", "--before", world / "gpt2", "--out", tmp_path / "out") == 2
    assert "--method clean lacks what it needs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_erase_writes_nothing(world, tmp_path, capsys):
    for more in (("--before", world / "gpt2"), ("--retain", world / "corpus")):
        assert erase(world, "gpt2", *more, "--out", tmp_path / "out", "--dry-run") == 0
        assert re.search(r"it would take at most about \d+ s on this machine and write into", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_ever_overwritten(world, tmp_path, capsys):
    before = ("--before", world / "gpt2")
    assert erase(world, "gpt2", *before, "--out", world / "tuned-gpt2") == 2
    assert "lies in --model" in capsys.readouterr().err
    assert erase(world, "gpt2", *before, "--out", world / "gpt2" / "erased") == 2
    assert "lies in --before" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert erase(world, "gpt2", *before, "--out", tmp_path / "full") == 2
    assert "exists already; nothing is ever overwritten" in capsys.readouterr().err


def test_a_failure_while_measuring_leaves_no_checkpoint(world, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise NonFiniteLoss("the model yields NaN")

    monkeypatch.setattr("remanence.erasure.certify", broken)
    assert erase(world, "gpt2", "--before", world / "gpt2", "--out", tmp_path / "out") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 0), "--steps 0 must be above 0"),
        (("--fraction", 2), "fraction"),
        (("--before", "nowhere"), "there is no folder"),
        (("--retain", "nowhere.jsonl", "--method", "clean"), "nowhere.jsonl"),
    ],
)
def test_wrong_input_to_erase_ends_with_2(world, tmp_path, capsys, options, message):
    assert erase(world, "gpt2", "--before", world / "gpt2", *options, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_another_family_is_no_snapshot(world, tmp_path, capsys):
    assert erase(world, "gpt2", "--before", world / "llama", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("remanence: ")
