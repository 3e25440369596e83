import numpy as np
import pytest
import torch
from toy_sources import require_set

from remanence.errors import DataError, SettingError
from remanence.streams import digits, fashion_mnist, known, omniglot


def test_digits_are_what_scikit_learn_ships():
    from sklearn.datasets import load_digits

    source, table = digits(), load_digits()
    assert np.array_equal(source.images[:, 0].numpy() * 16, table.images)
    assert source.labels.tolist() == table.target.tolist()
    for label in source.classes:
        n = int((source.labels == label).sum())
        assert int(source.is_test[source.labels == label].sum()) == round(n / 4)


def test_digits_have_a_stable_fingerprint():
    assert digits().fingerprint() == digits().fingerprint()


def test_omniglot_background():
    require_set("omniglot")
    source = omniglot(n_test_drawers=4)
    assert source.images.shape == (964 * 20, 1, 28, 28)
    assert source.classes == tuple(range(1, 965))
    assert torch.bincount(source.labels[source.is_test])[1:].unique().tolist() == [4]
    assert source.is_test[:20].tolist() == [False] * 16 + [True] * 4  # the last drawers
    assert source.n_labels == 1624
    assert 0 < float(source.images.mean()) < 0.2  # ink is light on 0


def test_omniglot_halves_share_no_class_and_no_row():
    require_set("omniglot")
    first, second = omniglot(alphabets=["Greek"]), omniglot("evaluation", alphabets=["Oriya", "Tibetan"])
    assert set(first.classes).isdisjoint(second.classes)
    assert not torch.isin(first.ids, second.ids).any()
    assert set(first.class_names.values()) == {f"Greek {number}" for number in range(1, 25)}
    whole = omniglot()
    assert torch.equal(whole.images[torch.isin(whole.ids, first.ids)], first.images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "backgrund"}, "Did you mean 'background'"),
        ({"n_test_drawers": 0}, r"lies outside 1\.\.19"),
        ({"n_test_drawers": 20}, r"lies outside 1\.\.19"),
    ],
)
def test_omniglot_refuses_wrong_settings(settings, message):
    with pytest.raises(SettingError, match=message):
        omniglot(**settings)


def test_omniglot_names_the_nearest_alphabet():
    require_set("omniglot")
    with pytest.raises(SettingError, match="Did you mean 'Greek'"):
        omniglot(alphabets=["Grek"])
    with pytest.raises(SettingError, match="'Tibetan' is not in the background split"):
        omniglot(alphabets=["Tibetan"])
    with pytest.raises(SettingError, match="the list is empty"):
        omniglot(alphabets=[])


def test_fashion_mnist_subsets_are_balanced_and_nested():
    require_set("fashion_mnist")
    small, large = fashion_mnist(50, 23), fashion_mnist(400, 100)
    assert torch.bincount(small.train.targets).tolist() == [5] * 10
    assert torch.bincount(small.test.targets).tolist() == [3] * 3 + [2] * 7
    assert torch.isin(small.train.ids, large.train.ids).all()
    assert torch.isin(small.test.ids, large.test.ids).all()
    assert small.class_names[9] == "Ankle boot"
    assert float(small.images.max()) == 1


@pytest.mark.parametrize("settings", [{"n_train": 9}, {"n_train": 60_001}, {"n_test": 10_001}])
def test_fashion_mnist_refuses_impossible_numbers(settings):
    with pytest.raises(SettingError, match="lies outside 10"):
        fashion_mnist(**settings)


def test_an_absent_set_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("REMANENCE_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        omniglot()
    assert str(tmp_path / "omniglot" / "omniglot.npz") in str(caught.value)
    assert "Set REMANENCE_DATA" in str(caught.value)


def test_without_the_variable_the_parents_are_searched(tmp_path, monkeypatch):
    monkeypatch.delenv("REMANENCE_DATA", raising=False)
    deep = tmp_path / "project" / "benchmarks"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    # a wrong file tells that it was found, whatever lies in the folders above
    path = tmp_path / "shared" / "data" / "fashion_mnist" / "fashion_mnist.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not it")
    with pytest.raises(DataError, match="is not the known set 'fashion_mnist'") as caught:
        fashion_mnist()
    assert str(path) in str(caught.value)


def test_another_file_of_that_name_is_refused(tmp_path, monkeypatch):
    (tmp_path / "omniglot").mkdir()
    path = tmp_path / "omniglot" / "omniglot.npz"
    path.write_bytes(b"not it")
    monkeypatch.setenv("REMANENCE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="is not the known set 'omniglot': its sha256 is"):
        omniglot()


def test_the_content_is_hashed_once_per_process(tmp_path, monkeypatch):
    (tmp_path / "omniglot").mkdir()
    path = tmp_path / "omniglot" / "omniglot.npz"
    path.write_bytes(b"")
    monkeypatch.setenv("REMANENCE_DATA", str(tmp_path))
    monkeypatch.setitem(known.SHA256, "omniglot", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    assert known.find_set("omniglot") == path
    monkeypatch.setitem(known.SHA256, "omniglot", "another")
    assert known.find_set("omniglot") == path
