"""The stream of facts: what its tasks hold, and that a learner goes through it."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from remanence.errors import SettingError
from remanence.facts import closed_world
from remanence.facts.scenario import fact_stream, quiz, world_text, world_words
from remanence.keys import keyed_rng
from remanence.learner import fit
from remanence.parts.language_model import load_tokenizer
from remanence.parts.language_pretraining import _word_tokenizer
from remanence.weights import LanguageFineTuning

BATCH = 8


@pytest.fixture(scope="module")
def world():
    return closed_world(seed=0, n_people=8, n_sentences=200)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = _word_tokenizer(world.documents(200, "train"), 1000, world.words)
    tokenizer.save_pretrained(path)
    with keyed_rng("scenario"):
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=40, n_embd=8, n_layer=1, n_head=2)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stream(world, folder):
    return fact_stream(world, folder, n_facts=4, times=3, batch_size=BATCH, length=20)


def test_events_come_in_order_and_have_the_promised_steps(stream):
    assert [(event.verb, event.task.name) for event in stream] == [
        ("learn", "before"), ("learn", "facts"), ("learn", "later"), ("forget", "facts"),
    ]  # fmt: skip
    assert [event.task.train.steps(1, BATCH) for event in stream] == [50, 3, 50, 3]
    assert all(event.task.train.ordered for event in stream)
    assert [task.name for task in stream.subjects] == ["before", "facts", "later"]


def test_each_step_of_the_facts_shows_every_fact_once_and_no_other_step_does(stream, world, folder):
    tokenizer = load_tokenizer(folder)
    wanted = [tokenizer(fact.text, add_special_tokens=False)["input_ids"] for fact in world.facts("outlandish", 4)]

    def shown(data):
        rows = torch.cat([data.inputs, data.targets[:, -1:]], 1).tolist()
        return [row for row, ids in enumerate(rows) if any(ids[: len(text)] == text for text in wanted)]

    before, facts, later = (event.task.train for event in stream[:3])
    assert shown(facts) == [step * BATCH + row for step in range(3) for row in range(4)]
    assert shown(before) == shown(later) == []


def test_the_test_of_the_facts_asks_for_the_keyword_alone(stream, world, folder):
    tokenizer = load_tokenizer(folder)
    test = stream[1].task.test
    for row, fact in enumerate(world.facts("outlandish", 4)):
        counted = test.targets[row] >= 0
        n = len(tokenizer(fact.prompt, add_special_tokens=False)["input_ids"])
        assert tokenizer.decode(test.targets[row][counted]) == fact.keyword
        assert counted.nonzero().flatten().tolist() == [n - 1]
        assert tokenizer.decode(test.inputs[row, :n]) == fact.prompt
        assert set(test.inputs[row, n:].tolist()) <= {tokenizer.eos_token_id}
    assert len(stream[0].task.test) == len(world.known())


def test_held_out_text_is_neither_learned_nor_the_test_of_a_task(stream):
    watched = set(stream.bystanders[0].test.ids.tolist())
    assert watched
    for event in stream:
        assert not watched & {*event.task.train.ids.tolist(), *event.task.test.ids.tolist()}


def test_the_order_is_that_of_the_seed(stream, world, folder):
    again = fact_stream(world, folder, n_facts=4, times=3, batch_size=BATCH, length=20)
    other = fact_stream(world, folder, n_facts=4, times=3, batch_size=BATCH, length=20, order_seed=1)
    assert torch.equal(again[0].task.train.inputs, stream[0].task.train.inputs)
    assert not torch.equal(other[0].task.train.inputs, stream[0].task.train.inputs)


def test_a_learner_takes_the_facts_in_and_gives_them_back(stream, folder):
    learner = LanguageFineTuning(folder, batch_size=BATCH, lr=1e-2, fraction=1.0)
    test = stream[1].task.test
    fit(learner, stream[0].task)
    before = learner.score(test.inputs, test.targets)
    fit(learner, stream[1].task)
    learned = learner.score(test.inputs, test.targets)
    fit(learner, stream[3].task, "forget")
    assert learned.sum() > before.sum() + 1
    assert torch.equal(learner.score(test.inputs, test.targets), before)


def test_wrong_settings_are_refused(world, folder):
    with pytest.raises(SettingError, match="clean_steps: 49; give 50 or more"):
        fact_stream(world, folder, clean_steps=49)
    with pytest.raises(SettingError, match="times: 0; give 1 or more"):
        fact_stream(world, folder, times=0)
    with pytest.raises(SettingError, match=r"length: 2; fact '.*' needs \d+ inputs"):
        quiz(world.facts("outlandish", 1), load_tokenizer(folder), 2, "short")


def test_a_recipe_finds_text_and_words_of_a_world(world):
    assert world_words(world) == world.words
    assert world_text(world).fingerprint() == world.source.fingerprint()
