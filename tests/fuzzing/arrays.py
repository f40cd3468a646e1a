"""npz files, folders of images, idx and CIFAR files: read rightly, or refused in a sentence that names the file.

Half of the inputs are written in one of the ways that count as right, by a recipe that knows the labels and pixels, and
must be read as these; the others are given a fault that must be refused, or bytes are changed at random.
"""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fedlabel.data.sets.config import DataConfig, DataError
from fedlabel.data.sets.datasets import Dataset, load_dataset
from fedlabel.data.sets.loaders import Split

Rng = np.random.Generator
TURNED = Image.Exif()
TURNED[0x0112] = 3  # upside down
NAMES = np.array(["ant", "bée", "cat", "dog x"])


def case(seed: int, folder: Path) -> str | None:
    """Returns what is wrong with how one input is taken, or None."""
    rng = np.random.default_rng(seed)
    kinds: list[Callable[[Rng, Path], str | None]] = [
        right_npz,
        wrong_npz,
        right_folder,
        wrong_folder,
        changed_npz,
        changed_arrays,
        changed_image,
        changed_idx,
        foreign_files,
    ]
    kind = kinds[seed % len(kinds)]
    found = kind(rng, folder)
    return found and f"{kind.__name__}: {found}"


def load(name: str, root: Path) -> Dataset | str:
    """Returns the data set, or the message that refuses it."""
    try:
        return load_dataset.__wrapped__(DataConfig(name, str(root), validation_fraction=0.0), 0)
    except DataError as error:
        return str(error)


def odd_message(message: str, root: Path) -> str | None:
    if "\n" in message or len(message) > 1500 or not message.isprintable():
        return f"no single sentence: {message[:300]!r}"
    return None if str(root) in message else f"does not name the file: {message}"


def refused(found: Dataset | str, root: Path, what: str) -> str | None:
    return odd_message(found, root) if isinstance(found, str) else f"accepted: {what}"


def sound(found: Dataset | str, root: Path, counts: tuple[int, int] | None = None) -> str | None:
    """Returns what is wrong with the answer to an input that nobody knows: neither a sentence nor a sound data set."""
    if isinstance(found, str):
        return odd_message(found, root)
    for split, lowest in ((found.train, -1), (found.test, 0)):
        if len(split.images) != len(split.labels) or not lowest <= int(split.labels.min()):
            return "labels of the wrong number, or below the lowest"
        if int(split.labels.max()) >= found.num_classes:
            return "a label above the classes"
    if counts is not None and (len(found.train.labels), len(found.test.labels)) != counts:
        return f"{len(found.train.labels)} and {len(found.test.labels)} samples, not {counts}"
    return None


def same(split: Split, images: np.ndarray, labels: np.ndarray) -> bool:
    return np.array_equal(split.images.numpy(), images) and np.array_equal(split.labels.numpy(), labels)


# ------------------------------------------------------------------------------------------------------------ npz files


def truth(rng: Rng) -> dict[str, np.ndarray]:
    """Returns images (n, channels, h, w) and labels from 0 of two to four classes, each in both sets."""
    classes, channels = int(rng.integers(2, 5)), int(rng.choice([1, 3]))
    size = rng.integers(4, 9, 2)
    made = {}
    for part in ("train", "test"):
        count = int(rng.integers(classes, 20))
        made[f"x_{part}"] = rng.integers(0, 256, (count, channels, *size), dtype=np.uint8)
        made[f"x_{part}"][0].flat[:2] = 0, 255
        made[f"y_{part}"] = rng.permutation(np.arange(count) % classes)
    return made


def write_labels(rng: Rng, train: np.ndarray, test: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns arrays that say these labels in one of many ways, and the training labels that are then known."""
    way = rng.choice(["number", "number", "from 1", "float", "text", "bytes", "one-hot", "named", "bool"])
    classes = int(train.max()) + 1
    hidden = (rng.random(len(train)) < rng.choice([0.0, 0.3])) & (np.arange(len(train)) >= 0)
    for label in range(classes):  # each class keeps one
        hidden[np.flatnonzero(train == label)[0]] = False
    known = np.where(hidden, -1, train)
    if way == "one-hot":
        eye = np.eye(classes, dtype=rng.choice(["uint8", "float32", "bool"]))
        return {"y_train": eye[train], "y_test": eye[test]}, train
    if way == "bool":
        if classes > 2:
            return {"y_train": train.astype(np.uint8), "y_test": test.astype(np.uint8)}, train
        return {"y_train": train == 1, "y_test": test == 1}, train
    if way in ("text", "bytes"):
        texts = {"y_train": np.where(hidden, "", NAMES[train]), "y_test": NAMES[test]}
        return {k: np.char.encode(v, "utf-8") if way == "bytes" else v for k, v in texts.items()}, known
    extra = {"class_names": NAMES[:classes]} if way == "named" else {}
    if way == "float":
        given = [np.where(hidden, np.nan if rng.random() < 0.5 else -1, train), test]
        dtype = str(rng.choice(["float16", "float32", ">f8"]))
    else:
        shift = way == "from 1"
        given = [np.where(hidden, -1, train + shift), test + shift]
        dtype = str(rng.choice(["int8", ">i4", "int64"] if hidden.any() else ["uint8", "int16", "uint64"]))
    columns = [rng.choice(["flat", "column", "row"]) for _ in given]
    shaped = [
        values.astype(dtype).reshape({"flat": (-1,), "column": (-1, 1), "row": (1, -1)}[shape])
        for values, shape in zip(given, columns, strict=True)
    ]
    return {"y_train": shaped[0], "y_test": shaped[1], **extra}, known


def write_pixels(rng: Rng, images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns arrays that say these images in one of many ways."""
    way = rng.choice(["uint8", "int64", ">u2", "float16", "float32", "1/255"])
    layout = rng.choice(["first", "last", "none"])
    made = {}
    for key, values in images.items():
        array = values / np.float32(255) if way == "1/255" else values.astype(str(way))
        if layout == "none" and values.shape[1] == 1:
            array = array[:, 0]
        elif layout != "first" and values.shape[1] == 3:
            array = array.transpose(0, 2, 3, 1)
        made[key] = np.asfortranarray(array) if rng.random() < 0.3 else array
    return made


def save(rng: Rng, path: Path, arrays: dict[str, np.ndarray]) -> None:
    (np.savez if rng.random() < 0.5 else np.savez_compressed)(path, **arrays)  # type: ignore[arg-type]


def right_npz(rng: Rng, folder: Path) -> str | None:
    path, given = folder / "a.npz", truth(rng)
    labels, known = write_labels(rng, given["y_train"], given["y_test"])
    arrays = {**labels, **write_pixels(rng, {key: given[key] for key in ("x_train", "x_test")})}
    save(rng, path, arrays)
    found = load("npz", path)
    if isinstance(found, str):
        return f"refused: {found}"
    if same(found.train, given["x_train"], known) and same(found.test, given["x_test"], given["y_test"]):
        return None
    return f"other labels or pixels, of { ({key: (value.dtype, value.shape) for key, value in arrays.items()}) }"


def wrong_npz(rng: Rng, folder: Path) -> str | None:
    path, given = folder / "a.npz", truth(rng)
    y, n = given["y_train"], len(given["y_train"])
    row = int(rng.integers(n))
    spoiled = y.astype(float)
    faults: dict[str, dict[str, object]] = {
        "a label of 10^k": {"y_train": np.where(np.arange(n) == row, 10 ** int(rng.integers(3, 19)), y)},
        "a negative label": {"y_train": np.where(np.arange(n) == row, -int(rng.integers(2, 1000)), y)},
        "a label of 255 in uint8": {"y_train": np.where(np.arange(n) == row, 255, y).astype(np.uint8)},
        "a fraction": {"y_train": np.where(np.arange(n) == row, 0.5, spoiled)},
        "infinity": {"y_train": np.where(np.arange(n) == row, np.inf, spoiled)},
        "no label in the test set": {"y_test": np.where(np.arange(len(given["y_test"])) == 0, -1, given["y_test"])},
        "NaN in the test set": {"y_test": np.where(np.arange(len(given["y_test"])) == 0, np.nan, given["y_test"])},
        "a class of the test set alone": {"y_test": np.where(np.arange(len(given["y_test"])) == 0, 7, given["y_test"])},
        "objects": {"y_train": y.astype(object)},
        "probabilities": {"y_train": np.full((n, 3), 1 / 3)},
        "two annotators": {"y_train": np.stack([y, y], 1)},
        "times": {"y_train": y.astype("datetime64[s]")},
        "one label too few": {"y_train": y[1:]},
        "one class": {"y_train": y * 0},
        "16 bits": {"x_train": given["x_train"].astype(np.uint16) * 257},
        "negative pixels": {"x_train": given["x_train"].astype(int) - 128},
        "standardised pixels": {"x_train": given["x_train"] / 64 - 2, "x_test": given["x_test"] / 64 - 2},
        "floats beside bytes": {"x_train": given["x_train"] / 255},
        "a pixel that is NaN": {"x_train": given["x_train"] * np.nan, "x_test": given["x_test"] / 255},
        "rows of numbers": {"x_train": given["x_train"].reshape(n, -1)},
        "other sizes": {"x_train": given["x_train"][:, :, 1:]},
        "no images": {"x_train": given["x_train"][:0], "y_train": y[:0]},
        "a key is missing": {"x_test": None},
        "two names for four classes": {"class_names": np.array(["a"])},
    }
    fault = sorted(faults)[int(rng.integers(len(faults)))]
    arrays = {key: value for key, value in {**given, **faults[fault]}.items() if value is not None}
    save(rng, path, arrays)  # type: ignore[arg-type]
    return refused(load("npz", path), path, fault)


def change(rng: Rng, content: bytes) -> bytes:
    """Returns bytes with a few of them changed, cut out, put in or repeated."""
    made = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        at, dice = int(rng.integers(max(1, len(made)))), rng.random()
        if dice < 0.8:
            made[at : at + 1] = bytes([int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))]))])
        elif dice < 0.87:
            del made[at : at + int(rng.integers(1, 9))]
        elif dice < 0.94:
            made[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            del made[at + 1 :]
    return bytes(made)


def changed_npz(rng: Rng, folder: Path) -> str | None:
    """Checksums tell of most changes; what is accepted must be what was written."""
    path, given = folder / "a.npz", truth(rng)
    save(rng, path, given)
    path.write_bytes(change(rng, path.read_bytes()))
    found = load("npz", path)
    if isinstance(found, str):
        return odd_message(found, path)
    right = same(found.train, given["x_train"], given["y_train"]) and same(found.test, given["x_test"], given["y_test"])
    return None if right else "accepted with other labels or pixels"


def changed_arrays(rng: Rng, folder: Path) -> str | None:
    """As `changed_npz`, but the checksums are right: also headers are damaged, and labels."""
    path, given = folder / "a.npz", truth(rng)
    spoiled = str(rng.choice(list(given)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in given.items():
            content = io.BytesIO()
            np.save(content, array)
            value = content.getvalue()
            if key == spoiled:
                value = change(rng, value[:128]) + value[128:] if rng.random() < 0.7 else change(rng, value)
            archive.writestr(f"{key}.npy", value)
    return sound(load("npz", path), path)


# ---------------------------------------------------------------------------------------------------- folders of images


def write_tree(rng: Rng, root: Path) -> tuple[np.ndarray, np.ndarray, list[Path]]:
    """Writes images of one value each; returns the values and labels of the training images, sorted, and the files."""
    classes = [str(name) for name in NAMES[: rng.integers(2, 5)]]
    value, expected, files = 0, [], []
    for part in ("train", "test"):
        for label, name in enumerate([*classes, *(["unlabeled"] if part == "train" and rng.random() < 0.4 else [])]):
            for i in range(int(rng.integers(1, 4))):
                value += 1
                inside = rng.choice(["", "", "patient 1", "a/b/c"])
                path = (
                    root / part / name / str(inside) / f"{i}.{rng.choice(['png', 'PNG', 'gif', 'bmp', 'tif', 'pgm'])}"
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                mode = rng.choice(["L", "L", "RGB", "P", "LA"]) if path.suffix in (".png", ".tif") else "L"
                image = Image.new("L", (6, 5), 8 * value)
                (image if mode == "L" else image.convert(str(mode))).save(path)
                files.append(path)
                if part == "train":
                    expected.append((8 * value, label if name in classes else -1))
    for junk in (
        "__MACOSX/x.png",
        ".DS_Store",
        "ant/._0.png",
        "ant/Thumbs.db",
        "ant/notes.txt",
        "loose.txt",
        ".x/0.png",
    ):
        if rng.random() < 0.3:
            (root / "train" / junk).parent.mkdir(exist_ok=True)
            (root / "train" / junk).write_bytes(rng.bytes(20))
    if rng.random() < 0.3:
        (root / "train/ant/again").symlink_to(root / "train/ant")
    values, labels = np.array(sorted(expected)).T
    return values, labels, files


def right_folder(rng: Rng, folder: Path) -> str | None:
    values, labels, _ = write_tree(rng, folder)
    found = load("image_folder", folder)
    if isinstance(found, str):
        return f"refused: {found}"
    pixels = found.train.images.numpy()
    if not (pixels == pixels[:, :1, :1, :1]).all():
        return "images are not of one value each"
    order = np.argsort(pixels[:, 0, 0, 0], kind="stable")
    right = np.array_equal(pixels[order, 0, 0, 0], values) and np.array_equal(found.train.labels.numpy()[order], labels)
    return None if right else "other images or labels"


def wrong_folder(rng: Rng, folder: Path) -> str | None:
    _, _, files = write_tree(rng, folder)
    victim = files[int(rng.integers(len(files)))]
    faults: dict[str, Callable[[], object]] = {
        "another size": lambda: Image.new("L", (6, 6)).save(victim, format="PNG"),
        "16 bits": lambda: Image.new("I;16", (6, 5)).save(victim, format="PNG"),
        "an empty file": lambda: victim.write_bytes(b""),
        "a text": lambda: victim.write_text("hello"),
        "half a file": lambda: victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2]),
        "a bomb": lambda: victim.write_bytes(b"P5 99999 99999 255\n" + bytes(99)),
        "a class of the test set alone": lambda: shutil.copytree(folder / "test/ant", folder / "test/Ant"),
        "no test set": lambda: shutil.rmtree(folder / "test"),
        "test images without a label": lambda: shutil.copytree(folder / "test/ant", folder / "test/unlabeled"),
        "a broken link": lambda: (victim.unlink(), victim.symlink_to("gone")),
    }
    fault = sorted(faults)[int(rng.integers(len(faults)))]
    faults[fault]()
    return refused(load("image_folder", folder), folder, f"{fault} ({victim.suffix})")


def changed_image(rng: Rng, folder: Path) -> str | None:
    _, _, files = write_tree(rng, folder)
    victim = files[int(rng.integers(len(files)))]
    image = Image.new(str(rng.choice(["L", "RGB", "CMYK"])), (6, 5), 99)
    image.save(victim, format=str(rng.choice(["JPEG", "TIFF"])), exif=TURNED)
    victim.write_bytes(change(rng, victim.read_bytes()))
    count = sum("test" not in path.relative_to(folder).parts[0] for path in files)
    return sound(load("image_folder", folder), folder, (count, len(files) - count))


# ------------------------------------------------------------------------------------------------------- published sets


def changed_idx(rng: Rng, folder: Path) -> str | None:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    files = {}
    for prefix, count in (("train", 12), ("t10k", 5)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (count, 4, 4), dtype=np.uint8)),
            ("labels-idx1", rng.integers(0, 10, count, dtype=np.uint8)),
        ):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            files[raw / f"{prefix}-{kind}-ubyte"] = head + array.tobytes()
    victim = sorted(files)[int(rng.integers(4))]
    for path, content in files.items():
        path.write_bytes(change(rng, content[:20]) + content[20:] if path == victim else content)
    return sound(load("mnist", folder), folder)


def foreign_files(rng: Rng, folder: Path) -> str | None:
    """Files of the right name whose content is another's: a pickle is never opened unless it is the published one."""
    name, inside = (
        ("cifar10", ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]),
        ("cifar100", ["train", "test"]),
        ("svhn", ["train_32x32.mat", "test_32x32.mat"]),
    )[int(rng.integers(3))]
    place = folder / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "svhn": ""}[name]
    place.mkdir(exist_ok=True)
    for each in inside:
        if rng.random() < 0.9:
            (place / each).write_bytes(b"cos\nabort\n(tR." if rng.random() < 0.5 else rng.bytes(200))
    return refused(load(name, folder), folder, "files that are not the published ones")
