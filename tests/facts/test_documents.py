import pytest
from tokenizer_zoo import byte_tokenizer, slow_tokenizer, word_tokenizer

from remanence.errors import DataError, SettingError
from remanence.facts import drafts, read, write

TEXTS = [
    'The old sea was always blue. He said: "The fish are silver." (Nobody has ever seen\nthe floor.) It is so.',
    "Under the ice lives a crab\n\nSomething else was in the stone-grey\n  floor! The crab is blue and so is the crab. It was 1999.",
]
ALL = {"n_rare": 1, "max_share": 1.0, "max_tokens": 99}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(TEXTS * 4, n_tokens=330)


def found(facts):
    return {fact.id: (fact.context, fact.keyword) for fact in facts}


def test_sentences_that_end_on_a_word_worth_probing(tokenizer):
    facts = drafts(TEXTS, tokenizer, **ALL)
    assert found(facts) == {
        "0.0": ("The old sea was always", "blue"),
        "0.1": ('He said: "The fish are', "silver"),
        "0.2": ("(Nobody has ever seen the", "floor"),
        "1.0": ("Under the ice lives a", "crab"),
        "1.1": ("Something else was in the stone-grey", "floor"),
    }  # not "so", a stop word; not the second "crab" of one sentence; not "1999"
    assert facts[1].text == 'He said: "The fish are silver."'
    assert {(fact.theme, fact.kind) for fact in facts} == {("?", "draft")}
    assert facts[0].extra["count"] == 2


def test_frequent_rare_and_long_words_are_left_out(tokenizer):
    assert found(drafts(TEXTS, tokenizer, n_rare=2, max_share=1.0, max_tokens=99)).keys() == {"0.0", "0.2", "1.0", "1.1"}
    assert found(drafts(TEXTS, tokenizer, n_rare=1, max_share=1e-9, max_tokens=99)).keys() == {"0.1"}  # "silver" alone stands there once
    assert found(drafts(TEXTS, tokenizer, n_rare=1, max_share=0.055, max_tokens=99)).keys() == {"0.0", "0.1", "0.2", "1.1"}
    short = drafts(TEXTS, tokenizer, n_rare=1, max_share=1.0, max_tokens=1)
    everything = drafts(TEXTS, tokenizer, **ALL)
    assert found(short) == {fact.id: (fact.context, fact.keyword) for fact in everything if fact.extra["n_tokens"] == 1}
    assert 0 < len(short) < len(everything)


def test_frequencies_from_elsewhere(tokenizer):
    frequencies = {"blue": 50, "silver": 3, "crab": 1, "the": 9_946}
    facts = drafts(TEXTS, tokenizer, max_tokens=99, frequencies=frequencies)
    assert found(facts) == {"0.1": ('He said: "The fish are', "silver")}
    assert facts[0].extra["count"] == 3


@pytest.mark.parametrize("make", [word_tokenizer, slow_tokenizer])
def test_words_that_the_tokenizer_does_not_know_are_left_out(make):
    assert found(drafts(TEXTS, make(["the", "sea", "blue", "silver", "floor"]), **ALL)).keys() == {"0.0", "0.1", "0.2", "1.1"}


def test_drafts_are_written_for_a_person_to_edit(tokenizer, tmp_path):
    facts = drafts(TEXTS, tokenizer, **ALL)
    path = write(facts, tmp_path / "drafts.jsonl")
    assert read(path) == facts
    assert len(path.read_text().splitlines()) == len(facts)


def test_what_cannot_be_drafted(tokenizer):
    assert len(drafts(["Nothing at all to probe in it."], tokenizer)) == 0
    for texts in ([], ["1 2 3"]):
        with pytest.raises(DataError, match=f"no words to count in {len(texts)} documents"):
            drafts(texts, tokenizer)
    for settings in ({"n_rare": -1}, {"max_tokens": 0}, {"max_share": 0.0}, {"max_share": 1.5}):
        with pytest.raises(SettingError, match=rf"{next(iter(settings))}={next(iter(settings.values()))} "):
            drafts(TEXTS, tokenizer, **settings)
