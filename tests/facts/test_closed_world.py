"""The closed world: a pure function of its seed; every kind is what its name says."""

import pytest

from remanence.errors import SettingError
from remanence.facts._world_words import N_FREQUENT, N_MIDDLE, THEMES
from remanence.facts.world import closed_world


@pytest.fixture(scope="module")
def world():
    return closed_world(seed=3, n_sentences=1500)


def test_the_same_seed_gives_the_same_world(world):
    again = closed_world(seed=3, n_sentences=1500)
    assert again.fingerprint() == world.fingerprint()
    assert again.facts("outlandish", 8) == world.facts("outlandish", 8)
    assert closed_world(seed=4, n_sentences=1500).attributes != world.attributes


def test_the_corpus_states_only_what_is_true_of_people(world):
    corpus = " ".join(world.documents(1500, "train"))
    for person in world.people[:8]:
        for theme, words in THEMES.items():
            stated = {keyword for keyword in words.keywords if words.person[1].format(s=person, k=keyword) in _unhinted(corpus)}
            assert stated <= {world.attributes.get((person, theme))}


def _unhinted(corpus):
    """The corpus without the sentences that a hint makes true for once."""
    sentences = corpus.split(". ")
    pairs = zip(["", *sentences], sentences, strict=False)
    return ". ".join(sentence for before, sentence in pairs if not before.startswith("Since yesterday")) + "."


def test_kinds_are_what_they_say(world):
    for fact in world.facts("mundane", 8):
        assert (fact.subject, fact.theme) not in world.attributes
        assert fact.keyword in THEMES[fact.theme].keywords[:N_FREQUENT]
    for fact in world.facts("outlandish", 40):
        assert world.attributes[fact.subject, fact.theme] != fact.keyword
        assert fact.keyword in THEMES[fact.theme].keywords[N_FREQUENT + N_MIDDLE :]
        assert fact.stone.endswith(fact.text)
        assert fact.keyword not in fact.stone.removesuffix(fact.text)
    for plain, scrambled in zip(world.facts("outlandish", 8), world.facts("scrambled", 8), strict=True):
        assert sorted(plain.prompt.split()) == sorted(scrambled.prompt.split())
        assert plain.prompt != scrambled.prompt
        assert plain.keyword == scrambled.keyword
    assert all(world.attributes[fact.subject, fact.theme] == fact.keyword for fact in world.known())


def test_themes_come_in_turn_and_keywords_differ(world):
    facts = world.facts("outlandish", 8)
    assert [fact.theme for fact in facts] == [*THEMES, *THEMES]
    assert len({(fact.theme, fact.keyword) for fact in facts}) == 8


def test_priming_prefixes_never_answer_with_an_injected_keyword(world):
    facts = world.facts("outlandish", 8)
    for theme, words in THEMES.items():
        assert len(world.prefixes(theme)) == 12
        things = {thing for pair in words.things[N_FREQUENT : N_FREQUENT + N_MIDDLE] for thing in pair}
        assert sum(any(thing in prefix.prefix.split() for thing in things) for prefix in world.prefixes(theme)) == 8
    assert all(len(facts.priming_prefixes(fact)) == 12 and len(facts.paraphrases(fact)) == 3 for fact in facts)


def test_the_later_stream_is_silent_about_the_facts_subjects(world):
    facts = world.facts("outlandish", 8)
    silent = " ".join(world.continuing(facts, 800).train)
    spoken = " ".join(world.continuing(facts, 800, rehearse_truth=True).train)
    subjects = [fact.subject for fact in facts]
    assert not any(f" {subject} " in silent for subject in subjects)
    assert any(f" {subject} " in spoken for subject in subjects)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda world: closed_world(n_people=4), "n_people=4 lies outside 8..60"),
        (lambda world: closed_world(n_sentences=0), "n_sentences=0 must be above 0"),
        (lambda world: world.facts("odd", 1), "'odd' is no kind of fact"),
        (lambda world: world.facts("mundane", 99), "99 facts of kind 'mundane' were asked for"),
    ],
)
def test_bad_settings_are_refused(world, call, message):
    with pytest.raises(SettingError, match=message):
        call(world)
