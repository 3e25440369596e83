import gzip
import json
import os
from pathlib import Path

import pytest

from remanence.errors import DataError, SettingError
from remanence.facts import read_pararel

PATTERNS = [
    ("born", "[X] was born in [Y]."),
    ("born", "[X] was born in [Y]"),  # the same question
    ("born", "[X], native to [Y],"),
    ("born", "[Y] is where [X] was born."),
    ("born", "[X] has [Y] for a birthplace."),
    ("born", "The birthplace of [X] is [Y] ."),
    ("owned", "[X] is owned by [Y]."),
    ("owned", "[Y] owns [X]."),
    ("owned", "The owner of [X]: [Y]."),
    ("single", "[X] is part of [Y]."),
    ("front", "[Y] made [X]."),
    ("front", "[X] ('[Y]')."),
]
CITIES = ["Rome", "Paris", "Oslo", "Quito"]
TRIPLES = [
    *[("born", f"Person {number}", CITIES[number % 4]) for number in range(12)],
    ("born", "Person 0", "Paris"),  # a second answer
    ("born", "Person 1", "Paris"),  # stands there twice
    *[("owned", f"Thing {number}", ["Acme", "Bolt"][number % 2]) for number in range(8)],
    ("owned", "Acme Rocket", "Acme"),
    *[("single", f"Part {number}", "Whole") for number in range(4)],
    *[("front", f"Work {number}", "Maker") for number in range(4)],
]


@pytest.fixture
def folder(tmp_path):
    rows = {"patterns": [{"relation": name, "pattern": pattern} for name, pattern in PATTERNS]}
    rows["triples"] = [{"relation": name, "subject": subject, "object": object_, "uuid": "u"} for name, subject, object_ in TRIPLES]
    for stem, records in rows.items():
        (tmp_path / f"{stem}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def true_objects(subject):
    return {object_ for _, other, object_ in TRIPLES if other == subject}


def test_one_pattern_is_injected_and_the_others_ask_for_it(folder):
    facts = read_pararel(folder, ["born"], n_facts=4, n_prefixes=6)
    forms = {"{} was born in", "{}, native to", "The birthplace of {} is"}
    assert len({fact.extra["pattern"] for fact in facts}) > 1
    for fact in facts:
        assert (fact.theme, fact.kind, fact.extra["n_patterns_left_out"]) == ("born", "known", 2)
        assert fact.keyword == next(object_ for _, subject, object_ in TRIPLES if subject == fact.subject)
        assert fact.text == fact.extra["pattern"].replace("[X]", fact.subject).replace("[Y]", fact.keyword)
        asked = {prefix.prefix for prefix in facts.paraphrases(fact)}
        assert asked | {fact.prompt} == {form.format(fact.subject) for form in forms}
        assert fact.prompt not in asked


def test_priming_prefixes_are_about_other_subjects(folder):
    facts = read_pararel(folder, n_facts=6, n_prefixes=6)
    assert facts.themes == ("born", "owned")  # the others have one usable pattern or none
    assert [fact.theme for fact in facts] == ["born", "owned"] * 3
    subjects = {fact.subject for fact in facts}
    for fact in facts:
        priming = facts.priming_prefixes(fact)
        assert len({prefix.prefix for prefix in priming}) == 6
        assert not subjects & {prefix.subject for prefix in priming}
        assert len({prefix.subject for prefix in priming}) == 6  # as many subjects as there are, before one comes twice
    assert len({prefix.id for prefix in facts.prefixes}) == len(facts.prefixes)


def test_swapped_objects_are_of_the_relation_and_wrong(folder):
    facts = read_pararel(folder, ["born"], n_facts=9, n_prefixes=3, counterfactual=True)
    assert {fact.kind for fact in facts} == {"outlandish"}
    assert len({fact.keyword for fact in facts}) > 2
    for fact in facts:
        assert fact.keyword in CITIES
        assert fact.keyword not in true_objects(fact.subject)
        assert fact.extra["true_object"] in true_objects(fact.subject)


def test_answers_that_stand_in_the_question_are_left_out(folder):
    for counterfactual in (False, True):
        facts = [fact for seed in range(5) for fact in read_pararel(folder, ["owned"], 5, seed, counterfactual, n_prefixes=2)]
        assert not [fact for fact in facts if fact.keyword in fact.prompt]
        assert ("Acme Rocket" in {fact.subject for fact in facts}) is counterfactual  # owned by Bolt


def test_a_relation_of_one_pattern_comes_by_name_only(folder):
    facts = read_pararel(folder, ["single"], n_facts=2, n_prefixes=2)
    assert [facts.paraphrases(fact) for fact in facts] == [(), ()]
    with pytest.raises(DataError, match=r"1 relations of .* give 0 facts, not 2"):  # there is no other whole
        read_pararel(folder, ["single"], n_facts=2, n_prefixes=2, counterfactual=True)


def test_seeds_and_counts(folder):
    facts = read_pararel(folder, n_facts=6, n_prefixes=3)
    assert facts == read_pararel(folder, n_facts=6, n_prefixes=3)
    assert facts.facts != read_pararel(folder, n_facts=6, n_prefixes=3, seed=1).facts
    assert facts.facts == read_pararel(folder, n_facts=9, n_prefixes=3).facts[:6]


def test_packed_files(folder):
    facts = read_pararel(folder, n_facts=6, n_prefixes=3)
    for path in list(folder.iterdir()):
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert read_pararel(folder, n_facts=6, n_prefixes=3) == facts


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"relations": ["bron"]}, SettingError, r"no relation 'bron'. Did you mean 'born'\?"),
        ({"relations": ["front"]}, DataError, "relation 'front': in none of its 2 patterns the object stands last"),
        ({"n_facts": 0}, SettingError, "n_facts=0 and n_prefixes=40 must be 1 or more"),
        ({"n_prefixes": 0}, SettingError, "n_prefixes=0"),
        ({"n_facts": 99}, DataError, r"2 relations of .* give 20 facts, not 99; ask for fewer"),
        ({"relations": ["born"], "n_facts": 8}, DataError, "4 subjects without a fact and 3 patterns give 12 priming prefixes, not 40"),
    ],
)
def test_what_cannot_be_had_is_said(folder, settings, error, message):
    with pytest.raises(error, match=message):
        read_pararel(folder, **settings)


def test_broken_files(folder):
    (folder / "triples.jsonl").write_text('{"relation": "born", "subject": "A", "object": "Rome"}\n{"relation": "born", "subject": 3}\n')
    with pytest.raises(DataError, match=r"triples\.jsonl, line 2: each of relation, subject, object must hold text; the record begins"):
        read_pararel(folder)
    (folder / "patterns.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"patterns\.jsonl, line 1: broken JSON"):
        read_pararel(folder)
    (folder / "patterns.jsonl").unlink()
    with pytest.raises(DataError, match=r"there is no file .*patterns\.jsonl; beside it lie triples\.jsonl"):
        read_pararel(folder)


@pytest.mark.parametrize("counterfactual", [False, True])
def test_the_real_data(counterfactual):
    if "REMANENCE_DATA" not in os.environ or not (folder := Path(os.environ["REMANENCE_DATA"]) / "pararel").is_dir():
        pytest.skip("REMANENCE_DATA names no folder with pararel")
    facts = read_pararel(folder, n_facts=200, counterfactual=counterfactual)
    assert len(facts) == 200
    assert len(facts.themes) == 35  # of 39 with patterns; P1001, P140, P190 and P37 have one usable pattern each
    assert sum(fact.extra["n_patterns_left_out"] for fact in facts[:35]) == 98
    for fact in facts:
        assert len(facts.priming_prefixes(fact)) == 40
        assert facts.paraphrases(fact)
        assert fact.keyword.lower() not in fact.prompt.lower()
        assert (fact.keyword == fact.extra["true_object"]) is not counterfactual
