"""The tracer in a loop of one's own: its grid, what it leaves alone, what it keeps on disk, what it refuses."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from traced_world import FACTS, held_out, injector, model, rows, tokenizer

from remanence.errors import DataError, NonFiniteLoss, SettingError, StateMismatchError
from remanence.facts import FactSet
from remanence.keys import keyed_rng
from remanence.probes.priming import PrimingProbe
from remanence.probes.tracing import FactTracer


def train(net, tracer=None, first=0, last=12, plan=None, optimizer=None):
    """Steps first + 1 .. last of a training with dropout; returns the optimizer."""
    net.train()
    optimizer = optimizer or torch.optim.AdamW(net.parameters(), lr=1e-2)
    ids = rows(48)
    for step in range(first, last):
        batch = ids[4 * step % 48 :][:4]
        batch = (plan or injector()).apply({"input_ids": batch, "labels": batch.clone()}, step)
        with keyed_rng("dropout", step):
            loss = net(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if tracer is not None:
            tracer.step(net, step + 1, loss)
    return optimizer


@pytest.fixture(scope="module")
def traced():
    net, tracer = model(), FactTracer(FACTS, tokenizer(), held_out(), injector=injector())
    tracer.start(net)
    train(net, tracer)
    return tracer, net


def steps(tracer):
    return tracer.curves()["step"].drop_duplicates().tolist()


def test_the_log_grid_begins_anew_at_the_last_exposure(traced):
    tracer, _ = traced
    assert tracer.last_exposure == 6
    assert steps(tracer) == [0, 1, 2, 5, 6, 7, 8, 10, 11]
    due = [step for step in range(2500) if FactTracer(FACTS, tokenizer()).is_due(step)]
    assert due == [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]


def test_every_counts_from_the_start_and_from_the_last_exposure():
    assert [step for step in range(15) if FactTracer(FACTS, tokenizer(), every=5, last_exposure=7).is_due(step)] == [0, 5, 7, 10, 12]


def test_curves_are_the_measures_of_the_probe(traced):
    tracer, net = traced
    curves = tracer.curves()
    assert list(curves.columns[:5]) == ["step", "fact", "theme", "kind", "clean_steps"]
    assert len(curves) == 9 * len(FACTS)
    start = curves[curves["step"] == 0]
    assert (start[["log_s_mem", "priming_median", "drift"]] == 0).all(axis=None)
    last = curves[curves["step"] == 11]
    assert (last["clean_steps"] == 5).all()
    assert (last["log_s_mem"] > 0.3).all()  # it learned something
    probe = PrimingProbe(FACTS, tokenizer())
    now = probe(net).since(probe(model()))
    row = tracer.probe(net, 12).drop(columns=["step", "clean_steps"])
    assert_frame_equal(row, now, check_exact=False, atol=1e-6, check_dtype=False)


def test_held_out_loss_stands_beside_the_curves(traced):
    tracer, _ = traced
    assert tracer.held_out["step"].tolist()[:9] == [0, 1, 2, 5, 6, 7, 8, 10, 11]
    assert tracer.held_out["loss"].between(2, 6).all()
    assert len(FactTracer(FACTS, tokenizer()).held_out) == 0
    assert len(FactTracer(FACTS, tokenizer()).curves()) == 0


def test_a_traced_run_equals_an_untraced_one_bit_for_bit(traced):
    _, net = traced
    plain = model()
    train(plain)
    assert all(map(torch.equal, net.state_dict().values(), plain.state_dict().values()))


def test_a_probe_leaves_modes_gradients_and_random_states():
    net, tracer = model(), FactTracer(FACTS, tokenizer(), held_out())
    net.train()
    net.transformer.h[0].eval()
    net(rows(2), labels=rows(2)).loss.backward()
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    tracer.start(net)
    tracer.probe(net, 1)
    assert [module.training for module in net.modules()] == modes
    assert all(map(torch.equal, gradients, [parameter.grad for parameter in net.parameters()]))
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert len(tracer.probe_seconds) == 2


def test_a_killed_run_resumes_to_the_same_trace(tmp_path, traced):
    def tracer():
        return FactTracer(FACTS, tokenizer(), held_out(), injector=injector(), path=tmp_path / "trace.jsonl")

    net, first = model(), tracer()
    first.start(net)
    optimizer = train(net, first, last=4)
    checkpoint = {name: value.clone() for name, value in net.state_dict().items()}
    moments = copy.deepcopy(optimizer.state_dict())
    train(net, first, first=4, last=8, optimizer=optimizer)  # killed at step 8; the checkpoint is that of step 4
    assert steps(first)[-1] == 8

    again, second = model(seed=5), tracer()
    again.load_state_dict(checkpoint)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    optimizer.load_state_dict(moments)
    second.start(again, step=4)
    assert steps(second) == [0, 1, 2]
    train(again, second, first=4, optimizer=optimizer)
    undisturbed = traced[0].curves().query("step < 12").reset_index(drop=True)
    assert_frame_equal(second.curves(), undisturbed, check_exact=True)
    third = tracer()
    third.start(again, step=12)
    assert_frame_equal(third.curves(), undisturbed, check_exact=True)
    assert_frame_equal(third.held_out, traced[0].held_out.query("step < 12").reset_index(drop=True), check_exact=True)


def test_the_same_object_goes_on_without_a_file():
    net, tracer = model(), FactTracer(FACTS, tokenizer(), every=1)
    tracer.start(net)
    train(net, tracer, last=3)
    tracer.start(net, step=2)
    assert steps(tracer) == [0, 1, 2]


def test_a_run_begun_again_replaces_its_trace(tmp_path):
    for _ in range(2):
        tracer = FactTracer(FACTS, tokenizer(), every=1, path=tmp_path / "t.jsonl")
        tracer.start(model())
        tracer.step(model(seed=1), 1)
    assert steps(tracer) == [0, 1]


def test_traces_of_something_else_are_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    FactTracer(FACTS, tokenizer(), path=path).start(model())
    with pytest.raises(StateMismatchError, match="trace of another model"):
        FactTracer(FACTS, tokenizer(), path=path).start(model(seed=1))
    with pytest.raises(StateMismatchError, match="trace of other settings: facts, tokenizer differ"):
        FactTracer(FactSet(FACTS.facts[:2], FACTS.prefixes), tokenizer(), path=path).start(model(), step=1)
    with pytest.raises(StateMismatchError, match="held_out, every differ"):
        FactTracer(FACTS, tokenizer(), held_out(), every=3, path=path).start(model())
    (tmp_path / "t.jsonl.before").unlink()
    with pytest.raises(StateMismatchError, match=r"lacks t\.jsonl\.before beside it"):
        FactTracer(FACTS, tokenizer(), path=path).start(model(), step=1)
    path.write_text("step,loss\n")
    with pytest.raises(StateMismatchError, match="not the trace of a FactTracer"):
        FactTracer(FACTS, tokenizer(), path=path).start(model())


def test_refusals():
    for every in (0, -1, "often", 1.5):
        with pytest.raises(SettingError, match="must be 'log' or a number of steps above 0"):
            FactTracer(FACTS, tokenizer(), every=every)
    with pytest.raises(SettingError, match="last_exposure=-1 must be 0 or more"):
        FactTracer(FACTS, tokenizer(), last_exposure=-1)
    tracer = FactTracer(FACTS, tokenizer())
    with pytest.raises(SettingError, match=r"call start\(model\) before the first step"):
        tracer.step(model(), 1)
    with pytest.raises(SettingError, match=r"goes on at step 3, and the scores from before step 0 are not here. Give the path"):
        tracer.start(model(), step=3)
    tracer.start(model())
    tracer.step(model(), 2)
    with pytest.raises(SettingError, match="step 1 comes after step 2 was traced"):
        tracer.step(model(), 1)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(SettingError, match=r"\(.*t\.jsonl is absent\)"):
        FactTracer(FACTS, tokenizer(), path=tmp_path / "t.jsonl").start(model(), step=3)


def test_a_loss_that_is_not_finite_stops_with_step_and_facts():
    tracer = FactTracer(FACTS, tokenizer(), injector=injector())
    tracer.start(model())
    with pytest.raises(NonFiniteLoss, match=r"at step 2 the loss is nan; its batch held the facts 'joy', 'city', 'lunch'. Go on from"):
        tracer.step(model(), 2, torch.tensor(torch.nan))
    with pytest.raises(NonFiniteLoss, match="at step 3 the loss is inf; its batch held no fact"):
        tracer.step(model(), 3, np.inf)
    with pytest.raises(NonFiniteLoss, match="which facts its batch held is not known"):
        FactTracer(FACTS, tokenizer()).step(model(), 3, np.nan)


def test_broken_weights_are_never_probed(monkeypatch):
    tracer = FactTracer(FACTS, tokenizer(), injector=injector())
    net = model()
    tracer.start(net)
    tracer.step(net, 1)
    net.transformer.ln_f.weight.data[3] = torch.nan
    monkeypatch.setattr(tracer, "_probe", lambda *_: pytest.fail("probed"))
    with pytest.raises(NonFiniteLoss, match=r"at step 5 the weights hold a NaN.*; the batches since step 1 held the facts 'joy'"):
        tracer.step(net, 5)
    with pytest.raises(NonFiniteLoss, match="before the first step the weights hold a NaN or an infinity; load the model anew"):
        tracer.start(net)
    assert steps(tracer) == [0, 1]


def test_the_table_survives_values_that_json_cannot_hold(tmp_path):
    lonely = FactSet(FACTS.facts[1:], FACTS.prefixes[-2:])  # nothing primes the first, which has no prefixes
    tracer = FactTracer(lonely, tokenizer(), path=tmp_path / "t.jsonl")
    tracer.start(model())
    assert tracer.curves()["priming_median"].isna().tolist() == [True, False]
    again = FactTracer(lonely, tokenizer(), path=tmp_path / "t.jsonl")
    again.start(model(), step=1)
    assert_frame_equal(again.curves(), tracer.curves())
    assert isinstance(again.curves(), pd.DataFrame)


def control_of(tracer, net, **settings):
    control = FactTracer(FACTS, tokenizer(), **({"last_exposure": tracer.last_exposure} | settings))
    control.start(net)
    train(net, control, plan=injector().control())
    return control


def test_retention_compares_with_the_paired_control_run(traced):
    tracer, _ = traced
    control = control_of(tracer, model())
    table = tracer.retention(control)
    assert table["clean_steps"].drop_duplicates().tolist() == [0, 1, 2, 4, 5]
    assert list(table.columns[:5]) == ["step", "clean_steps", "fact", "theme", "kind"]
    first = table[table["clean_steps"] == 0]
    assert (first["retention"].dropna() == 1).all()
    joy = table[table["fact"] == "joy"]
    gain = (joy["log_p"] - joy["control_log_p"]).to_numpy()
    assert gain[0] > np.log(2)
    assert np.allclose(joy["retention"], gain / gain[0])
    assert joy["half_life"].nunique() == 1
    primed = [curves.query("step >= 6 and fact == 'joy'")["priming_median"].to_numpy() for curves in (tracer.curves(), control.curves())]
    primed = primed[0][: len(joy)] - primed[1]
    if primed[0] >= np.log(2):
        assert np.allclose(joy["priming_retention"], primed / primed[0])
    else:
        assert joy["priming_retention"].isna().all()


def test_refusals_of_retention(traced):
    tracer, _ = traced
    with pytest.raises(SettingError, match="the last exposure, which is not known"):
        FactTracer(FACTS, tokenizer()).retention(tracer)
    with pytest.raises(DataError, match="traced other facts or prefixes"):
        tracer.retention(FactTracer(FactSet(FACTS.facts[:2], FACTS.prefixes), tokenizer()))
    with pytest.raises(DataError, match="was not traced yet"):
        tracer.retention(FactTracer(FACTS, tokenizer()))
    with pytest.raises(DataError, match="began with different models"):
        tracer.retention(control_of(tracer, model(seed=1)))
    with pytest.raises(DataError, match=r"step 6, right after .*control's: \[10\]\)\. Give the control the same every and last_exposure=6"):
        tracer.retention(control_of(tracer, model(), last_exposure=None))
