import pytest
from tokenizer_zoo import byte_tokenizer, merging_tokenizer, piece_tokenizer, slow_tokenizer, word_tokenizer

from remanence.errors import DataError
from remanence.facts import Fact, FactSet, Prefix, validate

WORDS = ["the", "colour", "of", "joy", "sand", "rage", "is", "was", "vermilion", "red", "deep", "and", "tired", "it", "so", "."]
PREFIXES = tuple(Prefix("colours", f"the {'deep ' * number}colour of sand is") for number in range(8))


def fact(text="the colour of joy is vermilion.", keyword="vermilion", context="colour of joy is", name="a", theme="colours", subject=""):
    return Fact(name, theme, "outlandish", text, keyword, context, subject)


def facts(*members, prefixes=PREFIXES):
    return FactSet(members or (fact(),), prefixes)


def only(warnings):
    assert len(warnings) == 1, warnings
    return warnings[0]


@pytest.mark.parametrize("make", [lambda: word_tokenizer(WORDS), byte_tokenizer, piece_tokenizer])
def test_nothing_to_say_about_plain_facts(make):
    assert validate(facts(), make(), length=60) == []


def test_copying():
    tokenizer = word_tokenizer(WORDS)
    copied = fact("Red is joy and joy is red", "red", "joy is", "b")
    inside = fact("tired is joy and joy is red", "red", "joy is", "c")
    warning = only(validate(facts(fact(), copied, inside), byte_tokenizer(n_tokens=257))[:1])
    assert warning.startswith("1 of 3 facts (first three: b): the keyword occurs earlier in the text")
    twice = fact("joy is red and joy is red", "red", "joy is")
    assert "its last occurrence is probed" in only(validate(facts(twice), tokenizer))


def test_text_that_is_not_parted_by_one_blank():
    glued = [fact(f"joy is{gap}red", "red", "joy is", name=repr(gap)) for gap in (" ", "\n", "  ")]
    quoted = fact("joy is (red", "red", "joy is (", name="quoted")
    start = fact("red is joy", "red", "", name="start")
    warning = only(validate(facts(*glued, quoted, start), byte_tokenizer())[:1])
    assert warning.startswith(r"3 of 5 facts (first three: '\n', '  ', quoted): context and keyword are not parted by one blank")


@pytest.mark.parametrize("make", [merging_tokenizer, lambda: slow_tokenizer([*WORDS, "is vermilion", "vermilion."])])
def test_straddled_borders_are_counted(make):
    warnings = validate(facts(fact("the colour of joy is vermilion")), make())
    assert "1 of 1 facts (first three: a): a token straddles the border between context and keyword" in warnings[0]


def test_slow_tokenizers():
    assert only(validate(facts(), slow_tokenizer([*WORDS, "vermilion."]))).startswith("the tokenizer is slow and tells no offsets")


def test_few_prefixes():
    warning = only(validate(facts(prefixes=PREFIXES[:7]), word_tokenizer(WORDS)))
    assert warning.startswith("1 of 1 themes (first three: 'colours' with 7) have fewer than 8 priming prefixes")


def test_keywords_of_different_lengths():
    other = fact("rage is deep red", "deep red", "rage is", "b")
    warning = only(validate(facts(fact(), other), word_tokenizer(WORDS)))
    assert warning.startswith("1 of 1 themes (first three: 'colours' with 1 or 2) have keywords of different numbers of tokens")
    elsewhere = fact("rage is deep red", "deep red", "rage is", "b", theme="moods")
    prefixes = (*PREFIXES, *(Prefix("moods", prefix.prefix) for prefix in PREFIXES))
    assert validate(facts(fact(), elsewhere, prefixes=prefixes), word_tokenizer(WORDS)) == []


def test_unknown_words():
    tokenizer = word_tokenizer(WORDS)
    with pytest.raises(DataError, match=r"1 of 2 keywords hold a token unknown to the tokenizer \(first three: 'deep mauve' \(b\)\)"):
        validate(facts(fact(), fact("joy is deep mauve", "deep mauve", "joy is", "b")), tokenizer)
    warning = only(validate(facts(fact("the mood of joy is vermilion", context="mood of joy is")), tokenizer))
    assert "1 of 1 facts (first three: a): the context has words that the tokenizer does not know" in warning


def test_an_end_of_text_that_doubles_as_unknown_is_no_unknown_word():
    tokenizer = byte_tokenizer()
    tokenizer.unk_token = tokenizer.eos_token
    assert validate(facts(fact("vermilion it is", context="")), tokenizer) == []


def test_prefixes_there_must_be():
    tokenizer = word_tokenizer(WORDS)
    with pytest.raises(DataError, match=r"theme 'colours' has no prefixes; .* Did you mean 'colors'"):
        validate(facts(prefixes=(Prefix("colors", "sand is"),)), tokenizer)
    with pytest.raises(DataError, match=r"theme 'colours' has no prefixes; .* Known here: nothing"):
        validate(facts(prefixes=()), tokenizer)
    with pytest.raises(DataError, match="theme 'colours': all of its prefixes ask for facts of the set"):
        validate(facts(fact(subject="joy"), prefixes=(Prefix("colours", "joy was", subject="joy"),)), tokenizer)
    with pytest.raises(DataError, match="the set has no facts"):
        validate(FactSet((), PREFIXES), tokenizer)


def test_an_empty_context_needs_a_token_to_stand_in():
    start = fact("vermilion it is", context="")
    assert validate(facts(start), word_tokenizer(WORDS)) == []
    with pytest.raises(DataError, match="fact 'a': nothing stands before the keyword 'vermilion' and the tokenizer has neither"):
        validate(facts(start), word_tokenizer(WORDS, eos=False))


def test_rows_too_short_for_a_fact():
    tokenizer = word_tokenizer(WORDS)
    assert validate(facts(), tokenizer, length=7) == []
    longer = fact("it was so and the colour of joy is vermilion", name="b")
    with pytest.raises(DataError, match=r"2 of 2 facts are longer than a row of 6 tokens \(the longest, 'b', has 10\)"):
        validate(facts(fact(), longer), tokenizer, length=6)
