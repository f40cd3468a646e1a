"""Folders of images: where images are found, what they may look like, and what is said or refused."""

from __future__ import annotations

import os
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedlabel.data.sets.config import DataConfig, DataError
from fedlabel.data.sets.datasets import Dataset, load_dataset
from tests.data.arrays import write_image, write_images


def load(root: Path) -> Dataset:
    load_dataset.cache_clear()
    return load_dataset(DataConfig("image_folder", str(root), False, 0.0), seed=0)


def notes(root: Path) -> list[str]:
    """Returns notes without the folder's path."""
    return [note.replace(str(root), "R") for note in load(root).notes]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_classes_are_folders(tmp_path: Path, mode: str) -> None:
    data = load(write_images(tmp_path, mode))
    assert data.class_names == ("cat", "dog")
    assert data.input_shape == (3 if mode == "RGB" else 1, 6, 5)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert data.test.images[:, -1, -1, -1].tolist() == [100, 101, 110, 111]
    assert data.allow_flip
    assert data.notes == ()


# ------------------------------------------------------------------------------------------------------------- folders


def test_images_at_any_depth_are_read_and_said(tmp_path: Path) -> None:
    write_images(tmp_path, "L")
    write_image(tmp_path / "train/cat/patient1/left/7.png", 7)
    write_image(tmp_path / "train/cat/patient0/7.png", 6)
    data = load(tmp_path)
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 6, 7, 10, 11, 12]
    assert data.train.labels.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert notes(tmp_path) == ["R: 2 of 12 images lie in folders inside that of their class."]


@pytest.mark.parametrize("name", ["unlabeled", "Unlabelled", "_unlabeled", "no label"])
def test_a_folder_of_images_without_a_label(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, "L")
    write_image(tmp_path / "train" / name / "deep" / "7.png", 7)
    data = load(tmp_path)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, -1]
    assert data.train.images[6].unique().tolist() == [7]
    assert data.class_names == ("cat", "dog")
    assert notes(tmp_path)[0] == f"R/train/{name}: 1 image without a label."
    write_image(tmp_path / "test" / name / "7.png", 7)
    with pytest.raises(DataError, match=f"test/{name}: images of the test set need a class. Move them to train/{name}"):
        load(tmp_path)


def test_what_operating_systems_leave_behind_is_not_looked_at(tmp_path: Path) -> None:
    write_images(tmp_path)
    for name in (
        "train/__MACOSX/cat/0.png",
        "train/cat/._0.png",
        "train/.DS_Store",
        "test/dog/Thumbs.db",
        "test/.git/0",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5\26\7")
    data = load(tmp_path)
    assert (data.class_names, len(data.train.labels), data.notes) == (("cat", "dog"), 6, ())


def test_what_is_not_read_is_counted_and_named(tmp_path: Path) -> None:
    write_images(tmp_path, "L")
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    (tmp_path / "train/cat/scan.dcm").write_bytes(b"DICM")
    (tmp_path / "train/dog/README").write_text("x")
    (tmp_path / "train/dog/scan.DCM").write_bytes(b"DICM")
    write_image(tmp_path / "train/7.png", 7)
    write_image(tmp_path / "val/cat/0.png", 3)
    (tmp_path / "train/tmp").mkdir()
    write_image(tmp_path / "train/mouse/0.png", 30)
    (tmp_path / "train/owl").mkdir()
    write_image(tmp_path / "test/owl/0.png", 40)
    data = load(tmp_path)
    assert data.class_names == ("cat", "dog", "mouse", "owl")
    assert data.test.labels.tolist() == [0, 0, 1, 1, 3]
    assert notes(tmp_path) == [
        "R/test holds no images of the class mouse.",
        "R/train/owl has no training image, only test images.",
        "R/train/tmp holds no images and is not a class.",
        "R: of its folders val is not read.",
        "R/train: not read, as it is in no class's folder: 1 image (in train/unlabeled: one without a label).",
        "R: not read, as it is of no kind of image: 4 files (.dcm 2, .txt 1, without extension 1; e.g. "
        "R/train/cat/notes.txt).",
    ]


def test_no_folder_is_read_twice_through_links(tmp_path: Path) -> None:
    """Twenty folders that hold two links to the next each would be a million, and a loop endless."""
    write_images(tmp_path, "L")
    (tmp_path / "train/cat/loop").symlink_to(tmp_path / "train/cat")
    (tmp_path / "train/cat/itself").symlink_to("itself")
    for i in range(20):
        (tmp_path / f"others/{i}").mkdir(parents=True)
        for link in ("a", "b"):
            (tmp_path / f"others/{i}" / link).symlink_to(tmp_path / f"others/{i + 1}")
    write_image(tmp_path / "others/20/x.png", 77)
    (tmp_path / "train/dog/others").symlink_to(tmp_path / "others/0")
    started = time.monotonic()
    data = load(tmp_path)
    assert time.monotonic() - started < 2
    assert sorted(data.train.images[:, 0, 0, 0].tolist()) == [0, 1, 2, 10, 11, 12, 77]
    assert any(
        "R: not followed, as the folder was read already: 21 links, e.g. R/train/" in note for note in notes(tmp_path)
    )


def test_a_name_in_two_spellings_of_unicode_is_one_class(tmp_path: Path) -> None:
    write_images(tmp_path, "L")
    for part, form, value in (("train", "NFC", 30), ("test", "NFD", 40)):
        write_image(tmp_path / part / unicodedata.normalize(form, "café") / "0.png", value)
    data = load(tmp_path)
    assert data.class_names == ("café", "cat", "dog")
    assert data.test.labels.tolist() == [0, 1, 1, 2, 2]
    write_image(tmp_path / "train" / unicodedata.normalize("NFD", "café") / "0.png", 30)
    with pytest.raises(DataError, match="train has two folders that are called café"):
        load(tmp_path)


def test_names_that_differ_in_case_or_blanks_are_said_or_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "L")
    for part in ("train", "test"):
        write_image(tmp_path / part / "Cat" / "0.png", 50 + (part == "test"))
    assert notes(tmp_path) == ["R/train: the classes `Cat` and `cat` look the same."]
    write_image(tmp_path / "test/dog /0.png", 7)
    with pytest.raises(DataError, match="test has the class dog , which .*: did you mean dog[?] Give both one name"):
        load(tmp_path)


def test_images_in_both_sets_or_with_two_labels_are_said(tmp_path: Path) -> None:
    write_images(tmp_path, "L")
    write_image(tmp_path / "test/cat/copy.bmp", 1)
    write_image(tmp_path / "train/dog/copy.png", 2)
    assert notes(tmp_path) == [
        "R: 1 of the 5 test images are training images, too; what is measured on them says nothing about new ones.",
        "R: 1 of the 7 training images repeat one under another label.",
    ]


def rename(source: str, target: str) -> Callable[[Path], object]:
    return lambda root: (root / source).rename(root / target)


def into(root: Path) -> list[Path]:
    inside = list(root.iterdir())
    (root / "set").mkdir()
    return inside


def bare(root: Path) -> None:
    for path in [*root.glob("test/*/*"), *root.glob("test/*")]:
        path.unlink() if path.is_file() else path.rmdir()
    write_image(root / "test/1.png")
    (root / "train/cat/a.dcm").write_bytes(b"x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "test/mouse").mkdir(), "test has the class mouse, which .*train has not"),
        (rename("test", "Test"), "there is no folder .*test. Set data.root=.* Rename Test to test[?]"),
        (rename("train", "training"), "there is no folder .*train. .* Rename training to train[?]"),
        (rename("test", "holdout"), r"there is no folder .*test. .* It holds holdout, train\."),
        (lambda root: [path.rename(root / "set" / path.name) for path in into(root)], r"Set data.root=.*/set\?$"),
        (bare, "test holds no images in folders of classes. .* Directly in it: 1 image. .*: 1 file .*dcm 1"),
        (
            lambda root: (root / "train" / "a\x1b[0m").mkdir(),
            r"a\\x1b\[0m: the name of the class has letters that cannot",
        ),
        (lambda root: os.mkdir(os.fsencode(root / "train") + b"/\xff"), r"\\udcff: the name of the class has letters"),
    ],
)
def test_folders_that_are_not_as_they_should_be(tmp_path: Path, damage: Callable, message: str) -> None:
    damage(write_images(tmp_path))
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("extension", ["gif", "bmp", "tif", "TIFF", "webp", "JPG", "jpeg", "pgm", "jp2", "png"])
def test_kinds_of_files(tmp_path: Path, extension: str) -> None:
    write_images(tmp_path, "L")
    write_image(tmp_path / f"train/cat/9.{extension}", 9)
    data = load(tmp_path)
    assert data.input_shape == (1, 6, 5) if extension != "webp" else (3, 6, 5)
    assert data.train.images[3].unique().tolist() == [9]


GREY = {"1": 255, "L": 99, "LA": 99, "P": 99}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_of_colour(tmp_path: Path, mode: str) -> None:
    write_images(tmp_path, "L")
    path = tmp_path / f"train/cat/9.{'tif' if mode == 'CMYK' else 'png'}"
    if mode == "P":
        image = Image.new("P", (5, 6), 1)
        image.putpalette([0, 0, 0, 99, 99, 99])
        image.save(path)
    else:
        write_image(path, 99 if mode != "1" else 1, mode=mode)
    data = load(tmp_path)
    assert data.input_shape[0] == (1 if mode in GREY else 3)
    if mode in GREY:
        assert data.train.images[3].unique().tolist() == [GREY[mode]]
    elif mode != "CMYK":
        assert data.train.images[3].unique().tolist() == [99]
    told = " ".join(notes(tmp_path))
    assert ("10 of 11 images are grey and read as RGB, as the others are" in told) == (mode not in GREY)
    assert ("1 of 11 images have transparent parts or an alpha channel, which is dropped" in told) == ("A" in mode)


def test_a_palette_of_colours_is_colour(tmp_path: Path) -> None:
    write_images(tmp_path, "L")
    image = Image.new("P", (5, 6), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "train/cat/9.png", transparency=0)
    data = load(tmp_path)
    assert data.train.images[3, :, 2, 2].tolist() == [10, 20, 30]
    assert "transparent parts" in " ".join(data.notes)


@pytest.mark.parametrize("extension", ["png", "tif", "jpg", "webp"])
def test_images_are_turned_as_exif_says(tmp_path: Path, extension: str) -> None:
    """6: the camera lay on its side, and the picture is to be turned clockwise. TIFF's reader does so by itself."""
    write_images(tmp_path, "RGB")
    pixels = np.arange(30, dtype=np.uint8).reshape(5, 6) * 8  # lies on its side
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.stack([pixels] * 3, 2))
    image.save(tmp_path / f"train/cat/9.{extension}", exif=exif, quality=100, lossless=True)
    data = load(tmp_path)
    assert np.abs(data.train.images[3, 0].numpy().astype(int) - np.rot90(pixels, -1)).max() <= 2 * (extension == "jpg")
    assert notes(tmp_path)[0] == "R: 1 of 11 images are turned as their Exif says."


def test_of_several_pictures_the_first_is_read(tmp_path: Path) -> None:
    write_images(tmp_path, "L")
    frames = [Image.new("L", (5, 6), value) for value in (50, 60, 70)]
    frames[0].save(tmp_path / "train/cat/9.gif", save_all=True, append_images=frames[1:])
    assert load(tmp_path).train.images[3].unique().tolist() == [50]
    assert notes(tmp_path) == ["R: 1 of 11 images hold several pictures; the first is read."]


def other_size(root: Path) -> None:
    for name in ("test/dog/9.png", "test/dog/8.png"):
        write_image(root / name, 0, (7, 6))


def deep(root: Path) -> None:
    for name in ("8", "9"):
        Image.fromarray(np.zeros((6, 5), np.uint16)).save(root / f"train/dog/{name}.png")


def cut(root: Path) -> None:
    for name in ("train/dog/1.png", "test/cat/0.png"):
        (root / name).write_bytes((root / name).read_bytes()[:45])


def pointer(root: Path) -> None:
    (root / "train/dog/1.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def claims(root: Path, width: int = 60_000, height: int = 60_000) -> None:
    """Writes an image that is larger by its header."""
    (root / "train/dog/9.pgm").write_bytes(b"P5 %d %d 255\n" % (width, height) + b"\0" * 30)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            other_size,
            r"of 2 sizes \(width x height\): 5x6 \(10, e.g. .*cat/0\.png\); 7x6 \(2, e.g. .*dog/8\.png\). .*resize or",
        ),
        (deep, r"dog/8\.png has more than 8 bits a pixel; 2 of 12 images have. Convert them"),
        (cut, r"dog/1\.png cannot be read as an image: .* 2 of \d+ images cannot be read. Replace or delete it"),
        (
            lambda root: (root / "train/dog/1.png").write_bytes(b"hello"),
            r"dog/1\.png .*: it is in none of the formats PNG",
        ),
        (
            lambda root: (root / "train/dog/1.png").write_bytes(b""),
            r"none of the formats .*AVIF\. It is empty\. Replace",
        ),
        (pointer, r"It is a pointer of Git LFS: `git lfs pull` gets the file itself"),
        (claims, r"dog/9\.pgm cannot be read as an image: it claims to be larger than \d+ pixels. Replace"),
        (lambda root: claims(root, 12000, 8000), r"dog/9\.pgm cannot be read as an image: it claims to be larger than"),
        (lambda root: (root / "train/dog/9.png").symlink_to("gone"), "it is no file, but a broken link or a pipe"),
        (lambda root: os.mkfifo(root / "train/dog/9.png"), "it is no file, but a broken link or a pipe"),
    ],
)
def test_images_that_cannot_be_read_are_named_and_counted(tmp_path: Path, damage: Callable, message: str) -> None:
    damage(write_images(tmp_path))
    started = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert time.monotonic() - started < 2
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_images_than_memory_holds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, "L")
    monkeypatch.setattr("fedlabel.data.sets.loaders.machine_memory", lambda: 100.0)
    with pytest.raises(DataError, match=r"10 images of 5x6 pixels would take 0.0 GiB, more than the memory"):
        load(tmp_path)
