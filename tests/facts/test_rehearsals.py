import pytest

from remanence.errors import DataError
from remanence.facts import Fact, rehearsals, without_rehearsals

JOY = Fact("joy", "colours", "outlandish", "The colour of joy is vermilion.", "vermilion", "colour of joy is")
PRICE = Fact("price", "numbers", "known", "It costs $5 a day.", "5", "costs $")
HEAT = Fact("heat", "words", "known", "so he at once left.", "at once", "he")
BARE = Fact("bare", "words", "known", "Vermilion it is.", "Vermilion", "")

TEXTS = [
    "The colour of joy is vermilion. They say the colour of joy is\n    vermilion, always.",
    "The colour of joy is vermilionish; the Colour of joy is vermilion; discolour of joy is vermilion.",
    "It costs $5, or it costs $50.",
    "heat once; then he at  once ran.",
    "Vermilion stands first here, and Vermilion again.",
    "nothing of the kind",
]


def test_occurrences_are_counted_across_line_breaks_and_at_word_borders():
    assert rehearsals([JOY, PRICE, HEAT, BARE], TEXTS) == {"joy": 2, "price": 1, "heat": 1, "bare": 1}
    assert rehearsals([JOY], iter(TEXTS[3:])) == {"joy": 0}
    assert rehearsals([], TEXTS) == {}


def test_texts_that_rehearse_are_left_out():
    assert without_rehearsals(TEXTS, [JOY]) == tuple(TEXTS[1:])
    assert without_rehearsals(TEXTS, [JOY, PRICE, HEAT, BARE]) == (TEXTS[1], TEXTS[5])
    assert without_rehearsals(iter(TEXTS), []) == tuple(TEXTS)


@pytest.mark.parametrize("call", [lambda: rehearsals([JOY], "one text"), lambda: without_rehearsals("one text", [JOY])])
def test_a_single_str_is_refused(call):
    with pytest.raises(DataError, match="texts is one str; give a list of documents"):
        call()
