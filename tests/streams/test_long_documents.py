import gzip
import hashlib
import json
import platform

import pytest
import torch
from toy_sources import require_set

from remanence.errors import DataError, SettingError
from remanence.streams import books, byte_ids, known, python_sources


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A local set of five books of two chapters."""
    records = [{"slug": f"b{n}", "chapters": [{"id": "1", "text": f"# One of {n}"}, {"id": "2", "text": "Fin."}]} for n in range(5)]
    path = tmp_path / "books" / "books.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    monkeypatch.setenv("REMANENCE_DATA", str(tmp_path))
    monkeypatch.setitem(known.SHA256, "books", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_books_are_split_by_book(shelf):
    source = books(n_test=2)
    assert source.name == "books"
    assert (len(source.train), len(source.test)) == (3, 2)
    assert sorted(source.train + source.test) == [f"# One of {n}\n\nFin." for n in range(5)]
    assert books(n_test=2) == source
    assert len({books(n_test=2, seed=seed).test for seed in range(8)}) > 1


@pytest.mark.parametrize("n_test", [0, 5])
def test_both_sides_need_a_book(shelf, n_test):
    with pytest.raises(SettingError, match=f"books: n_test={n_test} of 5 documents; train and test need one each"):
        books(n_test=n_test)


def test_an_absent_shelf_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("REMANENCE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"the set 'books' is not on this machine; .*Set REMANENCE_DATA .* holds books/books\.jsonl\.gz"):
        books()


def test_another_file_is_refused(shelf):
    shelf.write_bytes(shelf.read_bytes() + b"\0")
    with pytest.raises(DataError, match="is not the known set 'books'"):
        known._check_sha256.__wrapped__("books", shelf)


def test_the_books_themselves():
    require_set("books")
    source = books()
    texts = source.train + source.test
    assert (len(source.train), len(source.test)) == (28, 8)
    assert min(map(len, texts)) > 140_000
    assert 34_000_000 < sum(map(len, texts)) < 36_000_000
    assert sum("Call me Ishmael." in text for text in texts) == 1


def test_python_sources_are_long_and_distinct():
    source = python_sources()
    texts = source.train + source.test
    assert source.name == f"Python {platform.python_version()} sources"
    assert len(source.test) == 8
    assert len(texts) > 30
    assert min(len(text.encode()) for text in texts) >= 30_000
    assert len(set(texts)) == len(texts)
    assert not any("decoding_table" in text and "encoding_map" in text for text in texts)
    assert python_sources().fingerprint() == source.fingerprint()
    assert set(python_sources(seed=1).test) != set(source.test)


def test_python_sources_of_another_size():
    larger = python_sources(min_bytes=80_000, n_test=2)
    assert set(larger.train + larger.test) < set(python_sources().train + python_sources().test)
    with pytest.raises(SettingError, match=r"n_test=8 of 0 documents;.*a lower min_bytes"):
        python_sources(min_bytes=10**9)


@pytest.mark.parametrize("text", ["", "plain", "na\u00efve \u201cquotes\u201d \U0001f600", "a\nb\0c", "lone \ud800"])
def test_byte_ids_are_the_bytes(text):
    ids = byte_ids(text)
    assert ids.dtype == torch.int64
    assert bytes(ids.tolist()).decode("utf-8", "surrogatepass") == text
