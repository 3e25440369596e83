import pytest
import torch
from toy_memory import ToyMemory, toy_documents

from remanence.context.configuration import TransformerXLConfig
from remanence.context.documents import DocumentReader
from remanence.context.melodi import MelodiLM
from remanence.context.training import CHECKPOINT, ContextTrainer
from remanence.context.transformer_xl import TransformerXL
from remanence.errors import NonFiniteLoss, SettingError, StateMismatchError
from remanence.keys import keyed_rng
from remanence.state import load_state, save_state, states_equal

BOS = 11


def make_reader(seed=0, segment=4):
    return DocumentReader(toy_documents(30, 9, 14, 5), rows=2, segment=segment, bos=BOS, seed=seed)


def make_trainer(folder=None, steps=12, model=None, reader=None, **settings):
    return ContextTrainer(model or ToyMemory(dropout=0.2), reader or make_reader(), steps, folder=folder, **{"save_every": 4} | settings)


def losses(trainer, n=None):
    found = []
    for progress in trainer.run():
        found.append(progress.loss.item())
        if n is not None and len(found) == n:
            break
    return found


def test_it_learns():
    reader = DocumentReader([torch.arange(10).repeat(20)], rows=2, segment=16, bos=BOS)
    trainer = ContextTrainer(ToyMemory(width=16), reader, steps=150, lr=2e-2)
    found = losses(trainer)
    assert found[0] > 2
    assert found[-1] < 0.3


def test_progress_counts_what_is_predicted():
    trainer = make_trainer()
    progress = list(trainer.run())
    assert [item.step for item in progress] == list(range(1, 13))
    assert {item.steps for item in progress} == {12}
    assert [item.n_examples for item in progress] == [int(trainer.reader.batch(step).lengths.sum()) for step in range(12)]
    assert not any(item.loss.requires_grad for item in progress)


def test_memory_is_carried_without_its_gradient():
    model = ToyMemory()
    trainer = make_trainer(model=model)
    steps = trainer.run()
    next(steps)
    carried = trainer.state.hidden
    next(steps)
    assert not any(needs_gradient for _, _, _, needs_gradient in model.read)
    segment = trainer.reader.batch(2)
    goes_on = ~segment.reset[:, 0]
    assert goes_on.any()
    assert carried.abs().sum() > 0


def test_the_loss_is_that_of_documents_read_in_one_piece():
    """Truncation cuts gradients, never the memory: at a rate of nearly zero the losses are those of one long call."""
    document = toy_documents(24)[0]
    model = ToyMemory()
    with torch.no_grad():
        logits, _ = model(torch.cat([torch.tensor([BOS]), document[:-1]])[None])
        whole = torch.nn.functional.cross_entropy(logits[0], document, reduction="none").view(6, 4).mean(1)
    trainer = ContextTrainer(model, DocumentReader([document], rows=1, segment=4, bos=BOS), steps=6, lr=1e-12)
    torch.testing.assert_close(torch.tensor(losses(trainer)), whole)


@pytest.mark.parametrize("n_done", [4, 7, 8, 11])
def test_a_left_training_goes_on_with_the_same_bits(tmp_path, n_done):
    whole = make_trainer()
    expected = losses(whole)
    losses(make_trainer(tmp_path), n_done)  # left between two checkpoints, within documents
    again = make_trainer(tmp_path)
    assert losses(again) == expected[n_done // 4 * 4 :]
    assert states_equal(dict(again.model.state_dict()), dict(whole.model.state_dict()))
    assert torch.equal(again.state.hidden, whole.state.hidden)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("segment", [8, 6])
@pytest.mark.parametrize("kind", [TransformerXL, MelodiLM])
def test_real_memories_go_on_in_the_middle_of_a_window(tmp_path, kind, segment, pack):
    """Segments of 6 tokens cut windows of 4: the memory that is saved holds a window's beginning too."""

    def trainer(folder=None):
        size = {"vocab_size": 12, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "window": 4, "dropout": 0.1}
        own = {"cache": 4} if kind is TransformerXL else {"short": 2, "long_per_window": 2, "long_windows": 3, "long_layers": [1]}
        with keyed_rng("real memory"):
            model = kind(kind.config_class(**size, **own))
        reader = DocumentReader(toy_documents(30, 9, 14, 5), rows=2, segment=segment, bos=BOS, pack=pack)
        return ContextTrainer(model, reader, steps=9, folder=folder, save_every=3)

    expected = losses(trainer())
    losses(trainer(tmp_path), 5)
    again = trainer(tmp_path)
    assert losses(again) == expected[3:]
    assert again.state.document.min() > 0  # several documents were read


def test_the_same_trainer_goes_on_where_it_was_left(tmp_path):
    expected = losses(make_trainer())
    trainer = make_trainer(tmp_path)
    assert losses(trainer, 6) + losses(trainer) == expected


def test_a_finished_training_is_loaded_and_not_repeated(tmp_path):
    first = make_trainer(tmp_path, steps=6)
    losses(first)
    again = make_trainer(tmp_path, steps=6)
    assert losses(again) == []
    assert again.step == 6
    assert states_equal(dict(again.model.state_dict()), dict(first.model.state_dict()))


def test_a_crash_while_writing_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    expected = losses(make_trainer())
    trainer = make_trainer(tmp_path)
    steps = trainer.run()
    for _ in range(6):
        next(steps)
    kept = (tmp_path / CHECKPOINT).read_bytes()

    def crash(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("remanence.state.os.fsync", crash)
        next(steps)
        with pytest.raises(OSError, match="no space"):
            next(steps)
    assert (tmp_path / CHECKPOINT).read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    assert losses(make_trainer(tmp_path)) == expected[4:]


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path):
    model = ToyMemory()
    trainer = make_trainer(tmp_path, model=model)
    steps = trainer.run()
    for _ in range(5):
        next(steps)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.loss = lambda *_, **__: (model.decay * torch.nan, None)
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan at step 5 with lr=0\.008; .*training\.safetensors holds the last good state"):
        next(steps)
    assert states_equal(dict(model.state_dict()), before)
    assert trainer.step == 5
    assert load_state(tmp_path / CHECKPOINT)["step"] == 4


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = ToyMemory()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.loss = lambda *_, **__: (torch.sqrt(model.decay - model.decay.detach()), model.init_state(2))
    trainer = make_trainer(model=model)
    with pytest.raises(NonFiniteLoss, match=r"the norm of the gradient is inf at step 0 with lr=0\.008; no checkpoint was kept"):
        losses(trainer)
    assert states_equal(dict(model.state_dict()), before)
    assert trainer.step == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 1e-3}, r"lr: 0\.008 there, 0\.001 here"),
        ({"steps": 13}, "steps: 12 there, 13 here"),
        ({"reader": make_reader(seed=1)}, "reader seed: 0 there, 1 here"),
        ({"reader": DocumentReader(toy_documents(30, 9, 14, 5, seed=1), rows=2, segment=4, bos=BOS)}, "reader documents"),
        ({"model": ToyMemory(width=7)}, "trained tensors"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, change, named):
    losses(make_trainer(tmp_path, model=ToyMemory()), 4)
    with pytest.raises(StateMismatchError, match=rf"belongs to another training \({named}.*or another folder"):
        make_trainer(tmp_path, **{"model": ToyMemory()} | change).run()


def test_another_configuration_of_the_same_shapes_is_named(tmp_path):
    def trainer(**settings):
        size = {"vocab_size": 12, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "window": 4, "cache": 4}
        return make_trainer(tmp_path, model=TransformerXL(TransformerXLConfig(**size | settings)))

    losses(trainer(), 4)
    with pytest.raises(StateMismatchError, match=r"\(model cache: 4 there, 8 here\)"):
        trainer(cache=8).run()


def test_a_state_of_another_kind_is_refused(tmp_path):
    save_state(tmp_path / CHECKPOINT, {"step": 3})
    with pytest.raises(StateMismatchError, match="lr: None there"):
        make_trainer(tmp_path).run()


def test_frozen_parameters_stay_and_are_not_saved(tmp_path):
    def frozen(seed=0):
        model = ToyMemory(seed=seed)
        model.embedding.requires_grad_(False)
        return model

    model = frozen()
    before = model.embedding.weight.clone()
    losses(make_trainer(tmp_path, model=model), 6)
    assert torch.equal(model.embedding.weight, before)
    assert sorted(load_state(tmp_path / CHECKPOINT)["model"]) == ["decay", "readout.bias", "readout.weight"]
    assert losses(make_trainer(tmp_path, model=frozen())) == losses(make_trainer(model=frozen()))[4:]
    with pytest.raises(StateMismatchError, match="frozen tensors"):
        make_trainer(tmp_path, model=frozen(seed=1)).run()


def test_only_matrices_decay():
    trainer = make_trainer(weight_decay=0.25)
    groups = {group["weight_decay"]: {tuple(item.shape) for item in group["params"]} for group in trainer._optimizer.param_groups}
    assert groups == {0.25: {(12, 6)}, 0.0: {(12,), ()}}


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    losses(make_trainer(), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_mode_returns_after_an_evaluation_between_steps():
    model = ToyMemory()
    for progress in make_trainer(model=model).run():
        model.eval()
        if progress.step == 3:
            break
    assert [training for _, _, training, _ in model.read] == [True] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0 must be above 0"),
        ({"lr": 0.0}, r"lr=0\.0 must be above 0"),
        ({"clip": -1.0}, r"clip=-1\.0 must be above 0"),
        ({"save_every": 0}, "save_every=0 must be above 0"),
        ({"warm_up": 1.0}, r"warm_up=1\.0 lies outside \[0, 1\)"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1\.0 lies outside \[0, 1\)"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1 must be 0 or more"),
        ({"model": ToyMemory().requires_grad_(False)}, "no parameter of the model requires a gradient"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        make_trainer(**settings)


def test_saving_without_a_folder_is_refused():
    with pytest.raises(SettingError, match="no folder for a checkpoint"):
        make_trainer().save()
