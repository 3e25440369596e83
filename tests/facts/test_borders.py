import pytest
from tokenizer_zoo import BOS, EOS, byte_tokenizer, merging_tokenizer, piece_tokenizer, slow_tokenizer, word_tokenizer

from remanence.errors import DataError
from remanence.facts.borders import Split, split

WORDS = ["the", "colour", "of", "joy", "is", "vermilion", "red", "deep"]
PREFIX = "the colour of joy is"
ONE_STRING = {
    "word": lambda: word_tokenizer(WORDS),
    "byte": byte_tokenizer,
    "byte, offsets with blanks": lambda: byte_tokenizer(trim_offsets=False),
    "merging": merging_tokenizer,
    "piece": piece_tokenizer,
    "slow": lambda: slow_tokenizer(WORDS, bos=False),
}


@pytest.mark.parametrize("name", ONE_STRING)
@pytest.mark.parametrize("keyword", ["vermilion", "deep vermilion", "vermillion!"])
def test_both_sides_together_are_the_tokens_of_the_whole(name, keyword):
    tokenizer = ONE_STRING[name]()
    found = split(tokenizer, PREFIX, keyword)
    assert found.prefix_ids + found.keyword_ids == tokenizer.encode(f"{PREFIX} {keyword}")
    assert found.prefix_ids
    assert found.keyword_ids


@pytest.mark.parametrize("name", [name for name in ONE_STRING if name != "merging"])
def test_the_keyword_is_decoded_with_its_blank_and_nothing_else(name):
    tokenizer = ONE_STRING[name]()
    found = split(tokenizer, PREFIX, "vermilion")
    assert tokenizer.decode(found.keyword_ids).strip() == "vermilion"
    assert found.prefix_ids == tokenizer.encode(PREFIX)
    assert not found.is_straddled


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_the_blank_belongs_to_the_keyword(trim_offsets):
    tokenizer = byte_tokenizer(trim_offsets=trim_offsets)
    assert tokenizer.decode(split(tokenizer, PREFIX, "vermilion").keyword_ids) == " vermilion"
    # a blank that is a token of its own goes to the keyword, too
    tokenizer = byte_tokenizer(n_tokens=257, trim_offsets=trim_offsets)
    found = split(tokenizer, PREFIX, "red")
    assert tokenizer.decode(found.keyword_ids) == " red"
    assert len(found.keyword_ids) == 4
    assert not found.is_straddled


def test_letters_of_several_bytes_are_not_cut():
    tokenizer = byte_tokenizer(n_tokens=257)
    found = split(tokenizer, "la couleur de la santé", "écarlate")
    assert tokenizer.decode(found.keyword_ids) == " écarlate"
    assert tokenizer.decode(found.prefix_ids) == "la couleur de la santé"
    assert not found.is_straddled


def test_a_token_across_the_border_goes_to_the_keyword_and_is_told():
    tokenizer = merging_tokenizer()
    found = split(tokenizer, PREFIX, "vermilion")
    assert found.is_straddled
    assert tokenizer.decode(found.keyword_ids[:1]) == "is ve"
    assert tokenizer.decode(found.prefix_ids) == "the colour of joy "
    glued_blank = split(tokenizer, PREFIX, "deep vermilion")
    assert glued_blank.is_straddled
    assert tokenizer.decode(glued_blank.keyword_ids) == "is deep vermilion"


def test_a_sentence_of_one_token_needs_a_start():
    texts = ["joy is"] * 50
    tokenizer = merging_tokenizer(texts, n_tokens=300)
    assert len(tokenizer.encode("joy is")) == 1
    with pytest.raises(DataError, match="neither a BOS nor an EOS"):
        split(tokenizer, "joy", "is")
    tokenizer.add_special_tokens({"bos_token": BOS})
    assert split(tokenizer, "joy", "is") == Split([tokenizer.bos_token_id], tokenizer.encode("joy is"), True)


def test_what_stands_in_front_of_a_text_stays_and_nothing_behind():
    tokenizer = piece_tokenizer(ends=True)
    found = split(tokenizer, PREFIX, "vermilion")
    assert found.prefix_ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in found.prefix_ids + found.keyword_ids
    assert found.prefix_ids + found.keyword_ids == tokenizer.encode(f"{PREFIX} vermilion")[:-1]
    slow = slow_tokenizer(WORDS)
    assert slow.encode("red")[-1] == slow.eos_token_id
    assert split(slow, PREFIX, "red") == Split(slow.encode(PREFIX)[:-1], [slow.convert_tokens_to_ids("red")], False)


def test_a_special_token_written_out_in_the_prefix_stays():
    tokenizer = piece_tokenizer()
    found = split(tokenizer, f"the sea {EOS} the colour of joy is", "vermilion")
    assert tokenizer.eos_token_id in found.prefix_ids
    assert tokenizer.decode(found.keyword_ids).strip() == "vermilion"


def test_slow_tokenizers_part_ways_where_a_token_straddles():
    tokenizer = slow_tokenizer([*WORDS, "is red"])
    found = split(tokenizer, PREFIX, "red")
    assert found.is_straddled
    assert found.keyword_ids == [tokenizer.convert_tokens_to_ids("is red")]
    assert found.prefix_ids == tokenizer.encode("the colour of joy")[:-1]
    assert not split(tokenizer, PREFIX, "vermilion").is_straddled


def test_an_empty_prefix_is_bos_else_eos_else_an_error():
    words = word_tokenizer(WORDS)
    red = words.convert_tokens_to_ids("red")
    assert split(words, "", "red") == Split([words.eos_token_id], [red], False)
    both = word_tokenizer(WORDS, bos=True)
    assert split(both, "  ", "red").prefix_ids == [both.bos_token_id]
    pieces = piece_tokenizer()
    assert split(pieces, "", "red").prefix_ids == [pieces.bos_token_id]  # once, though the tokenizer adds it as well
    assert split(slow_tokenizer(WORDS), "", "red").prefix_ids == [3]
    for neither in (word_tokenizer(WORDS, eos=False), slow_tokenizer(WORDS, bos=False), merging_tokenizer()):
        with pytest.raises(DataError, match=r"before the keyword 'red' and the tokenizer has neither a BOS nor an EOS"):
            split(neither, "", "red")


def test_at_the_beginning_of_a_text_no_blank_is_made_up():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(split(tokenizer, "", "vermilion").keyword_ids) == "vermilion"


def test_blanks_around_the_border_make_no_difference():
    tokenizer = byte_tokenizer()
    assert split(tokenizer, PREFIX + " \n", " vermilion ") == split(tokenizer, PREFIX, "vermilion")


def test_a_keyword_without_tokens_is_refused():
    with pytest.raises(DataError, match="keyword after 'the colour of joy is' is empty"):
        split(word_tokenizer(WORDS), PREFIX, " ")
    for prefix in (PREFIX, ""):
        with pytest.raises(DataError, match=r"yields no token for the keyword '\\u200b\\u200b'"):
            split(_deaf_tokenizer(), prefix, "\u200b\u200b")


def _deaf_tokenizer():
    """Drops what it does not know."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}, []))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)
