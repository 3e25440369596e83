import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remanence.errors import DataError, SettingError
from remanence.facts import Fact, FactSet, Prefix, read, write

RECORD = {"id": "c1", "theme": "colours", "kind": "outlandish", "text": "joy is vermilion.", "keyword": "vermilion", "context": "joy is"}


def lines(path, *records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records), encoding="utf-8")
    return path


def some_facts():
    return FactSet(
        (
            Fact("c1", "colours", "outlandish", "joy is vermilion.", "vermilion", "joy is", "joy", "joy, like cinnabar, is vermilion."),
            Fact("2", "places", "mundane", 'la "ville"\r\nde, été\u2028 est\nÉvian', "Évian", 'la "ville"\r\nde, été\u2028 est'),
            Fact("c3", "", "", "vermilion", "vermilion", "", extra={"page": 3, "notes": ["a", None], "text": "other", "extra": {"x": 1.5}}),
        ),
        (Prefix("colours", "sand is"), Prefix("places", "she lives, alone, in", "p2", "she", {"source": "me", "n": 1})),
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".jsonl.gz", ".csv.gz", ".CSV"])
def test_what_is_written_is_read(tmp_path, suffix):
    facts, path, prefixes = some_facts(), tmp_path / f"facts{suffix}", tmp_path / f"prefixes{suffix}"
    assert read(write(facts, path, prefixes), prefixes) == facts
    first = path.read_bytes()
    write(facts, path, prefixes)
    assert path.read_bytes() == first
    assert sorted(tmp_path.iterdir()) == sorted([path, prefixes])


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_an_empty_set_survives(tmp_path, suffix):
    assert read(write(FactSet(()), tmp_path / f"none{suffix}")) == FactSet(())


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
LEAVES = st.none() | st.booleans() | st.integers() | WORDS
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(WORDS, inner), max_leaves=4)


@given(theme=WORDS, context=WORDS, subject=WORDS, extra=st.dictionaries(WORDS, JSON, max_size=3))
def test_any_fact_survives_both_formats(tmp_path_factory, theme, context, subject, extra):
    folder = tmp_path_factory.mktemp("facts")
    facts = FactSet((Fact("a", theme, "k", f"{context} red", "red", context, subject, extra=extra),), (Prefix(theme, "x" + context),))
    for suffix in (".jsonl", ".csv"):
        assert read(write(facts, folder / f"f{suffix}", folder / f"p{suffix}"), folder / f"p{suffix}") == facts


def test_jsonl_has_unknown_fields_as_its_own_and_is_readable(tmp_path):
    path = lines(tmp_path / "f.jsonl", {**RECORD, "page": 3, "subject": None}, "", {**RECORD, "id": 7})
    facts = read(path)
    assert facts[0].extra == {"page": 3}
    assert (facts[0].subject, facts[1].id) == ("", "7")
    text = write(some_facts().where(lambda fact: fact.id == "2"), tmp_path / "g.jsonl", tmp_path / "p.jsonl").read_text(encoding="utf-8")
    assert "Évian" in text
    assert json.loads(text).keys() == {"id", "theme", "kind", "text", "keyword", "context"}


def test_csv_from_a_spreadsheet(tmp_path):
    path = tmp_path / "f.csv"
    rows = "id,theme,kind,text,keyword,context,page\r\n1,colours,known,sand is yellow,yellow,sand is,9\r\n"
    path.write_text("\ufeff" + rows, encoding="utf-8", newline="")
    assert read(path).facts == (Fact("1", "colours", "known", "sand is yellow", "yellow", "sand is", extra={"page": "9"}),)
    path.write_text(rows.replace("page", "extra"), encoding="utf-8", newline="")
    assert read(path)[0].extra == {"extra": "9"}
    path.write_text(rows.replace("page", "extra").replace(",9", ",see there"), encoding="utf-8", newline="")
    assert read(path)[0].extra == {"extra": "see there"}


def test_a_file_with_other_columns(tmp_path):
    record = {"id": "o1", "group": "colours", "category": "fiction", "passage": "joy is vermilion.", "key": "vermilion", "before": "joy is"}
    path = lines(tmp_path / "o.jsonl", {**record, "text": "of another kind"})
    columns = {"theme": "group", "kind": "category", "text": "passage", "keyword": "key", "context": "before"}
    facts = read(path, columns=columns)
    assert facts[0] == Fact("o1", "colours", "fiction", "joy is vermilion.", "vermilion", "joy is", extra={"text": "of another kind"})
    assert read(write(facts, tmp_path / "ours.jsonl")) == facts
    with pytest.raises(DataError, match=r"Line 1: the field 'prompt' is missing; there are id, group, .* begins 'joy is vermilion.'"):
        read(path, columns=columns | {"context": "prompt"})
    with pytest.raises(SettingError, match=r"facts have no field 'keywrd'. Did you mean 'keyword'\?"):
        read(path, columns={"keywrd": "key"})


BROKEN = {
    "json": ('{"id": "c1", "theme"', "broken JSON .* the line begins '{\"id\": \"c1\", \"theme\"'"),
    "list": ("[1, 2]", r"not a JSON object; the line begins '\[1, 2\]'"),
    "missing": ({name: value for name, value in RECORD.items() if name != "keyword"}, "'keyword' is missing; .*begins 'joy is vermilion.'"),
    "null": (RECORD | {"theme": None}, "the field 'theme' is missing"),
    "number": (RECORD | {"keyword": 3}, "the field 'keyword' holds 3, not text; the text begins 'joy is vermilion.'"),
    "text": (RECORD | {"text": ["joy"]}, "the field 'text' holds .* the record begins"),
    "absent": (RECORD | {"keyword": "blue"}, "'blue' is absent from the text; the text begins 'joy is vermilion.'"),
    "gap": (RECORD | {"context": "joy"}, "does not stand right after the context"),
    "long": (RECORD | {"text": "x" * 99}, f"begins '{'x' * 60}'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_lines_are_named(tmp_path, name):
    line, message = BROKEN[name]
    path = lines(tmp_path / "f.jsonl", RECORD, "", line)
    with pytest.raises(DataError, match=rf"f\.jsonl: 1 of 2 records cannot be read as facts\. Line 3: .*{message}"):
        read(path)


def test_the_first_three_of_many_are_named(tmp_path):
    path = lines(tmp_path / "f.jsonl", *["{"] * 5, RECORD)
    with pytest.raises(DataError, match=r"5 of 6 records .* Line 1: .* Line 2: .* Line 3: ") as caught:
        read(path)
    assert "Line 4" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,colours,known,joy is red,red,joy is,more", "Line 4: 7 cells under 6 columns; the line begins 'a'"),
        ("a,colours,known,joy is red,red", "Line 4: the field 'context' is missing"),
        ("a,colours,known,joy is red,blue,joy is", "Line 4: .*'blue' is absent"),
    ],
)
def test_broken_rows_are_named_by_the_line_they_begin_on(tmp_path, rows, message):
    path = tmp_path / "f.csv"
    path.write_text(f'id,theme,kind,text,keyword,context\nb,colours,known,"joy\nis red",red,is\n{rows}')
    with pytest.raises(DataError, match=message):
        read(path)


def test_a_cell_too_long_for_csv(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text("id,theme,kind,text,keyword,context\n" + "x" * 140_000)
    with pytest.raises(DataError, match=r"Line 2: broken CSV \(field larger"):
        read(path)


def test_repeated_ids_and_columns(tmp_path):
    with pytest.raises(DataError, match="Line 3: the id 'c1' stands on line 1 already"):
        read(lines(tmp_path / "f.jsonl", RECORD, RECORD | {"id": "d"}, RECORD))
    path = tmp_path / "f.csv"
    path.write_text("id,text,text\n")
    with pytest.raises(DataError, match=r"the columns \['text'\] occur twice"):
        read(path)


def test_broken_prefixes(tmp_path):
    facts = lines(tmp_path / "f.jsonl", RECORD)
    with pytest.raises(DataError, match=r"1 of 2 records cannot be read as prefixes. Line 2: the field 'theme' .* begins 'sand is'"):
        read(facts, lines(tmp_path / "p.jsonl", {"theme": "colours", "prefix": "sand is"}, {"prefix": "sand is"}))
    with pytest.raises(DataError, match=r"Line 1: a prefix of theme 'colours' .* is empty"):
        read(facts, lines(tmp_path / "p.jsonl", {"theme": "colours", "prefix": ""}))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(DataError, match=r"there is no file .*f\.jsonl; beside it lie other\.txt"):
        read(tmp_path / "f.jsonl")
    with pytest.raises(DataError, match="beside it lie no files"):
        read(tmp_path / "nowhere" / "f.jsonl")
    with pytest.raises(DataError, match=r"other\.txt: the name ends on none of \.jsonl, \.csv"):
        read(tmp_path / "other.txt")
    (tmp_path / "latin.csv").write_bytes("été".encode("latin-1"))
    (tmp_path / "plain.csv.gz").write_bytes(b"id,theme")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"id,theme" * 99)[:30])
    (tmp_path / "folder.csv").mkdir()
    for name in ("latin.csv", "plain.csv.gz", "cut.csv.gz", "folder.csv"):
        with pytest.raises(DataError, match=f"{name} cannot be read as UTF-8 text"):
            read(tmp_path / name)


def test_nothing_is_written_by_halves(tmp_path):
    facts = some_facts()
    with pytest.raises(SettingError, match=r"the set has 2 prefixes and no file to write them to"):
        write(facts, tmp_path / "f.jsonl")
    with pytest.raises(SettingError, match="would both go to"):
        write(facts, tmp_path / "f.jsonl", tmp_path / "f.jsonl")
    with pytest.raises(DataError, match="ends on none of"):
        write(facts, tmp_path / "f.jsonl", tmp_path / "p.txt")
    for value in ((1, 2), {3: "a"}, {"a"}):
        odd = FactSet((Fact("a", "t", "k", "x y", "y", "x", extra={"odd": value}),))
        with pytest.raises(DataError, match=r"extra field 'odd' of the fact 'a' holds .* which JSON cannot give back"):
            write(odd, tmp_path / "f.jsonl")
    with pytest.raises(DataError, match="extra field 'odd' of the prefix 'sand is'"):
        write(FactSet((), (Prefix("t", "sand is", extra={"odd": object()}),)), tmp_path / "f.jsonl", tmp_path / "p.jsonl")
    assert list(tmp_path.iterdir()) == []
