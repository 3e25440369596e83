"""Certificates: what they state, what they refuse to state, and what they warn of."""

import io
import json
from copy import deepcopy

import pytest
import torch
from erased_world import FORGET, World, untrained, world_tokenizer
from rich.console import Console
from torch import nn

from remanence.erasure import (
    GradientAscent,
    GradientDifference,
    certify,
    data_hash,
    erase,
    finish,
    median_log_p,
    model_hash,
    tokenizer_hash,
)
from remanence.erasure._measuring import _ratio
from remanence.erasure.changes import weight_change
from remanence.errors import DataError, SettingError, StateMismatchError
from remanence.facts import FactSet
from remanence.state import copy_state, states_equal

NONE = {"name": "none"}
QUICK = {"method": NONE, "attacks": ()}


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def target(world):
    return median_log_p(world.base, FORGET, world.tokenizer)


def erased(world, target, method, **settings):
    model = deepcopy(world.tuned)
    outcome = finish(erase(model, FORGET, world.tokenizer, method, world.retain, target, lr=1e-3, **settings))
    return model, outcome


@pytest.fixture(scope="module")
def difference(world, target):
    return erased(world, target, GradientDifference())


@pytest.fixture(scope="module")
def certificate(world, difference):
    model, outcome = difference
    return certify(
        world.tuned,
        model,
        FORGET,
        world.tokenizer,
        world.held_out,
        method=outcome.method,
        steps=outcome.steps,
        seconds=outcome.seconds,
        seed=outcome.seed,
        never_learned=world.base,
        retain=world.retain,
        notes=outcome.notes,
        relearning_lr=2e-3,
    )


def shown(certificate, width=100):
    text = io.StringIO()
    Console(file=text, width=width).print(certificate.table())
    return text.getvalue()


# --- statements ----------------------------------------------------------------------------------------------------


def test_an_eraser_by_gradients_is_said_to_suppress_and_no_more(certificate):
    assert certificate.statement == "suppressed"
    assert any("the facts come back in" in warning and "traces are left" in warning for warning in certificate.warnings)
    assert certificate.measure("relearning_steps").before.value == 0
    assert 0.1 < certificate.measure("relearning_ratio").after.value < 0.8


def test_measures_move_the_way_of_an_erasure(certificate, target):
    log_p, p = certificate.measure("keyword_log_p"), certificate.measure("keyword_p")
    assert log_p.target == target
    assert log_p.before.value > -1
    assert target - 0.1 <= log_p.after.value <= target
    assert p.after.value < 1e-3 < 0.4 < p.before.value
    priming = certificate.measure("priming_median")
    assert priming.target == 0
    assert priming.after.value < priming.before.value - 1
    held_out = certificate.measure("held_out_loss")
    assert held_out.target < held_out.before.value < held_out.after.value


def test_figures_over_two_facts_carry_intervals(certificate):
    for name in ("keyword_log_p", "keyword_p", "priming_median"):
        value = certificate.measure(name).before
        assert value.n == 2
        assert value.low <= value.value <= value.high
    assert certificate.measure("held_out_loss").before.low != certificate.measure("held_out_loss").before.low  # NaN


def test_the_oracle_reaches_the_level_of_relearning(world):
    found = certify(world.tuned, world.base, FORGET, world.tokenizer, method=NONE, never_learned=world.base, relearning_lr=2e-3)
    assert found.statement == "relearning"
    assert found.measure("relearning_ratio").after.value == 1
    assert found.measure("priming_median").after.value == 0


def test_without_an_attack_no_level_above_suppression(world):
    found = certify(world.tuned, world.base, FORGET, world.tokenizer, never_learned=world.base, **QUICK)
    assert found.statement == "suppressed"
    assert found.measure("relearning_steps").note == "not run: not asked for"


def test_doing_nothing_changes_nothing(world):
    found = certify(world.tuned, world.tuned, FORGET, world.tokenizer, world.held_out, method=NONE, never_learned=world.base)
    assert found.statement == "not erased"
    assert found.weights.n_changed == 0
    assert found.model_before == found.model_after
    compared = [each for each in found.measures if each.before is not None]
    assert len(compared) >= 10
    assert all(each.before == each.after or each.before.value == each.after.value for each in compared)
    assert all(row["log_p_before"] == row["log_p_after"] for row in found.facts)


@pytest.mark.parametrize("knows_base", [True, False])
def test_on_the_base_model_there_is_nothing_to_erase(world, knows_base):
    found = certify(world.base, world.base, FORGET, world.tokenizer, never_learned=world.base if knows_base else None, **QUICK)
    assert found.statement == "nothing to erase"
    assert not any("over-erased" in warning for warning in found.warnings)


def test_a_given_target_counts(world):
    found = certify(world.tuned, world.base, FORGET, world.tokenizer, target_log_p=-30.0, **QUICK)
    assert found.statement == "not erased"
    assert found.measure("keyword_log_p").target == -30


# --- what was measured ---------------------------------------------------------------------------------------------


def test_what_was_not_run_says_so_with_a_reason(world):
    bare = FactSet(FORGET.facts)
    found = certify(world.tuned, world.base, bare, world.tokenizer, method=NONE, relearning_lr=2e-3)
    reasons = {each.name: each.note for each in found.measures if not each.was_run}
    assert reasons["priming_median"] == "not run: the facts come without prefixes"
    assert reasons["held_out_loss"] == "not run: no held-out text was given"
    assert reasons["relearning_ratio"] == "not run: no model that never saw the facts was given"
    assert "linear probes" in reasons["linear_probe"]
    assert {"membership", "quantisation"} <= reasons.keys()
    assert found.measure("relearning_steps").was_run
    assert found.statement == "suppressed"


def test_prefixes_of_one_theme_leave_other_columns_out(world):
    alone = FORGET.where(lambda fact: fact.id == "joy")
    alone = FactSet(alone.facts, tuple(prefix for prefix in alone.prefixes if prefix.theme == "colours"))
    found = certify(world.tuned, world.base, alone, world.tokenizer, never_learned=world.base, **QUICK)
    assert found.measure("cross_priming").note == "not run: no fact has a prefix of this kind"
    assert "one fact: there are no intervals" in found.warnings
    assert found.measure("priming_median").before.low != found.measure("priming_median").before.low  # NaN


def test_without_the_base_model_priming_counts_from_the_erasure(world, difference):
    found = certify(world.tuned, difference[0], FORGET, world.tokenizer, **QUICK)
    priming = found.measure("priming_median")
    assert priming.before.value == 0
    assert priming.after.value < 0
    assert priming.target is None
    assert priming.note.endswith("since before the erasure")


def test_an_attack_that_breaks_off_is_not_run(world):
    found = certify(world.tuned, world.base, FORGET, world.tokenizer, method=NONE, relearning_lr=1e30)
    assert found.measure("relearning_steps").note.startswith("not run: the attack broke off at lr=1e+30")
    quantised = deepcopy(world.base)
    quantised.is_quantized = True
    found = certify(world.tuned, quantised, FORGET, world.tokenizer, method=NONE)
    assert found.measure("relearning_steps").note == "not run: a quantised model cannot be trained"


def test_steps_beyond_the_cap_are_said_to_lie_there(world):
    found = certify(world.tuned, world.base, FORGET, world.tokenizer, method=NONE, never_learned=world.base, relearning_cap=2)
    assert found.measure("relearning_steps").note.endswith("; beyond 2: after, target")
    assert found.measure("relearning_ratio").note == "unknown: the newcomer needs more than 2 steps"
    assert found.statement == "suppressed"
    assert any("a newcomer does not learn the facts within 2 steps either; raise the cap" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("new", "base", "ratio", "words"),
    [
        (45, 50, 0.9, "of a newcomer's steps"),
        (None, 50, 1.2, "at least"),
        (12, None, 0.2, "at most"),
        (55, None, None, "unknown: the newcomer needs more than 60 steps"),
        (None, None, None, "unknown"),
        (5, 0, None, "unknown: the model that should never have seen the facts knows them"),
    ],
)
def test_ratios_near_the_cap(new, base, ratio, words):
    found, note, warnings = _ratio(new, base, 60)
    assert found == pytest.approx(ratio) if ratio else found is None
    assert note.startswith(words)
    assert bool(warnings) == (base is None)


def test_nothing_is_changed_by_certifying(world):
    models = [deepcopy(model).train() for model in (world.tuned, world.base)]
    before, state = [copy_state(model.state_dict()) for model in models], torch.get_rng_state()
    certify(*models, FORGET, world.tokenizer, world.held_out, method=NONE, never_learned=models[1], relearning_cap=2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(states_equal(old, copy_state(model.state_dict())) for old, model in zip(before, models, strict=True))
    assert all(model.training for model in models)


# --- warnings ------------------------------------------------------------------------------------------------------


def test_erasing_too_much_is_flagged(world, target):
    model, outcome = erased(world, target - 6, GradientAscent())
    settings = {"never_learned": world.base, "method": outcome.method, "attacks": ()}
    found = certify(world.tuned, model, FORGET, world.tokenizer, world.held_out, **settings)
    assert found.statement == "suppressed"
    assert any(warning.startswith("over-erased: the keywords stand 6.") for warning in found.warnings)
    assert any("2 of 2 facts lie more than 1 nat below their own target (joy, ann)" in warning for warning in found.warnings)
    assert any("the held-out loss rose by" in warning and "more than 2%" in warning for warning in found.warnings)


def test_a_fact_that_is_left_is_named(world, target):
    model = deepcopy(world.tuned)
    finish(erase(model, FORGET[1:], world.tokenizer, GradientAscent(), target_log_p=-24.0, lr=1e-3))
    found = certify(world.tuned, model, FORGET, world.tokenizer, target_log_p=-12.0, **QUICK)
    assert found.statement == "suppressed"  # the median of two is their mean
    assert any("1 of 2 facts lie more than 1 nat above their own target (joy)" in warning for warning in found.warnings)


def test_notes_of_the_eraser_and_the_stand_in_are_said_once(world):
    model, outcome = erased(world, None, GradientAscent())
    found = certify(world.tuned, model, FORGET, world.tokenizer, method=outcome.method, attacks=(), notes=outcome.notes)
    assert sum("a uniform guess over the vocabulary" in warning for warning in found.warnings) == 1


def test_a_sparse_update_needs_weights_from_before_learning(world):
    sparse = {"method": {"name": "sparse update"}, "attacks": ()}
    unchecked = certify(world.tuned, world.base, FORGET, world.tokenizer, **sparse)
    assert any("whether they held the facts was not checked" in warning for warning in unchecked.warnings)
    late = certify(world.tuned, world.base, FORGET, world.tokenizer, never_learned=world.tuned, **sparse)
    assert any("they must have been taken before learning" in warning for warning in late.warnings)
    fine = certify(world.tuned, world.base, FORGET, world.tokenizer, never_learned=world.base, **sparse)
    assert fine.warnings == ()


def test_changes_that_bfloat16_does_not_hold(world):
    short = deepcopy(world.tuned).bfloat16()
    nudged = deepcopy(short).float()
    with torch.no_grad():
        for weight in nudged.parameters():
            weight.mul_(1 + 2**-11)
    text = "100% of the weights moved by less than half a unit in bfloat16's last place"
    assert any(text in warning for warning in certify(short, nudged, FORGET, world.tokenizer, **QUICK).warnings)
    assert not any("bfloat16" in warning for warning in certify(world.tuned, world.base, FORGET, world.tokenizer, **QUICK).warnings)
    still = deepcopy(short)
    with torch.no_grad():
        still.transformer.wpe.weight.mul_(2)
    settings = [QUICK, QUICK | {"method": {"name": "sparse update"}}]
    found = [certify(short, still, FORGET, world.tokenizer, **each).warnings for each in settings]
    assert [any("or not at all: such changes vanish" in warning for warning in warnings) for warnings in found] == [True, False]


# --- refusals ------------------------------------------------------------------------------------------------------


def test_refusals(world):
    with pytest.raises(SettingError, match=r"there is no attack 'relearn'\. Did you mean 'relearning'\?"):
        certify(world.tuned, world.base, FORGET, world.tokenizer, method=NONE, attacks=("relearn",))
    with pytest.raises(DataError, match="there are no facts to certify"):
        certify(world.tuned, world.base, FactSet(()), world.tokenizer, method=NONE)
    with pytest.raises(StateMismatchError, match=r"\d+ parameters differ in name or shape .* merge adapters into their weights first"):
        certify(world.tuned, untrained(width=8), FORGET, world.tokenizer, method=NONE)
    with pytest.raises(KeyError, match="no measure 'loss'; it has keyword_log_p, keyword_p"):
        certify(world.tuned, world.base, FORGET, world.tokenizer, **QUICK).measure("loss")


# --- the record ----------------------------------------------------------------------------------------------------


def test_the_file_holds_everything(certificate, world, tmp_path):
    certificate.write(tmp_path / "new" / "certificate.json")
    found = json.loads((tmp_path / "new" / "certificate.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["certificate.json"]
    assert found["statement"] == "suppressed"
    assert "was not shown to be gone" in found["statement_means"]
    assert found["model_before"] == model_hash(world.tuned)
    assert found["tokenizer"] == tokenizer_hash(world.tokenizer)
    assert {name: each["n"] for name, each in found["data"].items()} == {"facts": 2, "retain": 54, "held_out": 18}
    assert found["data"]["held_out"]["sha256"] == data_hash(world.held_out)
    assert found["method"]["name"] == "gradient difference"
    assert found["method"]["lr"] == 1e-3
    assert found["steps"] > 0
    assert found["seconds"] > 0
    assert found["weights"]["n"] == sum(weight.numel() for weight in world.tuned.parameters())
    assert found["weights"]["share"] > 0.9
    assert found["weights"]["by_module"]["transformer.h.0.mlp.c_fc"]["share"] > 0.9
    log_p = next(each for each in found["measures"] if each["name"] == "keyword_log_p")
    assert log_p["before"]["low"] <= log_p["before"]["value"] <= log_p["before"]["high"]
    loss = next(each for each in found["measures"] if each["name"] == "held_out_loss")
    assert loss["before"]["low"] is None
    assert [row["id"] for row in found["facts"]] == ["joy", "ann"]
    assert "torch" in found["environment"]


def test_the_table_shows_measures_reasons_and_warnings(certificate):
    text = shown(certificate)
    assert "suppressed: the model no longer says the keywords" in text
    for words in ("keyword_log_p", "priming_median", "not run", "linear_probe: not run: this version", "! the facts come back in"):
        assert words in " ".join(text.split())
    assert "gradient difference" in text


def test_names_in_square_brackets_are_no_markup(certificate):
    from dataclasses import replace

    assert "[bold]" in shown(replace(certificate, method={"name": "[bold]"}))


def test_nothing_is_promised(certificate):
    assert "guarantee" not in (certificate.to_json() + shown(certificate)).lower()


# --- fingerprints and changes --------------------------------------------------------------------------------------


def test_the_hash_of_a_model_follows_its_bits(world):
    copy = deepcopy(world.base)
    assert model_hash(copy) == model_hash(world.base)
    with torch.no_grad():
        copy.transformer.ln_f.bias[0] += 1e-3
    assert model_hash(copy) != model_hash(world.base)
    assert model_hash(deepcopy(world.base).bfloat16()) != model_hash(world.base)


def test_tied_weights_count_once(world):
    state = world.base.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    change = weight_change(world.base, world.tuned)
    assert change.n == sum(weight.numel() for weight in world.base.parameters())
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.load_state_dict(first.state_dict())
    second.weight = first.weight
    tied, loose = nn.ModuleList([first, second]), nn.ModuleList([first, deepcopy(second)])
    assert model_hash(tied) != model_hash(loose)


def test_the_hash_of_a_tokenizer_is_not_moved_by_its_use():
    tokenizer = world_tokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer(["ann eats", "ann"], padding=True, truncation=True, max_length=1)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.add_tokens(["new"])
    assert tokenizer_hash(tokenizer) != before


def test_a_slow_tokenizer_has_a_hash_too():
    class Slow:
        special_tokens_map = {"eos_token": "<eos>"}  # noqa: RUF012

        def get_vocab(self):
            return {"a": 0}

    assert len(tokenizer_hash(Slow())) == 64


def test_hashes_of_data_follow_contents_and_order(world):
    assert data_hash(world.held_out) == data_hash(deepcopy(world.held_out))
    assert data_hash(world.held_out) != data_hash(world.held_out.select(torch.arange(len(world.held_out)).flip(0)))
    assert len({data_hash(FORGET), data_hash(FactSet(FORGET.facts)), data_hash(FORGET[:1])}) == 3


def test_changes_are_counted_by_module():
    before = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    after = deepcopy(before)
    with torch.no_grad():
        before[0].weight.fill_(1.0)
        after[0].weight.copy_(torch.tensor([[1.0, 1 + 2**-10], [1 + 2**-8, 4.0]]))
    change = weight_change(before, after)
    assert (change.n, change.n_changed) == (8, 3)
    assert change.share == 3 / 8
    assert change.n_below_bfloat16 == 1  # 2**-8 is half a unit in the last place of 1
    assert change.by_module["0"].n_changed == 3
    assert change.by_module["1"] == (2, 0, 0.0)
    assert change.norm == pytest.approx(3.0, abs=1e-4)
