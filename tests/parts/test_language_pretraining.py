import json
import logging

import pytest
import torch
from tiny_language import Corpus

from remanence.artifact import materialise
from remanence.errors import DataError, NonFiniteLoss, SettingError
from remanence.keys import generator
from remanence.parts import PretrainedLM, held_out_loss, language_pretraining, load_language_model, load_tokenizer
from remanence.parts.windows import windows
from remanence.state import states_equal
from remanence.task import example_ids

SMALL = {"vocab_size": 40, "width": 8, "depth": 1, "heads": 2, "length": 6, "steps": 6, "batch_size": 4}


def artifact(source=None, **settings):
    return PretrainedLM(source or Corpus(), **(SMALL | settings))


def weights(folder):
    return {name: tensor.clone() for name, tensor in load_language_model(folder).state_dict().items()}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_both_families_learn_and_load_in_silence(family, tmp_path, capfd, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    lm = artifact(family=family, steps=60, lr=1e-2)
    losses = []
    folder = materialise(lm, lambda progress: losses.append(float(progress.loss)), tmp_path)
    model, tokenizer = load_language_model(folder), load_tokenizer(folder)
    test = windows(Corpus().test, tokenizer, 6, "corpus test")
    report = json.loads((folder / "pretraining.json").read_text())
    logger.removeHandler(caplog.handler)

    assert model.config.model_type == family
    assert losses[-1] < losses[0] - 0.5
    assert held_out_loss(model, test) == report["held_out_nats_per_token"] < losses[0]
    assert report["n_windows"] == len(lm.train) == len(lm.seen())
    assert report["n_parameters"] == model.num_parameters()
    assert report["unknown_share"] == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "training.safetensors").exists()
    special = (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)
    assert special == (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 1, 2)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_interrupted_build_ends_bit_for_bit_as_an_uninterrupted_one(family, tmp_path, monkeypatch):
    monkeypatch.setattr(language_pretraining, "_CHECKPOINT_STEPS", 2)
    whole, parts = materialise(artifact(family=family), cache=tmp_path / "whole"), tmp_path / "parts"
    parts.mkdir()
    build = artifact(family=family).build(parts)
    for _ in range(5):  # the checkpoint is of step 4
        next(build)
    build.close()
    torch.manual_seed(1)  # nothing may hang on the global state
    rest = list(artifact(family=family).build(parts))
    assert [progress.step for progress in rest] == [5, 6]
    assert states_equal(weights(whole), weights(parts))
    assert (whole / "pretraining.json").read_text() == (parts / "pretraining.json").read_text()


def test_training_leaves_the_global_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    materialise(artifact(), cache=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_is_another_model(tmp_path):
    first, second = (weights(materialise(artifact(seed=seed), cache=tmp_path)) for seed in (0, 1))
    assert not states_equal(first, second)


def test_the_vocabulary_is_the_most_frequent_words_and_the_extra_ones():
    source = Corpus(train=("b b b a a c d", "b a c"))
    words = artifact(source, vocab_size=6).tokenizer.get_vocab()
    assert sorted(words, key=words.get) == ["<unk>", "<eos>", "<pad>", "b", "a", "c"]
    words = artifact(source, vocab_size=9, extra_words=("d", "Mauve-red", "a")).tokenizer.get_vocab()
    assert sorted(words, key=words.get) == ["<unk>", "<eos>", "<pad>", "d", "Mauve", "-", "red", "a", "b"]


def test_ties_of_frequency_are_settled_alike_in_every_process():
    words = [f"w{index}" for index in torch.randperm(50, generator=generator("words")).tolist()]
    source = Corpus(train=(" ".join(words),))
    vocabularies = [artifact(source, vocab_size=20).tokenizer.get_vocab() for _ in range(3)]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]
    assert set(vocabularies[0]) - {"<unk>", "<eos>", "<pad>"} == set(sorted(words)[:17])


def test_case_is_kept_and_marks_are_words():
    tokenizer = artifact(Corpus(train=("Is it a cat?! It's (not) a cat.",))).tokenizer
    assert tokenizer.tokenize("It's a Cat?!") == ["It", "'", "s", "a", "<unk>", "?", "!"]
    assert tokenizer("a cat").keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("text", ["It's a cat, (it seems); or not?", "a cat's mat.", "one two"])
def test_decoding_gives_the_text_back(text):
    tokenizer = artifact(Corpus(train=(text,))).tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert "".join(text[start:end] for start, end in offsets) == text.replace(" ", "")


def test_what_was_seen_is_the_windows_of_the_train_documents():
    lm = artifact()
    assert torch.equal(lm.seen(), example_ids("corpus", torch.arange(len(lm.train))))
    test = windows(Corpus().test, lm.tokenizer, 6, "corpus test")
    assert not torch.isin(test.ids, lm.seen()).any()


def test_the_fingerprint_follows_every_setting_and_the_data():
    changes = {"vocab_size": 41, "family": "llama", "width": 16, "depth": 2, "heads": 4, "length": 7, "steps": 7, "batch_size": 5}
    changes |= {"lr": 1e-3, "seed": 1, "extra_words": ("zebra",), "source": Corpus(name="other")}
    prints = {artifact().fingerprint(), *(artifact(**{name: value}).fingerprint() for name, value in changes.items())}
    assert len(prints) == len(changes) + 1
    assert artifact(Corpus(test=("another one .",))).fingerprint() not in prints
    assert artifact().fingerprint() == artifact().fingerprint()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_sketch_has_the_shape_of_the_result(family, tmp_path):
    lm = artifact(family=family)
    (tmp_path / "sketch").mkdir()
    lm.sketch(tmp_path / "sketch")
    built = materialise(lm, cache=tmp_path / "cache")
    shapes = [{name: tensor.shape for name, tensor in weights(folder).items()} for folder in (tmp_path / "sketch", built)]
    assert shapes[0] == shapes[1]
    assert load_tokenizer(tmp_path / "sketch").get_vocab() == load_tokenizer(built).get_vocab()
    assert json.loads((tmp_path / "sketch" / "header.json").read_text()) == {"name": "corpus"}


def test_embeddings_are_tied_for_gpt2_only(tmp_path):
    for family, is_tied in (("gpt2", True), ("llama", False)):
        model = load_language_model(materialise(artifact(family=family), cache=tmp_path))
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is is_tied
        assert model(torch.zeros(1, 6 + 64, dtype=torch.int64)).logits.shape[1] == 70  # room for probes longer than a window


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "gpt3"}, "family 'gpt3' is unknown; choose one of gpt2, llama"),
        ({"steps": 0}, "steps=0 must be above 0"),
        ({"lr": -1.0}, r"lr=-1.0 must be above 0"),
        ({"width": 9}, "width=9 is no multiple of 2, for 2 heads of 'gpt2'"),
        ({"width": 6, "family": "llama"}, "width=6 is no multiple of 4, for 2 heads of 'llama'"),
        ({"vocab_size": 6, "extra_words": ("ice-cream",)}, "leaves no room beside 6 special and extra words"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        artifact(**settings)


def test_a_diverging_run_stops_and_keeps_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(language_pretraining, "_CHECKPOINT_STEPS", 1)
    with pytest.raises(NonFiniteLoss, match=r"the loss is (nan|inf) at step \d+ with lr=1e\+30; lower lr"):
        list(artifact(lr=1e30, steps=30).build(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["training.safetensors"]


def test_too_little_test_text_is_told_before_training(tmp_path):
    with pytest.raises(DataError, match="'corpus test' has 3 tokens"):
        next(artifact(Corpus(test=("a cat",))).build(tmp_path))
