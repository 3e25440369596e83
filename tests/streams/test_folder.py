import numpy as np
import pytest
import torch
from PIL import Image

from remanence.errors import DataError, SettingError
from remanence.streams import image_folder, split_classes


def write_image(path, colour=(10, 20, 30), size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def fill(root, counts, prefix=""):
    for number, (name, n) in enumerate(counts.items()):
        for index in range(n):
            write_image(root / prefix / name / f"{index:02}.png", (40 * number, index, 0))
    return root


def test_a_flat_folder_is_split_by_class(tmp_path):
    source = image_folder(str(fill(tmp_path / "pets", {"dog": 8, "cat": 4})), size=4)
    assert source.name == "pets"
    assert source.class_names == {0: "cat", 1: "dog"}
    assert source.images.shape == (12, 3, 4, 4)
    assert [int(source.is_test[source.labels == label].sum()) for label in (0, 1)] == [1, 2]
    assert len(split_classes(source, per_task=1)) == 2


def test_pixels_arrive_unchanged_and_in_order(tmp_path):
    source = image_folder(str(fill(tmp_path / "pets", {"a": 3, "b": 3})), size=8)
    assert (source.images[:, :, 0, 0] * 255).round().tolist() == [[40 * n, i, 0] for n in (0, 1) for i in range(3)]


def test_the_same_folder_elsewhere_is_the_same_source(tmp_path):
    first = image_folder(str(fill(tmp_path / "x" / "pets", {"a": 5, "b": 5})))
    second = image_folder(str(fill(tmp_path / "y" / "pets", {"a": 5, "b": 5})) + "/")
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.is_test, second.is_test)


def test_train_and_test_folders_are_kept(tmp_path):
    root = tmp_path / "set"
    fill(root, {"a": 3, "b": 2}, "train")
    fill(root, {"a": 1, "b": 2}, "test")
    source = image_folder(str(root), size=2, channels=1)
    assert source.images.shape == (8, 1, 2, 2)
    assert torch.bincount(source.train.targets).tolist() == [3, 2]
    assert torch.bincount(source.test.targets).tolist() == [1, 2]


def test_hidden_files_and_other_files_are_skipped(tmp_path):
    root = fill(tmp_path / "set", {"a": 2, "b": 2})
    (root / "a" / ".hidden.png").write_bytes(b"broken")
    (root / "a" / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    (root / "readme.md").write_text("no class")
    assert len(image_folder(str(root))) == 4


def test_all_broken_files_are_named_at_once(tmp_path):
    root = fill(tmp_path / "set", {"a": 3, "b": 3})
    (root / "a" / "01.png").write_bytes(b"not an image")
    whole = (root / "b" / "02.png").read_bytes()
    (root / "b" / "02.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="2 of 6 images") as caught:
        image_folder(str(root))
    assert "a/01.png" in str(caught.value)
    assert "b/02.png" in str(caught.value)


def test_many_broken_files_are_counted_and_ten_listed(tmp_path):
    root = fill(tmp_path / "set", {"a": 2, "b": 2})
    for index in range(12):
        (root / "a" / f"x{index:02}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"12 of 16 images .* and 2 more") as caught:
        image_folder(str(root))
    assert "x09.jpg" in str(caught.value)
    assert "x10.jpg" not in str(caught.value)


def test_resize_by_the_shorter_side_and_crop_to_the_centre(tmp_path):
    stripes = np.zeros((10, 30, 3), dtype=np.uint8)
    stripes[:, 10:20] = 255
    for name in ("a", "b"):
        fill(tmp_path / "set", {name: 1})
        Image.fromarray(stripes).save(tmp_path / "set" / name / "wide.png")
    source = image_folder(str(tmp_path / "set"), size=10)
    wide = source.images[1]
    assert torch.equal(wide, torch.ones(3, 10, 10))


@pytest.mark.parametrize("channels", [1, 3])
def test_odd_modes_are_read(tmp_path, channels):
    root = fill(tmp_path / "set", {"a": 2, "b": 2})
    Image.fromarray(np.full((8, 8), 65535 // 2, dtype=np.uint16)).save(root / "a" / "deep.png")
    write_image(root / "a" / "clear.png", (0, 0, 0, 0), mode="RGBA")
    write_image(root / "a" / "print.jpg", (0, 0, 0, 0), mode="CMYK")
    write_image(root / "b" / "bits.png", 1, mode="1")
    Image.new("P", (8, 8), 0).save(root / "b" / "palette.gif", transparency=0)
    source = image_folder(str(root), channels=channels)
    means = source.images.mean((1, 2, 3))
    assert [round(float(means[row]), 1) for row in (2, 3, 4)] == [1.0, 0.5, 1.0]  # clear, deep, print
    assert [round(float(means[row]), 1) for row in (7, 8)] == [1.0, 1.0]  # bits, palette


def test_photographs_are_turned_upright(tmp_path):
    root = fill(tmp_path / "set", {"a": 2, "b": 2})
    picture = Image.new("L", (8, 8), 0)
    picture.paste(255, (0, 0, 8, 4))
    marks = Image.Exif()
    marks[0x0112] = 3  # upside down
    picture.save(root / "a" / "x.png", exif=marks)
    upright = image_folder(str(root), size=8, channels=1).images[2, 0]
    assert (upright[0, 0], upright[7, 0]) == (0, 1)


def test_max_per_class_is_a_fixed_choice_with_stable_ids(tmp_path):
    root = str(fill(tmp_path / "set", {"a": 9, "b": 3}))
    few, again, whole = image_folder(root, max_per_class=4), image_folder(root, max_per_class=4), image_folder(root)
    assert torch.bincount(few.labels).tolist() == [4, 3]
    assert torch.equal(few.ids, again.ids)
    assert torch.equal(whole.images[torch.isin(whole.ids, few.ids)], few.images)


def test_a_missing_folder(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        image_folder(str(tmp_path / "nowhere"))


def test_fewer_than_two_classes(tmp_path):
    with pytest.raises(DataError, match=r"holds 1 class folders \(a\)"):
        image_folder(str(fill(tmp_path / "set", {"a": 2})))
    with pytest.raises(DataError, match=r"holds 0 class folders \(none\)"):
        image_folder(str(tmp_path / "set" / "a"))


def test_an_empty_class(tmp_path):
    root = fill(tmp_path / "set", {"a": 2, "b": 2})
    (root / "c").mkdir()
    with pytest.raises(DataError, match=r"1 class folders in .* hold no images \(c\)"):
        image_folder(str(root))


def test_a_class_with_one_image_cannot_be_split(tmp_path):
    with pytest.raises(DataError, match=r"1 classes in .* have one image only \(b\)"):
        image_folder(str(fill(tmp_path / "set", {"a": 2, "b": 1})))


@pytest.mark.parametrize(("lonely", "other"), [("test", "train"), ("train", "test")])
def test_a_class_on_one_side_only(tmp_path, lonely, other):
    root = tmp_path / "set"
    fill(root, {"a": 2, "b": 2, "c": 2}, lonely)
    fill(root, {"a": 2, "b": 2}, other)
    with pytest.raises(DataError, match=rf"1 classes stand in .*{lonely} but not in .*{other} \(c\)"):
        image_folder(str(root))


@pytest.mark.parametrize("settings", [{"size": 0}, {"channels": 2}, {"test_share": 0.0}, {"test_share": 1.0}, {"max_per_class": 1}])
def test_wrong_settings(tmp_path, settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        image_folder(str(tmp_path), **settings)
