"""Loading: shapes, values, the held-out part, and one clear message for each thing that can be wrong with files."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision

from fedlabel.data.sets.config import SETS, DataConfig, DataError
from fedlabel.data.sets.datasets import load_dataset

REAL = Path(__file__).parents[3].parent / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no folder ../shared/data with the real data sets")

RNG = np.random.default_rng(0)


def write_idx(path: Path, array: np.ndarray, packed: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    if packed:
        path = path.with_name(path.name + ".gz")
        content = gzip.compress(content)
    path.write_bytes(content)


def write_mnist(
    root: Path, folder: str = "MNIST", prefixes: tuple[str, str] = ("train", "t10k"), packed: bool = True
) -> dict[str, np.ndarray]:
    arrays = {}
    for prefix, count in zip(prefixes, (10, 4), strict=True):
        arrays[prefix] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(root / folder / "raw" / f"{prefix}-images-idx3-ubyte", arrays[prefix], packed)
        write_idx(root / folder / "raw" / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8), packed)
    return arrays


# ------------------------------------------------------------------------------------------------------------- digits


def test_digits_shapes_types_and_scale() -> None:
    data = load_dataset(DataConfig(), seed=0)
    assert data.input_shape == (1, 8, 8)
    assert data.num_classes == 10
    assert not data.allow_flip
    assert len(data.train.labels) + len(data.validation.labels) == 1437
    assert len(data.validation.labels) == int(0.1 * 1437)
    for split in (data.train, data.validation, data.test):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert split.images.shape == (len(split.labels), 1, 8, 8)
    assert data.train.images.max() == 255


def test_statistics_are_those_of_the_training_images() -> None:
    data = load_dataset(DataConfig(), seed=0)
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx((pixels.mean().item(),))
    assert data.std == pytest.approx((pixels.std(correction=0).item(),))


def test_test_set_is_stratified_and_does_not_follow_the_seed() -> None:
    one, two = load_dataset(DataConfig(), seed=1), load_dataset(DataConfig(), seed=2)
    assert torch.equal(one.test.images, two.test.images)
    assert one.test.labels[:8].tolist() == [7, 6, 3, 7, 7, 3, 2, 8]  # another split would be another benchmark
    assert set(torch.bincount(one.test.labels).tolist()) <= {35, 36, 37}


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_validation_is_taken_off_the_training_set(fraction: float) -> None:
    whole = load_dataset(DataConfig(validation_fraction=0.0), seed=3).train
    data = load_dataset(DataConfig(validation_fraction=fraction), seed=3)
    assert len(data.validation.labels) == int(fraction * len(whole.labels))
    together = torch.cat([data.train.images, data.validation.images]).flatten(1)
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, whole.images.flatten(1).tolist()))


def test_training_set_can_be_cut_and_the_validation_set_stays() -> None:
    whole, small = (load_dataset(DataConfig(train_samples=n), seed=3) for n in (None, 100))
    assert torch.equal(small.validation.images, whole.validation.images)
    assert len(small.train.labels) == 100
    kept = torch.isin(whole.train_rows, small.train_rows)
    assert torch.equal(whole.train.images[kept], small.train.images)
    assert small.train.labels.unique().numel() == 10
    with pytest.raises(DataError, match=r"`data.train_samples` \(=5000\) is more than the training set has: 1294"):
        load_dataset(DataConfig(train_samples=5000), seed=3)
    with pytest.raises(ValueError, match=r"`data.train_samples` \(=0\) must be at least 1"):
        DataConfig(train_samples=0)


def test_validation_depends_on_the_seed_alone() -> None:
    first = load_dataset(DataConfig(), seed=5)
    load_dataset.cache_clear()
    again, other = load_dataset(DataConfig(), seed=5), load_dataset(DataConfig(), seed=6)
    assert first is not again
    assert torch.equal(first.validation.images, again.validation.images)
    assert torch.equal(first.train.labels, again.train.labels)
    assert not torch.equal(first.validation.images, other.validation.images)


# ------------------------------------------------------------------------------------------------- the MNIST family


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_from_packed_and_unpacked_files_of_a_read_only_folder(tmp_path: Path, packed: bool) -> None:
    arrays = write_mnist(tmp_path, packed=packed)
    (tmp_path / "MNIST" / "raw").chmod(0o555)
    data = load_dataset(DataConfig("mnist", str(tmp_path), False, 0.0), seed=0)
    (tmp_path / "MNIST" / "raw").chmod(0o755)
    assert np.array_equal(data.train.images[:, 0].numpy(), arrays["train"])
    assert np.array_equal(data.test.images[:, 0].numpy(), arrays["t10k"])
    assert data.train.labels.tolist() == list(range(10))
    assert len(list(tmp_path.rglob("*"))) == 6  # two folders, four files: nothing was written


def test_unpacked_files_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    write_mnist(tmp_path, packed=False)
    data = load_dataset(DataConfig("mnist", str(tmp_path), False, 0.0), seed=0)
    theirs = torchvision.datasets.MNIST(str(tmp_path))
    assert torch.equal(data.train.images[:, 0], theirs.data)
    assert torch.equal(data.train.labels, theirs.targets)


def test_emnist_is_turned_upright(tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path, "EMNIST", ("emnist-byclass-train", "emnist-byclass-test"))
    data = load_dataset(DataConfig("emnist", str(tmp_path), False, 0.0), seed=0)
    assert data.num_classes == 62
    assert data.class_names[9:12] == ("9", "A", "B")
    assert np.array_equal(data.train.images[:, 0].numpy(), arrays["emnist-byclass-train"].swapaxes(1, 2))


@pytest.mark.parametrize("damage", ["cut", "cut before packing", "longer", "text", "packed text", "wrong dimensions"])
def test_broken_idx_files_are_named(tmp_path: Path, damage: str) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-100])
        case "cut before packing":
            path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
        case "longer":
            path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"\0"))
        case "text":
            path.write_bytes(b"<html>")
        case "packed text":
            path.write_bytes(gzip.compress(b"<html>"))
        case "wrong dimensions":
            write_idx(path.with_suffix(""), np.zeros(4, dtype=np.uint8))
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz .*Delete it and download or copy it again"):
        load_dataset(DataConfig("mnist", str(tmp_path)), seed=0)


def test_an_idx_file_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    """A gigabyte that is claimed, and one that is there: a megabyte of packed zeros."""
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    header = bytes([0, 0, 8, 3]) + np.array([1 << 10, 1 << 10, 1 << 10], ">u4").tobytes()
    for content in (header, header + bytes(1 << 27)):
        path.write_bytes(gzip.compress(content, 1))
        with pytest.raises(
            DataError, match=r"train-images-idx3-ubyte\.gz is to unpack to 1\.0 GiB, \d+ times its size"
        ):
            load_dataset(DataConfig("mnist", str(tmp_path)), seed=0)


def test_idx_files_of_different_lengths(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_idx(tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte", np.zeros(9, dtype=np.uint8))
    with pytest.raises(DataError, match=r"images-idx3-ubyte.gz holds 10 images, but .*labels-idx1-ubyte.gz holds 9"):
        load_dataset(DataConfig("mnist", str(tmp_path)), seed=0)


# ------------------------------------------------------------------------------------------- missing, downloads, names


@pytest.mark.parametrize("name", ["fashion_mnist", "mnist", "emnist", "cifar10", "cifar100", "svhn"])
def test_a_missing_set_says_where_it_was_sought_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_dataset(DataConfig(name=name, root="here"), seed=0)
    message = str(caught.value)
    assert f"`data.name` (={name})" in message
    assert f"in {tmp_path / 'here'} (looked for" in message
    assert "data.download=true" in message
    assert "data.root=" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mnist", "emnist", "cifar10", "svhn"])
def test_a_download_that_fails_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    for module, function in (
        ("mnist", "download_and_extract_archive"),
        ("cifar", "download_and_extract_archive"),
        ("svhn", "download_url"),
    ):
        monkeypatch.setattr(f"torchvision.datasets.{module}.{function}", fail)
    with pytest.raises(DataError, match=rf"`data.name` \(={name}\): could not be downloaded .*no route to host"):
        load_dataset(DataConfig(name=name, root=str(tmp_path), download=True), seed=0)


def test_download_is_asked_for_only_if_files_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path)
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda self: pytest.fail("downloaded"))
    load_dataset(DataConfig("mnist", str(tmp_path), download=True), seed=0)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        DataError,
        match=r"`data.name` \(=cifar_10\) must be one of digits, .*npz, .*table, nodes\. Did you mean cifar10\?",
    ):
        DataConfig(name="cifar_10")
    with pytest.raises(DataError, match=r"`data.name` \(=zzz\) must be one of digits, .*npz, .*table, nodes\.$"):
        DataConfig(name="zzz")


@pytest.mark.parametrize("fraction", [1.0, 1.2, -0.1, float("nan")])
def test_validation_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"`data.validation_fraction` \(={fraction}\) must lie in \[0, 1\)\."):
        DataConfig(validation_fraction=fraction)


def test_only_images_that_keep_their_meaning_are_mirrored() -> None:
    assert {name for name, entry in SETS.items() if entry.allow_flip} == {
        "cifar10",
        "cifar100",
        "fashion_mnist",
        "image_folder",
    }


# -------------------------------------------------------------------------------------------------------- real data


@needs_real
def test_real_fashion_mnist() -> None:
    data = load_dataset(DataConfig("fashion_mnist", str(REAL), False, 0.0), seed=0)
    assert torch.bincount(data.train.labels).tolist() == [6000] * 10
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    assert data.mean == pytest.approx((0.2860,), abs=1e-4)
    assert data.std == pytest.approx((0.3530,), abs=1e-4)
    assert data.class_names[9] == "Ankle boot"
    packed = (REAL / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz").read_bytes()
    assert data.train.images.numpy().tobytes() == gzip.decompress(packed)[16:]


@needs_real
def test_real_cifar10() -> None:
    data = load_dataset(DataConfig("cifar10", str(REAL), False, 0.0), seed=0)
    assert data.input_shape == (3, 32, 32)
    assert torch.bincount(data.train.labels).tolist() == [5000] * 10
    assert data.mean == pytest.approx((0.49139968, 0.48215841, 0.44653091), abs=1e-6)
    assert data.std == pytest.approx((0.24703223, 0.24348513, 0.26158784), abs=1e-6)
    assert data.class_names[:2] == ("airplane", "automobile")
    # The first record of data_batch_1, channels first as in the file: a frog.
    assert data.class_names[data.train.labels[0]] == "frog"
    image, _ = torchvision.datasets.CIFAR10(str(REAL))[0]
    assert np.array_equal(data.train.images[0].permute(1, 2, 0).numpy(), np.asarray(image))


@needs_real
def test_a_damaged_cifar10_is_not_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for path in (REAL / "cifar-10-batches-py").iterdir():
        if path.name != "test_batch":
            (folder / path.name).symlink_to(path)
    (folder / "test_batch").write_bytes(b"hello")
    assert hashlib.md5(b"hello").hexdigest() != "40351d587109b95175f43aff81a1287e"
    with pytest.raises(DataError, match="no complete copy"):
        load_dataset(DataConfig("cifar10", str(tmp_path)), seed=0)
