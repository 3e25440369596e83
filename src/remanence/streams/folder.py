"""Any folder of images by class, read into a Source."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from remanence.errors import DataError, SettingError
from remanence.keys import generator
from remanence.streams.source import Source, draw_share
from remanence.task import example_ids

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
N_LISTED = 10


@dataclass(frozen=True)
class _File:
    path: Path
    row: int
    label: int
    is_test: bool


def image_folder(
    path: str, size: int = 32, channels: int = 3, test_share: float = 0.25, max_per_class: int | None = None
) -> Source:
    """The images of a folder: `path/CLASS/*`, or `path/train/CLASS/*` with `path/test/CLASS/*`.

    Classes are the sub-folders, labelled by sorted name. Without train and test folders a fixed split is drawn from the
    folder's name and the class's label. Hidden files and files that are no images by their suffix are skipped, and so are
    folders beside train and test. Every image is turned upright by its EXIF mark, put on white where it is
    transparent, resized by its shorter side, cropped to the centre square, and held in memory (4 bytes a number).

    Args:
        path: the folder; "~" is understood. Its name becomes the source's name.
        size: pixels per side, 1 or more.
        channels: 3 for colour, 1 for grey.
        test_share: share of each class that is test, in (0, 1); only used where there are no train and test folders.
        max_per_class: read at most so many images of a class folder, a fixed choice; None reads all.

    Raises:
        SettingError: a setting is not as said above.
        DataError: the folder is missing, has fewer than two classes, a class without (enough) images, a class on one
            side of train and test only; or there are unreadable images, of which the message counts all and names ten.
    """
    root = Path(path).expanduser()
    _check_settings(size, channels, test_share, max_per_class)
    if not root.is_dir():
        raise DataError(f"there is no folder '{path}' (looked at {root.absolute()}). Give the folder that holds one folder per class.")
    name = root.resolve().name
    files, class_names, is_split = _list_files(root)
    files = _at_most(files, max_per_class, name)
    labels = torch.tensor([file.label for file in files])
    is_test = torch.tensor([file.is_test for file in files])
    if not is_split:
        _require_two(labels, class_names, root)
        is_test = draw_share(labels, test_share, "test", name)
    return Source(
        name=name,
        images=_read_all(files, size, channels, root),
        labels=labels,
        ids=example_ids(name, torch.tensor([file.row for file in files])),
        is_test=is_test,
        class_names=dict(enumerate(class_names)),
    )


def _check_settings(size: int, channels: int, test_share: float, max_per_class: int | None) -> None:
    if size < 1:
        raise SettingError(f"size: {size} pixels; give 1 or more.")
    if channels not in (1, 3):
        raise SettingError(f"channels: {channels}; choose 3 (colour) or 1 (grey).")
    if not 0 < test_share < 1:
        raise SettingError(f"test_share: {test_share} lies outside (0, 1).")
    if max_per_class is not None and max_per_class < 2:
        raise SettingError(f"max_per_class: {max_per_class}; give 2 or more, one to train and one to test.")


def _list_files(root: Path) -> tuple[list[_File], list[str], bool]:
    """All image files in sorted order, the class names, and whether the folder brings its own split."""
    sides = {side: _by_class(root / side) for side in ("train", "test") if (root / side).is_dir()}
    is_split = len(sides) == 2
    if is_split:
        _require_same_classes(sides, root)
    else:
        sides = {"": _by_class(root)}
    names = sorted({name for classes in sides.values() for name in classes})
    if len(names) < 2:
        raise DataError(f"{root} holds {len(names)} class folders ({', '.join(names) or 'none'}); at least 2 are needed, one per class.")
    _require_images(sides, root)
    listed = sorted(
        (path.relative_to(root).as_posix(), path, name, side)
        for side, classes in sides.items()
        for name, paths in classes.items()
        for path in paths
    )
    label = {name: number for number, name in enumerate(names)}
    files = [_File(path, row, label[name], side == "test") for row, (_, path, name, side) in enumerate(listed)]
    return files, names, is_split


def _by_class(folder: Path) -> dict[str, list[Path]]:
    return {
        entry.name: [path for path in entry.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()]
        for entry in folder.iterdir()
        if entry.is_dir() and entry.name[0] != "."
    }


def _require_same_classes(sides: dict[str, dict[str, list[Path]]], root: Path) -> None:
    for side, other in (("test", "train"), ("train", "test")):
        lonely = sorted(sides[side].keys() - sides[other].keys())
        if lonely:
            raise DataError(
                f"{len(lonely)} classes stand in {root / side} but not in {root / other} ({_some(lonely)}); "
                f"add their images to {other}, or remove the folders."
            )


def _require_images(sides: dict[str, dict[str, list[Path]]], root: Path) -> None:
    empty = sorted(str(Path(side) / name) for side, classes in sides.items() for name, paths in classes.items() if not paths)
    if empty:
        raise DataError(
            f"{len(empty)} class folders in {root} hold no images ({_some(empty)}); add images ({', '.join(sorted(SUFFIXES))}), "
            f"or remove the folders. Images in deeper folders are not looked for."
        )


def _require_two(labels: Tensor, class_names: list[str], root: Path) -> None:
    lonely = [class_names[label] for label, n in enumerate(torch.bincount(labels).tolist()) if n < 2]
    if lonely:
        raise DataError(f"{len(lonely)} classes in {root} have one image only ({_some(lonely)}); two are needed, to train and to test.")


def _at_most(files: list[_File], most: int | None, name: str) -> list[_File]:
    """A fixed choice of `most` files of every class folder, in sorted order."""
    if most is None:
        return files
    groups: dict[tuple[int, bool], list[_File]] = {}
    for file in files:
        groups.setdefault((file.label, file.is_test), []).append(file)
    kept = [
        group[index]
        for (label, is_test), group in groups.items()
        for index in torch.randperm(len(group), generator=generator("at most", name, label, is_test))[:most].tolist()
    ]
    return sorted(kept, key=lambda file: file.row)


def _read_all(files: list[_File], size: int, channels: int, root: Path) -> Tensor:
    """(N, C, size, size) float32 in [0, 1]; every file is tried before the broken ones are reported together."""
    pixels = torch.empty((len(files), channels, size, size), dtype=torch.uint8)
    broken: list[str] = []
    for index, file in enumerate(files):
        try:
            pixels[index] = _read(file.path, size, channels)
        except Exception as error:  # Pillow raises nearly anything on broken files, and each must be named
            broken.append(f"{file.path.relative_to(root)} ({type(error).__name__}: {error})")
    if broken:
        raise DataError(f"{len(broken)} of {len(files)} images in {root} cannot be read: {_some(broken)}. Repair or remove them.")
    return pixels.float() / 255


def _read(path: Path, size: int, channels: int) -> Tensor:
    """(C, size, size) uint8."""
    import numpy as np
    from PIL import Image, ImageOps

    mode = "RGB" if channels == 3 else "L"
    with Image.open(path) as file:
        file.draft(None, (2 * size, 2 * size))  # lets a large JPEG be decoded at a fraction of its size
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16 bits a pixel; convert() alone would clip them at 255
            image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        if "transparency" in image.info or image.mode.endswith(("A", "a")):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        square = ImageOps.fit(image.convert(mode), (size, size))
    return torch.tensor(np.asarray(square)).reshape(size, size, channels).permute(2, 0, 1)


def _some(names: list[str]) -> str:
    """The first few of a list of names."""
    n_left = len(names) - N_LISTED
    return ", ".join(names[:N_LISTED]) + (f" and {n_left} more" if n_left > 0 else "")
