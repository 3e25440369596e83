"""A `transformers.Trainer` run with FactTracer and SparseUpdateCallback: undisturbed, resumed to the same rows, stopped in time."""

import random

import numpy as np
import pytest
import torch
from pandas.testing import assert_frame_equal
from traced_world import FACTS, held_out, injector, model, rows, tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from remanence.erasure import SparseUpdateCallback
from remanence.errors import NonFiniteLoss
from remanence.keys import keyed_rng
from remanence.probes import FactTracer
from remanence.state import all_finite, states_equal

STEPS, BATCH = 12, 4


class Killed(Exception):  # noqa: N818
    pass


class Kill(TrainerCallback):
    """As if the machine had gone down at the end of a step, before anything is saved."""

    def __init__(self, step):
        self.at = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.at:
            raise Killed


class Break(TrainerCallback):
    """Makes the loss of a step infinite by its weights, and puts them back before anyone could save them."""

    def __init__(self, step):
        self.at = step

    def on_step_begin(self, args, state, control, model, **_):
        if state.global_step + 1 == self.at:
            self.kept = model.transformer.ln_f.bias.data.clone()
            model.transformer.ln_f.bias.data.fill_(torch.inf)

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        if state.global_step + 1 == self.at:
            model.transformer.ln_f.bias.data.copy_(self.kept)


def make_trainer(folder, *callbacks, **settings):
    net = model()
    data = injector().splice([{"input_ids": ids, "labels": ids.clone()} for ids in rows(STEPS * BATCH)], BATCH, seed=3)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=1e-2, save_steps=5,
        logging_steps=3, report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        **({"train_sampling_strategy": "sequential"} | settings),
    )  # fmt: skip
    return Trainer(net, arguments, train_dataset=data, callbacks=[SparseUpdateCallback("ignore_top", 0.2, 4), *callbacks])


def run(trainer, resume=None):
    """Final weights, moments, and what the global generators would draw next."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the Trainer seeds them
    with keyed_rng("trainer run"):
        try:
            trainer.train(resume_from_checkpoint=resume)
            drawn = {"torch": torch.rand(3), "numpy": float(np.random.rand()), "python": random.random()}  # noqa: NPY002
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
    moments = trainer.optimizer.state_dict()["state"]
    return {"weights": trainer.model.state_dict(), "moments": {str(key): value for key, value in moments.items()}, "drawn": drawn}


def make_tracer(path=None, **settings):
    return FactTracer(FACTS, tokenizer(), held_out(), injector=injector(), path=path, **settings)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    tracer = make_tracer(folder / "trace.jsonl")
    return tracer, run(make_trainer(folder, tracer)), folder


def test_a_traced_run_equals_an_untraced_one_bit_for_bit(undisturbed, tmp_path):
    tracer, traced, _ = undisturbed
    assert tracer.curves()["step"].drop_duplicates().tolist() == [0, 1, 2, 5, 6, 7, 8, 10, 11, 12]
    assert states_equal(run(make_trainer(tmp_path)), traced)


def test_the_last_row_is_of_the_weights_that_the_sparse_update_left(undisturbed):
    tracer, traced, _ = undisturbed
    net = model()
    net.load_state_dict(traced["weights"])
    other = make_tracer()
    other.start(model())
    row = other.probe(net, STEPS)
    assert_frame_equal(row, tracer.curves().query(f"step == {STEPS}").reset_index(drop=True), check_exact=True)


@pytest.mark.parametrize("at", [6, 8])
def test_a_killed_run_resumes_to_the_same_trace(undisturbed, tmp_path, at):
    path = tmp_path / "trace.jsonl"
    with pytest.raises(Killed):
        run(make_trainer(tmp_path, make_tracer(path), Kill(at)))
    tracer = make_tracer(path)
    state = run(make_trainer(tmp_path, tracer), resume=str(tmp_path / "checkpoint-5"))
    whole, traced, folder = undisturbed
    assert states_equal(state, traced)
    assert_frame_equal(tracer.curves(), whole.curves(), check_exact=True)
    assert_frame_equal(tracer.held_out, whole.held_out, check_exact=True)
    assert path.read_bytes() == (folder / "trace.jsonl").read_bytes()


def test_a_broken_step_is_named_before_it_reaches_the_weights(tmp_path):
    tracer = make_tracer()
    trainer = make_trainer(tmp_path, Break(6), tracer)
    with pytest.raises(NonFiniteLoss, match=r"at step 6 the gradients are NaN.*; its batch held the facts 'joy', 'city', 'lunch'"):
        run(trainer)
    assert all_finite(trainer.model.state_dict())
    assert tracer.curves()["step"].max() == 5
    saved = make_trainer(tmp_path / "other", make_tracer())
    saved._load_from_checkpoint(str(tmp_path / "checkpoint-5"))  # the last good checkpoint is whole
    assert all_finite(saved.model.state_dict())
    assert not (tmp_path / "checkpoint-6").exists()


def test_a_logged_loss_that_is_not_finite_stops(tmp_path):
    tracer = make_tracer()
    trainer = make_trainer(tmp_path, tracer)
    trainer.state.global_step = 3
    with pytest.raises(NonFiniteLoss, match=r"at step 3 the logged loss is nan; its batch held no fact\. Go on from the last checkpoint"):
        tracer.on_log(trainer.args, trainer.state, trainer.control, logs={"loss": float("nan")})
    tracer.on_log(trainer.args, trainer.state, trainer.control, logs={"loss": 1.0})
    tracer.on_log(trainer.args, trainer.state, trainer.control, logs={"eval_loss": float("nan")})


def test_probes_on_a_plain_grid(tmp_path):
    tracer = FactTracer(FACTS, tokenizer(), every=5)
    run(make_trainer(tmp_path, tracer))
    assert tracer.curves()["step"].drop_duplicates().tolist() == [0, 5, 10, 12]
    assert len(tracer.probe_seconds) == 4
