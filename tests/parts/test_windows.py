import logging

import pytest
import torch
from tiny_language import SENTENCES, WORDS, byte_tokenizer, word_tokenizer
from transformers import PreTrainedTokenizerFast

from remanence.errors import DataError, SettingError
from remanence.parts import windows as module
from remanence.parts.windows import windows
from remanence.task import example_ids


def test_documents_are_joined_by_eos_and_cut():
    data = windows(["a cat", "the dog ran"], word_tokenizer(), 3, "two")
    a, cat, the, dog, ran = (WORDS.index(word) for word in ("a", "cat", "the", "dog", "ran"))
    assert data.inputs.tolist() == [[a, cat, 1], [the, dog, ran]]
    assert data.targets.tolist() == [[cat, 1, the], [dog, ran, 1]]
    assert torch.equal(data.ids, example_ids("two", torch.arange(2)))
    assert data.inputs.dtype == data.targets.dtype == torch.int64


def test_without_eos_documents_stand_side_by_side():
    data = windows(["a cat", "the dog"], word_tokenizer(eos_token=None), 3, "two")
    assert data.inputs.tolist() == [[WORDS.index(word) for word in ("a", "cat", "the")]]


@pytest.mark.parametrize("length", [1, 2, 5, 18])
def test_every_token_but_the_first_is_predicted_once(length):
    data = windows(SENTENCES, word_tokenizer(), length, "all")
    stream = [token for text in SENTENCES for token in (*word_tokenizer()(text)["input_ids"], 1)]
    n = (len(stream) - 1) // length * length
    assert data.inputs.flatten().tolist() == stream[:n]
    assert data.targets.flatten().tolist() == stream[1 : n + 1]


def test_inputs_and_targets_share_no_memory():
    data = windows(SENTENCES, word_tokenizer(), 4, "all")
    before = data.targets.clone()
    data.inputs.zero_()
    assert torch.equal(data.targets, before)


def test_the_size_of_a_batch_changes_nothing(monkeypatch):
    whole = windows(SENTENCES * 3, word_tokenizer(), 4, "all")
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 40)
    streamed = windows((text for text in SENTENCES * 3), word_tokenizer(), 4, "all")
    assert torch.equal(whole.inputs, streamed.inputs)
    assert torch.equal(whole.targets, streamed.targets)


def test_blank_documents_are_skipped():
    plain, blank = (windows(texts, word_tokenizer(), 2, "x") for texts in (["a cat ran"], ["", "a cat ran", " \n"]))
    assert torch.equal(plain.inputs, blank.inputs)


def test_a_template_that_adds_bos_is_not_applied_and_long_documents_raise_no_warning(caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), eos_token="<|endoftext|>", bos_token="<|endoftext|>", add_bos_token=True, model_max_length=4
    )
    data = windows(["the cat sat on the mat"], tokenizer, 2, "x")
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert int((data.inputs == tokenizer.eos_token_id).sum()) == 0
    assert not caplog.records


def test_too_little_text_is_refused():
    with pytest.raises(DataError, match=r"'short' has 3 tokens, one window of 3 needs 4. Give more text or shorter windows"):
        windows(["a cat"], word_tokenizer(), 3, "short")
    with pytest.raises(DataError, match="'none' has 0 tokens"):
        windows([], word_tokenizer(), 3, "none")
    with pytest.raises(SettingError, match="length: 0 tokens"):
        windows(SENTENCES, word_tokenizer(), 0, "x")
