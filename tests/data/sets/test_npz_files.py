"""npz files: the data set in one, what a damaged or hostile file gives, and what other names keys have."""

from __future__ import annotations

import io
import pickle
import struct
import time
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlabel.data.sets.config import DataConfig, DataError
from fedlabel.data.sets.datasets import load_dataset
from fedlabel.data.sets.npz_files import read_npz
from tests.data.arrays import RNG, write_npz


def test_grey_images_and_their_labels(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (20, 5, 4), dtype=np.uint8)
    data = load_dataset(write_npz(tmp_path / "set.npz", x_train=x), seed=0)
    assert data.input_shape == (1, 5, 4)
    assert data.class_names == ("0", "1", "2", "3")
    assert np.array_equal(data.train.images[:, 0].numpy(), x)
    assert data.train.labels.tolist() == [0, 1, 2, 3] * 5
    assert not data.allow_flip
    assert data.notes == ()


def test_a_constant_channel_can_be_divided_by(tmp_path: Path) -> None:
    data = load_dataset(write_npz(tmp_path / "set.npz", x_train=np.full((20, 5, 4), 70, dtype=np.uint8)), seed=0)
    assert data.std == (1.0,)


def test_what_there_is_to_say_is_a_note(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (20, 5, 4), dtype=np.uint8)
    x[7] = x[3]
    config = write_npz(
        tmp_path / "set.npz",
        x_train=x,
        x_test=x[:6],
        y_train=np.where(np.arange(20) < 8, np.arange(20) % 3 + 1, -1),
        y_test=np.arange(6) % 3 + 1,
        classes=np.array(["a"]),
    )
    path = f"{tmp_path / 'set.npz'}:"
    assert load_dataset(config, seed=0).notes == (
        f"{path} classes of it is used only where a key names it, e.g. partition.column. Did you mean classes as "
        "class_names? Save the file with these names.",
        f"{path} `y_train`: 12 of 20 samples have no label.",
        f"{path} 6 of the 6 test images are training images, too; what is measured on them says nothing about new "
        "ones.",
        f"{path} 1 of the 20 training images repeat one under another label.",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": None}, "lacks y_train; it holds x_train, x_test, y_test"),
        ({"x_test": np.zeros((0, 5, 4), np.uint8), "y_test": np.zeros(0, int)}, "`x_test` holds no images"),
        ({"x_train": np.zeros((0, 5, 4), np.uint8), "y_train": np.zeros(0, int)}, "`x_train` holds no images"),
        ({"y_train": np.arange(19) % 4}, r"`x_train` holds 20 images, but .*`y_train` holds 19 labels.*\(-1 for an"),
        ({"y_test": np.arange(7)}, r"`y_test` holds 7 labels. There must be one label per image\.$"),
        ({"x_train": np.zeros((5, 4, 3, 20), np.uint8)}, r"along the last axis: `numpy.moveaxis\(x, -1, 0\)`"),
        ({"x_train": np.uint8(3)}, "`x_train` holds no images"),
        ({"y_train": np.array([None] * 20)}, "`y_train` holds Python objects, which are not read"),
        ({"y_train": np.zeros(20, [("a", int)])}, "`y_train` is an array of .*It must be plain numbers or texts"),
    ],
)
def test_errors_name_file_and_key(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "set.npz"
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(write_npz(path, **changes), seed=0)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        ("X_train Y_train X_test Y_test", "X_train as x_train, Y_train as y_train, X_test as x_test, Y_test as y_test"),
        ("train_images train_labels test_images test_labels", "train_images as x_train, train_labels as y_train, "),
        ("x y", "x as x_train, y as y_train"),
        ("data target", "data as x_train"),
        ("set/x_train set/y_train", "set/x_train as x_train, set/y_train as y_train"),
        ("xtrain y-train x_tset y_test", "xtrain as x_train, y-train as y_train, x_tset as x_test"),
    ],
)
def test_other_names_of_the_keys_are_recognised(tmp_path: Path, names: str, meant: str) -> None:
    np.savez(tmp_path / "set.npz", **dict.fromkeys(names.split(), np.zeros(3)))
    with pytest.raises(DataError, match=rf"lacks .* Did you mean {meant}.*\? Save the file with these names."):
        load_dataset(DataConfig(name="npz", root=str(tmp_path / "set.npz")), seed=0)


def test_a_file_of_labels_alone_is_no_data_set(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", labels=np.zeros((70, 3), int))
    with pytest.raises(DataError, match="it holds labels.* A file of labels alone is for supervision.labels_file"):
        load_dataset(DataConfig(name="npz", root=str(tmp_path / "set.npz")), seed=0)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "npy"])
def test_a_file_that_is_broken(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "set.npz"
    config = write_npz(path)
    content = bytearray(path.read_bytes())
    content[300] ^= 255
    if damage == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "cut": content[:-50], "flipped": content}[damage])
    with pytest.raises(DataError, match=r"set\.npz cannot be read as an npz file"):
        load_dataset(config, seed=0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "It is a pointer of Git LFS: `git lfs pull`"),
        (b"\n<!DOCTYPE html><html>not found</html>", "It is a web page, and not what was to be downloaded"),
        (b"", "It is empty"),
    ],
)
def test_what_stands_in_its_place_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(DataError, match=rf"File is not a zip file\. {said}.*\. Write it again"):
        load_dataset(DataConfig(name="npz", root=str(tmp_path / "set.npz")), seed=0)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    config = DataConfig(name="npz", root=str(tmp_path))
    with pytest.raises(DataError, match=f"there is no file {tmp_path}.*Set data.root="):
        load_dataset(config, seed=0)
    write_npz(tmp_path / "set.npz")
    with pytest.raises(DataError, match="That folder has set.npz."):
        load_dataset(config, seed=0)


# ------------------------------------------------------------------------------------------------------ hostile files


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def write_zip(path: Path, entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)


class Boom:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was loaded",))


def with_header(header: str, content: bytes = b"\0" * 64) -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000,)}"),
            "claims 10000000000000 by",
        ),
        (with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (63,)}"), r"claims 63 bytes .*, but holds 64"),
        (
            with_header("{'descr': '<U0', 'fortran_order': False, 'shape': (10000000000000,)}"),
            "It must be plain numbers",
        ),
        (with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (-64, -1)}"), "It must be plain numbers"),
        (
            with_header("{'descr': '<U16', 'fortran_order': False, 'shape': (1,)}", b"\xff" * 64),
            "holds texts that are no",
        ),
        (
            with_header("{'descr': '>U16', 'fortran_order': False, 'shape': (1,)}", b"\1" * 64),
            "holds texts that are none",
        ),
        (with_header("{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (64,)}"), "It must be plain numbers"),
        (with_header("__import__('os').abort()"), "cannot be read as an npz file"),
        (with_header("{'descr': " + "(" * 90), "cannot be read as an npz file"),
        (
            with_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", pickle.dumps([Boom()])),
            "holds Python obj",
        ),
        (b"\x93NUMPY\x03\x00" + b"\0" * 64, "is written in version"),
        (b"hello", "cannot be read as an npz file"),
        (b"", "cannot be read as an npz file"),
    ],
)
def test_a_header_is_held_against_the_size_before_memory_is_taken(tmp_path: Path, entry: bytes, message: str) -> None:
    write_zip(tmp_path / "set.npz", [("x_train.npy", entry)])
    tracemalloc.start()
    with pytest.raises(DataError, match=message):
        read_npz(tmp_path / "set.npz", ("x_train",))
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_a_packed_file_is_no_larger_than_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zip bomb, a thousandth of its size, is refused unless it is small; and so is what memory does not hold."""
    path = tmp_path / "set.npz"
    write_zip(path, [("x_train.npy", npy(np.zeros((1000, 100, 100), np.uint8)))], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    assert read_npz(path, ("x_train",))[0]["x_train"].shape == (1000, 100, 100)
    monkeypatch.setattr("fedlabel.data.sets.loaders.machine_memory", lambda: 9e6)
    with pytest.raises(DataError, match="would take 0.0 GiB, more than the memory of this machine"):
        read_npz(path, ("x_train",))
    assert read_npz(path, ("y",)) == ({}, ["x_train"])  # what is not wanted is not unpacked
    monkeypatch.undo()
    write_zip(path, [("x_train.npy", npy(np.zeros((7000, 100, 100), np.uint8)))], zipfile.ZIP_DEFLATED)
    with pytest.raises(
        DataError, match="`x_train` is to unpack to 0.1 GiB, 10.. times its size: .* without packing it"
    ):
        read_npz(path, ("x_train",))
    write_zip(path, [("x_train.npy", npy(np.zeros((7000, 100, 100), np.uint8)))])
    assert read_npz(path, ("x_train",))[0]["x_train"].shape == (7000, 100, 100)


def test_a_size_that_cannot_be_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    write_zip(path, [("x_train.npy", npy(np.zeros(1000, np.uint8)))], zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02") + 24  # the size in the central directory
    content[at : at + 4] = struct.pack("<I", 1 << 30)
    path.write_bytes(content)
    with pytest.raises(DataError, match="is to unpack to 1.0 GiB, .* times its size: damaged"):
        read_npz(path, ("x_train",))


def test_two_arrays_of_a_name_other_packing_and_passwords_are_refused(tmp_path: Path) -> None:
    path, entry = tmp_path / "set.npz", npy(np.arange(3))
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_zip(path, [("x.npy", entry), ("x.npy", entry)])
    with pytest.raises(DataError, match="it has two arrays x"):
        read_npz(path, ("x",))
    write_zip(path, [("x.npy", entry)], zipfile.ZIP_BZIP2)
    with pytest.raises(DataError, match="`x` is packed in a way that numpy does not write"):
        read_npz(path, ("x",))
    write_zip(path, [("x.npy", entry)])
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="`x` is encrypted"):
        read_npz(path, ("x",))
    for at, value, message in ((6, 73, "zip file version 7.3"), (8, 32, "compressed patched data")):
        write_zip(path, [("x.npy", entry)])
        content = bytearray(path.read_bytes())
        content[content.rindex(b"PK\x01\x02") + at] = value
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"cannot be read as an npz file: {message}"):
            read_npz(path, ("x",))


def test_what_numpy_writes_is_read_as_numpy_reads_it(tmp_path: Path) -> None:
    given = {
        "columns_first": np.asfortranarray(np.arange(12).reshape(3, 4)),
        "big_endian": np.arange(5).astype(">i4"),
        "texts": np.array(["a", "bé", ""]).astype(">U5"),
        "bytes": np.array([b"a", b"bc"]),
        "nothing": np.zeros((0, 3)),
        "scalar": np.float32(2.5),
        "many": RNG.random((300, 1000)),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "set.npz", **given)
        read, names = read_npz(tmp_path / "set.npz", given)
        assert names == list(given)
        for name, array in given.items():
            assert read[name].dtype == array.dtype
            assert np.array_equal(read[name], array)


def test_one_huge_label_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    config = write_npz(tmp_path / "set.npz", y_train=np.where(np.arange(20) == 5, 10**15, np.arange(20) % 4))
    started = time.monotonic()
    with pytest.raises(
        DataError, match=r"`y_train`: the label of sample 5 \(=1000000000000000\) is far from the others"
    ):
        load_dataset(config, seed=0)
    assert time.monotonic() - started < 2


def test_a_number_that_is_no_name_is_no_class_where_names_are_numbers(tmp_path: Path) -> None:
    """Of labels 1, 2, 3 the class 1 is the one of that name, and there is no class 0."""
    labels = {"y_train": np.arange(20) % 3 + 1, "y_test": np.arange(6) % 3 + 1}
    config = write_npz(tmp_path / "set.npz", **labels)
    data = load_dataset(replace(config, positive_classes=("1",)), seed=0)
    assert data.train.labels.tolist() == (labels["y_train"] == 1).astype(int).tolist()
    with pytest.raises(DataError, match=r"`data.positive_classes` \(=\[0\]\): 0 is none of the classes 1, 2, 3\."):
        load_dataset(replace(config, positive_classes=("0",)), seed=0)
