"""Users' images in folders: `train/<class>/...` and `test/<class>/...`, at any depth."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from fedlabel.data.sets.config import DataError, data_root
from fedlabel.data.sets.image_files import EXTENSIONS, Header, read_headers, read_pixels
from fedlabel.data.sets.loaders import Loaded, Split
from fedlabel.data.sets.names import alike, in_order, listed
from fedlabel.data.sets.repeats import repeated_images
from fedlabel.names import counted, near
from fedlabel.shown import shown

if TYPE_CHECKING:
    from fedlabel.data.sets.config import DataConfig

PARTS = ("train", "test")
OF_THE_SYSTEM = frozenset(["__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found"])
"""Files and folders that operating systems leave behind, as they do those that begin with a dot."""
UNLABELED = frozenset(["unlabeled", "unlabelled", "nolabel", "withoutlabel"])
"""Folders of `train` (without blanks, dashes and underscores) whose images have no label."""


@dataclass
class _Found:
    """The files below a folder."""

    images: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    """Files whose extension is not that of an image."""
    again: list[Path] = field(default_factory=list)
    """Links to folders that had been read already."""

    def add(self, path: Path) -> None:
        """Adds a file."""
        (self.images if path.suffix.lower() in EXTENSIONS else self.others).append(path)


class _Tree(NamedTuple):
    """All that was found below `data.root`."""

    loose: dict[str, _Found]
    """By part: files directly in it, not in a class's folder."""
    classes: dict[str, dict[str, _Found]]
    """By part, by name of the class."""
    unlabeled: dict[str, _Found]
    """Training images without a label, by name of the folder."""

    def everything(self) -> list[_Found]:
        """All of it."""
        found = [*self.loose.values(), *self.unlabeled.values()]
        return [*found, *(each for part in PARTS for each in self.classes[part].values())]


def load_image_folder(config: DataConfig) -> Loaded:
    """`<root>/train/<class>/.../<image>` and `<root>/test/<class>/.../<image>`.

    Classes are the folders of `train` that have images in `train` or `test`, at any depth, in the order of numbers if
    all are numbers and else of the alphabet; images in `train/unlabeled` have no label. All images must be of one size:
    resizing is a choice that belongs to whoever prepares the data. Grey if all images are, else RGB (alpha is dropped),
    turned as Exif says; of several pictures in one file the first. What is not read is counted and said, but for what
    operating systems leave behind.

    Raises:
        DataError: folders or images are missing, unreadable, of several sizes or of more than 8 bits.
    """
    root = data_root(config)
    try:
        for part in PARTS:
            if not (root / part).is_dir():
                raise DataError(
                    f"`data.root` (={config.root}): there is no folder {root / part}. Set data.root=<folder> that "
                    "holds train/<class>/<image> and test/<class>/<image>." + _instead(root)
                )
        tree = _look_into(root)
    except OSError as error:
        raise DataError(f"{root} cannot be looked into: {error}. Allow it, or take away what is in the way.") from error
    names = _class_names(root, tree)
    samples = {part: _samples(root, tree, names, part) for part in PARTS}
    paths = [path for part in PARTS for path, _ in samples[part]]
    headers, mode = read_headers(paths)
    pixels = torch.from_numpy(read_pixels(paths, mode, headers[0].size)).split([len(samples[part]) for part in PARTS])
    labels = (torch.tensor([label for _, label in samples[part]]) for part in PARTS)
    train, test = (Split(*split) for split in zip(pixels, labels, strict=True))
    notes = [*_of_folders(root, tree, names), *_of_files(root, tree, paths), *_of_headers(root, headers, mode)]
    return Loaded(train, test, names, (*notes, *repeated_images(train, test, str(root))))


def _samples(root: Path, tree: _Tree, names: Sequence[str], part: str) -> list[tuple[Path, int]]:
    """Returns the images of a part and their labels, -1 = none, by class and then by path."""
    labeled = [(tree.classes[part].get(name, _Found()), label) for label, name in enumerate(names)]
    unlabeled = [(found, -1) for found in tree.unlabeled.values() if part == "train"]
    samples = [(path, label) for found, label in (*labeled, *unlabeled) for path in found.images]
    if not samples:
        loose, others = tree.loose[part].images, [path for found in tree.everything() for path in found.others]
        raise DataError(
            f"{root / part} holds no images in folders of classes. At least one is needed."
            + (f" Directly in it: {counted(len(loose), 'image')}." if loose else "")
            + (f" Of no kind that is read: {_by_extension(others)}." if others else "")
        )
    return samples


# -------------------------------------------------------------------------------------------------------------- folders


def _instead(root: Path) -> str:
    """Describes what is found in place of `train` and `test`."""
    if not root.is_dir():
        return " That is a file: unpack it." if root.is_file() else ""
    folders = [path.name for path in _entries(root) if path.is_dir()]
    found = {part: near(part, folders) for part in ("train", "test") if part not in folders}
    renames = [f"{names[0]} to {part}" for part, names in found.items() if names]
    inside = [name for name in folders if all((root / name / part).is_dir() for part in PARTS)]
    if inside:
        return f" Set data.root={shown(root / inside[0], 500)}?"
    return f" Rename {', '.join(renames)}?" if renames else f" It holds {listed(folders) or 'no folders'}."


def _entries(folder: Path) -> list[Path]:
    """Returns the entries of a folder, sorted, without files of the operating system."""
    return [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and path.name.casefold() not in OF_THE_SYSTEM
    ]


def _look_into(root: Path) -> _Tree:
    tree = _Tree({part: _Found() for part in PARTS}, {part: {} for part in PARTS}, {})
    for part in PARTS:
        for path in _entries(root / part):
            name = unicodedata.normalize("NFC", path.name)  # an é may be one sign or two, by who made the folder
            if not path.is_dir():
                tree.loose[part].add(path)
            elif not name.isprintable():
                raise DataError(
                    f"{shown(path, 500)}: the name of the class has letters that cannot be shown. Rename it."
                )
            elif name in tree.classes[part]:
                raise DataError(f"{root / part} has two folders that are called {name}. Put their images into one.")
            elif _is_unlabeled(name) and part == "train":
                tree.unlabeled[name] = _walk(path)
            else:
                tree.classes[part][name] = _walk(path)
    return tree


def _walk(folder: Path) -> _Found:
    """Returns all files below a class's folder; links are followed, but no folder is read twice."""
    found = _Found()
    ahead, seen = [folder], set()
    while ahead:
        inside = ahead.pop()
        real = os.path.realpath(inside)
        if real in seen:
            found.again.append(inside)
            continue
        seen.add(real)
        for path in _entries(inside):
            if path.is_dir():
                ahead.append(path)
            else:
                found.add(path)
    found.images.sort()
    return found


def _is_unlabeled(name: str) -> bool:
    return "".join(letter for letter in name.casefold() if letter not in " _-") in UNLABELED


def _class_names(root: Path, tree: _Tree) -> tuple[str, ...]:
    train, test = (tree.classes[part] for part in PARTS)
    for name in sorted(set(test) - set(train)):
        if _is_unlabeled(name):
            raise DataError(f"{root / 'test' / name}: images of the test set need a class. Move them to train/{name}.")
        meant = near(name, train)
        raise DataError(
            f"{root / 'test'} has the class {name}, which {root / 'train'} has not"
            + (f": did you mean {meant[0]}? Give both one name." if meant else ".")
            + " Every class of the test set must be in the training set."
        )
    return tuple(in_order([name for name in train if train[name].images or (name in test and test[name].images)]))


# ---------------------------------------------------------------------------------------------------------------- notes


def _of_folders(root: Path, tree: _Tree, names: Sequence[str]) -> list[str]:
    """Returns notes on folders: images without a label, classes in one set only, folders not read."""
    notes = [
        f"{root / 'train' / name}: {counted(len(found.images), 'image')} without a label."
        for name, found in tree.unlabeled.items()
    ]
    for name, found in tree.classes["train"].items():
        tested = name in tree.classes["test"] and tree.classes["test"][name].images
        if not found.images:
            what = "has no training image, only test images" if tested else "holds no images and is not a class"
            notes.append(f"{root / 'train' / name} {what}.")
        elif not tested:
            notes.append(f"{root / 'test'} holds no images of the class {name}.")
    notes += [
        f"{root / 'train'}: the classes {' and '.join(f'`{name}`' for name in group)} look the same."
        for group in alike(names)
    ]
    unread = [path.name for path in _entries(root) if path.is_dir() and path.name not in PARTS]
    if unread:
        notes.append(f"{root}: of its folders {listed(unread)} {'is' if len(unread) == 1 else 'are'} not read.")
    return notes


def _of_files(root: Path, tree: _Tree, images: Sequence[Path]) -> list[str]:
    """Returns notes on where `images` were found, and on ignored files and links."""
    notes = [
        f"{root / part}: not read, as it is in no class's folder: {counted(len(found.images), 'image')}"
        + (" (in train/unlabeled: one without a label)." if part == "train" else ".")
        for part, found in tree.loose.items()
        if found.images
    ]
    deep = sum(len(path.relative_to(root).parts) > 3 for path in images)
    if deep:
        notes.append(f"{root}: {deep} of {len(images)} images lie in folders inside that of their class.")
    others = [path for found in tree.everything() for path in found.others]
    if others:
        notes.append(f"{root}: not read, as it is of no kind of image: {_by_extension(others)}.")
    again = [path for found in tree.everything() for path in found.again]
    if again:
        notes.append(
            f"{root}: not followed, as the folder was read already: {counted(len(again), 'link')}, "
            f"e.g. {shown(again[0], 500)}."
        )
    return notes


def _of_headers(root: Path, headers: Sequence[Header], mode: str) -> list[str]:
    """Returns notes on how images are read."""
    grey = sum(header.grey for header in headers)
    counts = {
        "are grey and read as RGB, as the others are": grey if mode == "RGB" else 0,
        "have transparent parts or an alpha channel, which is dropped": sum(header.see_through for header in headers),
        "are turned as their Exif says": sum(header.turned for header in headers),
        "hold several pictures; the first is read": sum(header.animated for header in headers),
    }
    return [f"{root}: {count} of {len(headers)} images {what}." for what, count in counts.items() if count]


def _by_extension(paths: Sequence[Path]) -> str:
    """Returns "12 files (.txt 10, .xml 2; e.g. a/b.txt)"."""
    kinds = Counter(path.suffix.lower() or "without extension" for path in paths)
    each = listed([f"{kind} {count}" for kind, count in kinds.most_common()], 5)
    return f"{counted(len(paths), 'file')} ({each}; e.g. {shown(paths[0], 500)})"
