"""`transformers.Trainer` meets the facts at the scheduled steps, in one go and after a resume."""

import pytest
import torch
from injected_world import FACTS, N_VOCABULARY, items, shown, tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from remanence.errors import SettingError
from remanence.facts import FactInjector, Spaced, require_order
from remanence.keys import keyed_rng

STEPS, BATCH = 12, 4
PLAN = Spaced(every=4, times=3, start=1)


class Recorder(TrainerCallback):
    """The micro-batches of every optimizer step, as the model got them."""

    def __init__(self, model):
        self.steps = {}
        self._now = None
        model.register_forward_pre_hook(self._record, with_kwargs=True)

    def on_step_begin(self, args, state, control, train_dataloader=None, **_):
        require_order(train_dataloader)
        self._now = self.steps.setdefault(state.global_step, [])

    def _record(self, _, __, inputs):
        self._now.append({name: inputs[name].clone() for name in ("input_ids", "labels")})

    def batch(self, step):
        return {name: torch.cat([part[name] for part in self.steps[step]]) for name in ("input_ids", "labels")}


def train(folder, plan, resume=None, accumulation=1, **settings):
    with keyed_rng("tiny gpt2"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=N_VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    recorder = Recorder(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH // accumulation,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        save_steps=5,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **({"train_sampling_strategy": "sequential"} | settings),
    )
    data = plan.splice(items(STEPS * BATCH + 3), BATCH, seed=7)
    Trainer(model, arguments, train_dataset=data, callbacks=[recorder]).train(resume_from_checkpoint=resume)
    return recorder, {name: value.clone() for name, value in model.state_dict().items()}


def injector():
    return FactInjector(FACTS, tokenizer(), PLAN, row=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *train(folder, injector())


def seen(recorder):
    return [(step, row, fact) for step in recorder.steps for row, fact in shown(recorder.batch(step)["input_ids"])]


def test_the_facts_come_at_their_steps(whole):
    _, recorder, _ = whole
    account = injector().exposures(STEPS)
    assert sorted(recorder.steps) == list(range(STEPS))
    assert seen(recorder) == list(account[["step", "row", "fact"]].itertuples(index=False, name=None))
    assert len(account) == 9


def test_the_batches_are_those_of_an_own_loop(whole):
    _, recorder, _ = whole
    data = injector().control().splice(items(STEPS * BATCH + 3), BATCH, seed=7)
    for step in range(STEPS):
        rows = [data[BATCH * step + row] for row in range(BATCH)]
        own = injector().apply({name: torch.stack([item[name] for item in rows]) for name in ("input_ids", "labels")}, step)
        assert all(torch.equal(recorder.batch(step)[name], own[name]) for name in own)


def test_a_resumed_run_meets_the_remaining_batches(whole, tmp_path):
    folder, recorder, weights = whole
    resumed, weights_again = train(tmp_path, injector(), resume=str(folder / "checkpoint-5"))
    assert sorted(resumed.steps) == list(range(5, STEPS))
    for step in resumed.steps:
        assert all(torch.equal(resumed.batch(step)[name], recorder.batch(step)[name]) for name in ("input_ids", "labels"))
    assert all(torch.equal(weights_again[name], weights[name]) for name in weights)


def test_accumulated_batches_make_one_step(whole, tmp_path):
    _, recorder, _ = whole
    halves, _ = train(tmp_path, injector(), accumulation=2)
    assert all(len(parts) == 2 for parts in halves.steps.values())
    assert seen(halves) == seen(recorder)


def test_a_trainer_that_shuffles_is_noticed(tmp_path):
    with pytest.raises(SettingError, match="train_sampling_strategy='sequential'"):
        train(tmp_path, injector(), train_sampling_strategy="random")
