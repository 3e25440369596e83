"""The callback in a real Trainer: equal to a loop written by hand, resumable, refusals."""

import shutil

import pytest
import torch
from tiny_models import tiny_gpt2
from transformers import Trainer, TrainerCallback, TrainingArguments

from remanence.erasure import SparseUpdateCallback, sparse_delta
from remanence.errors import SettingError, StateMismatchError
from remanence.keys import generator
from remanence.state import copy_state, states_equal

ROWS = torch.randint(0, 13, (28, 8), generator=generator("rows"))


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, *args, **kwargs):
        # the plain mean; which targets the Trainer counts differs between its versions
        return model(**inputs).loss


class StopAt(TrainerCallback):
    """An interruption: a checkpoint, then the end."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def trainer(folder, *callbacks, **settings):
    model = tiny_gpt2()
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no", "save_strategy": "no"}
    same = {"per_device_train_batch_size": 4, "max_steps": 7, "max_grad_norm": 0.0, "dataloader_pin_memory": False}
    args = TrainingArguments(str(folder), **(quiet | same | settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    data = [{"input_ids": row, "labels": row} for row in ROWS]
    return InOrder(model, args, train_dataset=data, callbacks=[*callbacks], optimizers=(optimizer, constant))


def state_of(model):
    return copy_state(dict(model.state_dict()))


def by_hand(ends, fraction=0.1):
    """Seven steps, masked after the steps named."""
    model = tiny_gpt2().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = state_of(model)
    for step in range(7):
        rows = ROWS[4 * step : 4 * step + 4]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in ends:
            before = sparse_delta(before, state_of(model), fraction=fraction)
            model.load_state_dict(before)
    return state_of(model)


@pytest.mark.parametrize(("every", "ends"), [(3, (3, 6, 7)), (1, range(1, 8)), (None, (7,))])
def test_a_trainer_run_equals_a_loop_by_hand(tmp_path, every, ends):
    run = trainer(tmp_path, SparseUpdateCallback(fraction=0.1, every=every))
    run.train()
    assert states_equal(state_of(run.model), by_hand(ends))
    assert not states_equal(state_of(run.model), by_hand(()))


@pytest.mark.parametrize("every", [3, None])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, every):
    run = trainer(tmp_path / "a", SparseUpdateCallback(fraction=0.1, every=every), StopAt(4))
    run.train()
    assert run.state.global_step == 4
    resumed = trainer(tmp_path / "a", SparseUpdateCallback(fraction=0.1, every=every))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert states_equal(state_of(resumed.model), by_hand((3, 6, 7) if every else (7,)))


def test_resume_from_a_folder_elsewhere(tmp_path):
    trainer(tmp_path / "a", SparseUpdateCallback(every=3, fraction=0.1), StopAt(4)).train()
    moved = shutil.move(tmp_path / "a" / "checkpoint-4", tmp_path / "moved")
    resumed = trainer(tmp_path / "b", SparseUpdateCallback(every=3, fraction=0.1, resume_from=moved))
    resumed.train(resume_from_checkpoint=str(moved))
    assert states_equal(state_of(resumed.model), by_hand((3, 6, 7)))


def test_the_last_checkpoint_holds_masked_weights(tmp_path):
    run = trainer(tmp_path, SparseUpdateCallback(fraction=0.1), StopAt(7))
    run.train()
    saved = type(run.model).from_pretrained(tmp_path / "checkpoint-7")
    assert states_equal(state_of(saved), by_hand((7,)))


def test_a_run_that_ends_early_is_masked_too(tmp_path):
    class Stop(StopAt):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == self.step

    run = trainer(tmp_path, SparseUpdateCallback(fraction=1.0, scope=lambda name, tensor: True), Stop(2))
    run.train()
    assert states_equal(state_of(run.model), state_of(tiny_gpt2()))


def test_resuming_without_a_window_or_with_another_is_refused(tmp_path):
    trainer(tmp_path, SparseUpdateCallback(every=3), StopAt(4)).train()
    checkpoint = tmp_path / "checkpoint-4"
    with pytest.raises(StateMismatchError, match="saved at step 4 with every=3; training resumes at step 4 with every=2"):
        trainer(tmp_path, SparseUpdateCallback(every=2)).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(StateMismatchError, match="other settings"):
        trainer(tmp_path, SparseUpdateCallback(every=3, fraction=0.5)).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "sparse_update.safetensors").unlink()
    with pytest.raises(StateMismatchError, match=r"resumes at step 4, but .*checkpoint-4 holds no sparse_update\.safetensors"):
        trainer(tmp_path, SparseUpdateCallback(every=3)).train(resume_from_checkpoint=str(checkpoint))


def test_settings_of_the_callback_are_refused(tmp_path):
    with pytest.raises(SettingError, match="every=0 must be"):
        SparseUpdateCallback(every=0)
    with pytest.raises(SettingError, match="fraction=-1"):
        SparseUpdateCallback(fraction=-1)
    run = trainer(tmp_path, SparseUpdateCallback())
    run.args.load_best_model_at_end = True
    with pytest.raises(SettingError, match="load_best_model_at_end would bring back weights"):
        run.train()
