import pytest

from remanence.errors import DataError
from remanence.facts import Fact, FactSet, Prefix


def fact(name="a", theme="colours", subject="", text="the colour of joy is vermilion.", keyword="vermilion", context="colour of joy is"):
    return Fact(name, theme, "outlandish", text, keyword, context, subject)


def test_prompt_and_place_of_the_keyword():
    made = fact()
    assert made.prompt == "the colour of joy is"
    assert made.text[made.keyword_at :] == "vermilion."


def test_the_last_occurrence_is_probed():
    twice = fact(text="joy is red and once more joy is red", keyword="red", context="joy is")
    assert twice.prompt == "joy is red and once more joy is"


def test_an_empty_context_means_the_beginning():
    assert fact(text="Vermilion it is", keyword="Vermilion", context="").prompt == ""
    with pytest.raises(DataError, match="does not stand right after"):
        fact(text="It is vermilion", context="")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keyword": ""}, "the keyword '' is empty or has blanks"),
        ({"keyword": "red "}, "the keyword 'red ' is empty or has blanks"),
        ({"keyword": "blue"}, r"fact 'a': the keyword 'blue' is absent from the text; the text begins 'the colour of joy is vermilion.'"),
        ({"context": "the colour of"}, "does not stand right after the context"),
        ({"keyword": "vermil", "context": "joy is"}, "does not stand right after the context"),
    ],
)
def test_a_misplaced_keyword_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        fact(**changes)


def test_empty_prefixes_are_refused():
    with pytest.raises(DataError, match=r"a prefix of theme 'colours' \(id 'p'\) is empty"):
        Prefix("colours", " ", "p")


def test_ids_are_unique():
    with pytest.raises(DataError, match=r"1 ids of facts occur more than once \(first three: \['a'\]\)"):
        FactSet((fact(), fact()))


def prefixed():
    facts = (fact("a", subject="joy"), fact("b", subject="rage"), fact("c", theme="jobs", subject="joy"))
    prefixes = (
        Prefix("colours", "sand is"),
        Prefix("colours", "joy looks", subject="joy"),
        Prefix("colours", "rage looks", subject="rage"),
        Prefix("colours", "grass is", subject="grass"),
        Prefix("jobs", "she works as a"),
    )
    return FactSet(facts, prefixes)


def test_prefixes_that_ask_for_a_fact_are_no_priming_prefixes_of_any():
    facts = prefixed()
    for one in facts[:2]:
        assert [prefix.prefix for prefix in facts.priming_prefixes(one)] == ["sand is", "grass is"]
    assert [prefix.prefix for prefix in facts.paraphrases(facts[0])] == ["joy looks"]
    assert [prefix.prefix for prefix in facts.priming_prefixes(facts[2])] == ["she works as a"]
    assert facts.paraphrases(facts[2]) == ()


@pytest.mark.parametrize("part", [lambda facts: facts[1:], lambda facts: facts.where(lambda one: one.id != "a")])
def test_a_part_is_measured_by_the_probes_of_the_whole(part):
    whole = prefixed()
    some = part(whole)
    assert [one.id for one in some] == ["b", "c"]
    for one in some:
        assert some.priming_prefixes(one) == whole.priming_prefixes(one)
        assert some.paraphrases(one) == whole.paraphrases(one)
    assert "joy looks" not in [prefix.prefix for prefix in some.prefixes]


def test_themes_and_indices():
    facts = prefixed()
    assert facts.themes == ("colours", "jobs")
    assert (len(facts), facts[1].id, [one.id for one in facts]) == (3, "b", ["a", "b", "c"])


def test_facts_with_unknown_fields_can_be_hashed():
    assert len({Fact("a", "t", "k", "x y", "y", "x", extra={"page": 3}), fact(), fact()}) == 2
