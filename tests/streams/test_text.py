import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict

from remanence.errors import DataError, MissingExtra, SettingError
from remanence.streams import TextSource, python_documentation, text_dataset, text_folder
from remanence.streams._documentation import documentation


def test_a_source_of_text_has_a_stable_fingerprint():
    source = TextSource("pair", ("a", "b"), ("c",))
    assert source.fingerprint() == TextSource("pair", ("a", "b"), ("c",)).fingerprint()
    sides = [(("a", "b"), ("d",)), (("b", "a"), ("c",)), (("ab",), ("c",)), (("a",), ("b", "c"))]
    others = [TextSource("pair", *side) for side in sides] + [TextSource("p", ("a", "b"), ("c",))]
    assert source.fingerprint() not in {other.fingerprint() for other in others}


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ((), ("a",), "has no train documents"),
        (("a",), (), "has no test documents"),
        (("a", b"b"), ("c",), "train document 1 is a bytes, not a str"),
        (("a",), (None,), "test document 0 is a NoneType, not a str"),
        ("a text", ("c",), "train is one str; give a tuple of documents"),
        (("a", "b"), ("c", "b"), "1 documents stand in train and in test; the first begins 'b'"),
    ],
)
def test_a_source_that_is_no_source_is_refused(train, test, message):
    with pytest.raises(DataError, match=re.escape(message)):
        TextSource("s", train, test)


def test_a_list_of_documents_becomes_a_tuple():
    assert TextSource("s", ["a"], ["b"]).train == ("a",)


def test_the_documentation_is_prose_and_each_paragraph_stands_once():
    source = python_documentation()
    texts = source.train + source.test
    assert 500_000 < sum(map(len, texts)) < 1_200_000
    assert len(source.test) == round(0.1 * len(texts))
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert not any(">>>" in paragraph or "\n" in paragraph for paragraph in paragraphs)
    characters = "".join(texts)
    assert sum(letter.isalpha() or letter == " " for letter in characters) > 0.9 * len(characters)
    assert any(text.startswith("The following methods can be defined to customize the meaning of attribute access") for text in texts)
    assert any("Text wrapping" in text or "The public interface consists of the wrap() and fill()" in text for text in texts)


def test_the_documentation_is_read_without_importing_and_alike_in_every_process():
    script = (
        "import sys; from remanence.streams import python_documentation; before = set(sys.modules); "
        "print(python_documentation().fingerprint(), *sorted(set(sys.modules) - before))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True).stdout
    fingerprint, *imported = out.split()
    assert fingerprint == python_documentation().fingerprint()
    # sysconfig, asked for the folder, reads its table of the build
    assert [name for name in imported if not name.startswith("_sysconfigdata")] == ["pydoc_data", "pydoc_data.topics"]


def test_a_larger_share_of_the_documentation_can_be_test():
    source = python_documentation(0.5)
    assert set(source.train + source.test) == set(documentation())
    assert abs(len(source.train) - len(source.test)) <= 1
    with pytest.raises(SettingError, match=r"test_share: 1 lies outside \(0, 1\)"):
        python_documentation(1)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "books"
    (root / "deep").mkdir(parents=True)
    (root / "a.txt").write_text("First.", encoding="utf-8")
    (root / "b.txt").write_bytes("\ufeffZweites, größer.\r\nZeile.".encode())
    (root / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"Third."))
    (root / "note.md").write_text("No text.", encoding="utf-8")
    return root


def test_a_folder_of_text_files(folder):
    source = text_folder(folder, test_share=0.4)
    assert source.name == "books"
    assert set(source.train + source.test) == {"First.", "Zweites, größer.\nZeile.", "Third."}
    assert (len(source.train), len(source.test)) == (2, 1)
    assert source == text_folder(str(folder), test_share=0.4)


def test_equal_and_blank_files_count_once_or_not_at_all(folder):
    before = text_folder(folder)
    (folder / "z.txt").write_text("First.")
    (folder / "y.txt").write_text(" \n")
    assert text_folder(folder) == before


def test_a_pattern_chooses_files(folder):
    (folder / "more.md").write_text("More.", encoding="utf-8")
    source = text_folder(folder, "*.md")
    assert {*source.train, *source.test} == {"No text.", "More."}
    with pytest.raises(DataError, match=re.escape("matches '*.rst' or '*.rst.gz'; give another pattern")):
        text_folder(folder, "*.rst")


def test_files_that_are_no_text_are_named(folder):
    (folder / "bad.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"bad.txt is not UTF-8: byte 3 is 0xe9 \(invalid continuation byte\)"):
        text_folder(folder)
    (folder / "bad.txt").unlink()
    whole = gzip.compress(b"Some text that is long enough to be cut." * 9)
    for content in (b"not packed", whole[:-9], whole[:12] + b"\xff" * 20):
        (folder / "bad.txt.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"bad.txt.gz cannot be read \(.*Repair or remove it"):
            text_folder(folder)


def test_a_folder_that_cannot_be_split_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"there is no folder '.*absent'"):
        text_folder(tmp_path / "absent")
    with pytest.raises(DataError, match="'books' has 1 documents that are not blank and differ; two are needed"):
        text_folder(folder, "a.txt")
    with pytest.raises(SettingError, match=r"test_share: 0 lies outside"):
        text_folder(folder, test_share=0)


ROWS = ["One.", "Two.", "", "Two.", "Three.", "Four."]


def test_a_dataset_on_disk_is_split_by_row(tmp_path):
    Dataset.from_dict({"text": ROWS, "n": range(6)}).save_to_disk(tmp_path / "set")
    source = text_dataset(tmp_path / "set", test_share=0.5)
    assert source.name == "set"
    assert {*source.train, *source.test} == {"One.", "Two.", "Three.", "Four."}
    assert len(source.test) == 2
    assert source == text_dataset(str(tmp_path / "set"), test_share=0.5)


def test_a_dataset_with_a_split_keeps_it(tmp_path):
    sides = {"train": Dataset.from_dict({"body": ROWS}), "test": Dataset.from_dict({"body": ["Five.", "Two.", "Six."]})}
    DatasetDict(sides).save_to_disk(tmp_path / "set")
    source = text_dataset(tmp_path / "set", "body")
    assert source == TextSource("set", ("One.", "Two.", "Three.", "Four."), ("Five.", "Six."))


def test_a_dataset_without_the_text_is_refused(tmp_path):
    Dataset.from_dict({"text": ROWS, "n": range(6)}).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"'set' has no column 'txt'. Did you mean 'text'\? Known here: n, text"):
        text_dataset(tmp_path / "set", "txt")
    with pytest.raises(DataError, match="row 0 of column 'n' is a int, not a str"):
        text_dataset(tmp_path / "set", "n")
    with pytest.raises(DataError, match="is no dataset on disk"):
        text_dataset(tmp_path / "absent")
    with pytest.raises(DataError, match="is no dataset on disk"):
        text_dataset(tmp_path)
    DatasetDict({"train": Dataset.from_dict({"text": ROWS})}).save_to_disk(tmp_path / "half")
    with pytest.raises(DataError, match=r"'half' has the splits \['train'\]; 'train' and 'test' are needed"):
        text_dataset(tmp_path / "half")


def test_without_datasets_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'remanence\[hf\]'"):
        text_dataset(tmp_path)


def test_nothing_here_draws_from_the_global_random_state(folder):
    before = torch.get_rng_state()
    text_folder(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_real_files_are_read():
    root = os.environ.get("REMANENCE_DATA")
    if not root or not (Path(root) / "wikitext2").is_dir():
        pytest.skip("REMANENCE_DATA names no folder with wikitext2")
    source = text_folder(Path(root) / "wikitext2")
    assert (source.name, len(source.train), len(source.test)) == ("wikitext2", 1, 1)
    assert min(len(source.train[0]), len(source.test[0])) > 1_000_000
