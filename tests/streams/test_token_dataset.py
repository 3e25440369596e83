import os
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from remanence.errors import DataError, SettingError
from remanence.keys import keyed_rng
from remanence.parts import token_loss
from remanence.streams import TokenDataset
from remanence.task import Data


def table(n=10, length=4, **settings):
    ids = torch.arange(n * (length + 1)).view(n, length + 1)
    return Data(ids[:, :-1].clone(), ids[:, 1:].clone(), torch.arange(n), **settings)


def first_ids(batches):
    return [batch["input_ids"][:, 0].tolist() for batch in batches]


def test_an_item_is_a_window_with_its_last_target():
    dataset, data = TokenDataset(table(), 2), table()
    row = data.rows(3, 2, 0, "text")[1]
    item = dataset[7]
    assert item["input_ids"].tolist() == [*data.inputs[row].tolist(), int(data.targets[row, -1])]
    assert torch.equal(item["labels"], item["input_ids"])
    assert {tensor.dtype for tensor in item.values()} == {torch.int64}


def test_a_loader_without_shuffling_walks_the_seeded_order():
    data = table()
    loader = DataLoader(TokenDataset(data, 3, seed=5, n_steps=7), batch_size=3, shuffle=False)
    expected = [data.inputs[data.rows(step, 3, 5, "text"), 0].tolist() for step in range(7)]
    assert first_ids(loader) == expected
    assert sorted([first for batch in expected for first in batch][:10]) == data.inputs[:, 0].tolist()  # one pass sees every window once
    assert first_ids(DataLoader(TokenDataset(data, 3, seed=6, n_steps=7), batch_size=3)) != expected


@pytest.mark.parametrize("start", [0, 2, 7])
def test_a_run_resumes_at_any_step(start):
    data = table()
    whole = first_ids(DataLoader(TokenDataset(data, 3, n_steps=7), batch_size=3))
    rest = TokenDataset(data, 3, n_steps=7, start_step=start)
    assert len(rest) == 3 * (7 - start)
    assert first_ids(DataLoader(rest, batch_size=3)) == whole[start:]


def test_one_pass_is_the_default_and_its_last_batch_is_full():
    assert len(TokenDataset(table(10), 3)) == 12
    assert len(TokenDataset(table(10, one_pass=True), 3)) == 10
    assert first_ids(DataLoader(TokenDataset(table(4, one_pass=True, ordered=True), 3), batch_size=3)) == [[0, 5, 10], [15]]


def test_ignored_targets_are_ignored_labels():
    data = table(2)
    data.targets[:, 1:] = -1
    item = TokenDataset(data, 1)[0]
    assert item["labels"].tolist()[2:] == [-100, -100, -100]
    assert item["labels"].tolist()[1] == item["input_ids"].tolist()[1]
    assert (item["input_ids"] >= 0).all()


def test_transformers_own_loss_of_an_item_is_ours():
    data = table(3)
    data.targets[0, 2:] = -100
    with keyed_rng("model"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=15, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    batch = next(iter(DataLoader(TokenDataset(data, 3), batch_size=3)))
    rows = data.rows(0, 3, 0, "text")
    assert torch.allclose(model(**batch).loss, token_loss(model, data.inputs[rows], data.targets[rows]), rtol=1e-6)


def test_negative_and_absent_items():
    dataset = TokenDataset(table(4), 2)
    assert torch.equal(dataset[-1]["input_ids"], dataset[3]["input_ids"])
    assert len(list(dataset)) == 4
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"has 4 windows, no window {index}"):
            dataset[index]


@pytest.mark.parametrize(
    ("error", "settings", "message"),
    [
        (SettingError, {"batch_size": 0}, "batch_size: 0; give 1 or more"),
        (DataError, {"batch_size": 5}, "4 windows fill no batch of 5"),
        (SettingError, {"batch_size": 2, "start_step": 3}, "start_step: 3 lies outside the run of 2 steps"),
        (SettingError, {"batch_size": 2, "start_step": -1}, "start_step: -1 lies outside"),
    ],
)
def test_impossible_runs_are_refused(error, settings, message):
    with pytest.raises(error, match=message):
        TokenDataset(table(4), **settings)


def test_windows_that_may_be_seen_once_make_one_pass():
    with pytest.raises(SettingError, match="n_steps: 3, but 4 windows that may be seen once make 2 steps"):
        TokenDataset(table(4, one_pass=True), 2, n_steps=3)


SCRIPT = """
import torch
from remanence.streams import TokenDataset
from remanence.task import Data
ids = torch.arange(50).view(10, 5)
print([int(item["input_ids"][0]) for item in TokenDataset(Data(ids, ids + 1, torch.arange(10)), 3, seed=2, n_steps=9)])
"""


def test_the_order_is_the_same_in_every_process():
    environment = os.environ | {"PYTHONHASHSEED": "3"}
    out = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True).stdout
    assert out.strip() == str([int(item["input_ids"][0]) for item in TokenDataset(table(10, 4), 3, seed=2, n_steps=9)])


class _Stop(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = control.should_save = state.global_step == self.at


def _train(folder, stop=None, resume=False):
    with keyed_rng("model"):
        config = GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel(config)
    seen = []
    model.register_forward_pre_hook(lambda _, args, batch: seen.append(batch["input_ids"][:, 0].tolist()), with_kwargs=True)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=3, train_sampling_strategy="sequential", save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    dataset = TokenDataset(table(), 3, n_steps=6)
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[_Stop(stop)] if stop else [])
    with keyed_rng("trainer"):
        trainer.train(resume_from_checkpoint=resume)
    return model, seen


def test_a_trainer_walks_the_order_and_resumes_in_it(tmp_path):
    whole, seen = _train(tmp_path / "whole")
    data = table()
    assert seen == [data.inputs[data.rows(step, 3, 0, "text"), 0].tolist() for step in range(6)]
    _, first = _train(tmp_path / "parts", stop=4)
    model, rest = _train(tmp_path / "parts", resume=True)
    assert (len(first), first + rest) == (4, seen)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), whole.parameters(), strict=True))
