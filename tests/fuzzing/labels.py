"""Files of labels, published counts of bags, clients of a column and labelling functions.

Half of the inputs are written in one of the ways that count as right and must be read as what they were made of; the
others are given a fault that must be refused, or bytes are changed at random.
"""

from __future__ import annotations

import csv
import gzip
import io
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fedlabel.data.labels.bag_files import read_bags
from fedlabel.data.labels.label_files import read_label_file
from fedlabel.data.labels.labeling_functions import cast_votes, load_functions
from fedlabel.data.own_columns import name_of
from fedlabel.data.partition import PartitionConfig, column_owners
from fedlabel.data.sets.class_names import ClassNames

Rng = np.random.Generator
NAMES = (
    ("cat", "dog", "Grizzly bear"),
    ("1", "2", "3"),
    ("-1", "1"),
    ("0.5", "1.5", "2.5"),
    ("False", "True"),
    ("rest", "ship+truck"),
    ("benign", "malignant"),
)


def case(seed: int, folder: Path) -> str | None:
    """Returns what is wrong with how one input is taken, or None."""
    rng = np.random.default_rng(seed)
    kinds: list[Callable[[Rng, Path], str | None]] = [
        right_labels,
        wrong_labels,
        changed_labels,
        right_bags,
        wrong_bags,
        changed_bags,
        answers,
        modules,
        clients,
    ]
    kind = kinds[seed % len(kinds)]
    found = kind(rng, folder)
    return found and f"{kind.__name__}: {found}"


def asked(ask: Callable[[], Any]) -> Any:
    """Returns the answer, the message that refuses the question, or an exception that is no refusal."""
    try:
        return ask()
    except ValueError as error:
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(Path(__file__).parents[2]):
            return str(error)
        return RuntimeError(f"somebody else's words: {error!r}")
    except Exception:
        return RuntimeError(traceback.format_exc())


def odd(found: Any) -> str | None:
    """Returns what is wrong with a refusal."""
    if isinstance(found, RuntimeError):
        return str(found)
    if isinstance(found, str) and ("\n" in found or len(found) > 1500 or not found.isprintable()):
        return f"no single sentence: {found[:300]!r}"
    return None


def refused(found: Any, what: str) -> str | None:
    return odd(found) if isinstance(found, (str, RuntimeError)) else f"accepted: {what}"


# ------------------------------------------------------------------------------------------------------ files of labels


def a_set(rng: Rng) -> Any:
    """Returns what a reader asks of a data set: some classes, and 12 to 30 samples of which some are held out."""
    size = int(rng.integers(12, 30))
    rows = np.sort(rng.permutation(size)[: size - 3])
    names = NAMES[rng.integers(len(NAMES))]
    return SimpleNamespace(
        class_names=names, own_size=size, train_rows=torch.from_numpy(rows), name="fuzz", tabular=bool(rng.integers(2))
    )


def written(rng: Rng, names: tuple[str, ...], label: int, form: str) -> Any:
    """Returns a label in one of the ways that `form` allows."""
    if form == "texts":
        gaps = ["", "nan", "NA", " "] + ([] if "-1" in names else ["-1"])
        if label < 0:
            return gaps[rng.integers(len(gaps))]
        ways = [names[label], f" {names[label].upper()} "]
        if not ClassNames(names).are_numbers:
            ways.append(str(label))
        return ways[rng.integers(len(ways))]
    if label < 0:
        return np.nan if form == "floats" else -1
    return float(names[label]) if ClassNames(names).are_numbers else label


def write_labels(path: Path, columns: np.ndarray, rng: Rng) -> None:
    """Writes (n, annotators) values as `path` says."""
    if path.suffix == ".npz":
        alone = columns.shape[1] == 1 and rng.integers(2)
        np.savez(path, labels=columns[:, 0] if alone else columns)
    elif path.suffix == ".npy":
        np.save(path, columns)
    else:
        text = io.StringIO()
        rows = [[f"a{i}" for i in range(columns.shape[1])], *columns.tolist()]
        csv.writer(text, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
        data = text.getvalue().encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def labels_file(rng: Rng, folder: Path, dataset: Any) -> tuple[Path, np.ndarray, np.ndarray]:
    """Returns a file, its (n, annotators) values, and what they stand for."""
    ending = ["npz", "npy", "csv", "tsv", "csv.gz"][rng.integers(5)]
    numeric = ["ints", "floats"] if ending in ("npz", "npy") else []
    # Numbers have no gap where -1 is a class, and places from 0 only where all are.
    if "-1" in dataset.class_names or "0.5" in dataset.class_names:
        numeric = numeric[1:]
    form = ["texts", *numeric][rng.integers(1 + len(numeric))]
    truth = rng.integers(-1, len(dataset.class_names), (dataset.own_size, rng.integers(1, 4)))
    truth[: len(dataset.class_names)] = np.arange(len(dataset.class_names))[:, None]  # all classes are there
    values = np.array([[written(rng, dataset.class_names, label, form) for label in row] for row in truth.tolist()])
    path = folder / f"labels.{ending}"
    write_labels(path, values, rng)
    return path, values, truth


def right_labels(rng: Rng, folder: Path) -> str | None:
    dataset = a_set(rng)
    path, _, truth = labels_file(rng, folder, dataset)
    found = asked(lambda: read_label_file(path, (), dataset))
    if isinstance(found, (str, RuntimeError)):
        return f"{path.name} of {dataset.class_names} refused: {found}"
    expected = truth[dataset.train_rows.numpy()]
    return None if np.array_equal(found, expected) else f"{path.name} of {dataset.class_names}: other labels"


def wrong_labels(rng: Rng, folder: Path) -> str | None:
    dataset = a_set(rng)
    path, values, _ = labels_file(rng, folder, dataset)
    keys: tuple[str, ...] = ()
    fault = ["value", "longer", "shorter", "key", "object", "deep", "kind", "cut", "pickled", "gone"][rng.integers(10)]
    if fault == "value":
        odd_values = ["fox", "7", "-2", "1e9", "1e999", "0,5", "True?", "\x1b[31m", "x" * 5000]
        values = values.astype(object)
        values[rng.integers(len(values)), 0] = odd_values[rng.integers(len(odd_values))]
        write_labels(path, values.astype(str), rng)
    elif fault == "longer":
        write_labels(path, np.concatenate([values, values[:1]]), rng)
    elif fault == "shorter":
        write_labels(path, values[:-1], rng)
    elif fault == "key":
        keys = ("nobody",)
    elif fault in ("object", "deep", "kind"):
        path = folder / "labels.npz"
        odd_values = {
            "object": np.array([None] * dataset.own_size),
            "deep": np.zeros((dataset.own_size, 1, 2), int),
            "kind": np.zeros(dataset.own_size, ["complex64", "datetime64[s]", "V3"][rng.integers(3)]),
        }
        np.savez(path, labels=odd_values[fault])
    elif fault == "cut":
        path = folder / "labels.npz"
        np.savez(path, labels=values)
        path.write_bytes(path.read_bytes()[: int(rng.integers(0, 60))])
    elif fault == "pickled":
        path = path.rename(folder / "labels.pt")
    else:
        path.unlink()
    return refused(asked(lambda: read_label_file(path, keys, dataset)), f"{path.name}, {fault}")


def with_other_bytes(rng: Rng, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(len(data)))
        if rng.integers(2):
            data[place] = int(rng.integers(256))
        else:
            data[place : place + int(rng.integers(1, 4))] = b""
    path.write_bytes(bytes(data) or b" ")


def changed_labels(rng: Rng, folder: Path) -> str | None:
    dataset = a_set(rng)
    path, _, _ = labels_file(rng, folder, dataset)
    with_other_bytes(rng, path)
    found = asked(lambda: read_label_file(path, (), dataset))
    if isinstance(found, (str, RuntimeError)):
        return odd(found)
    if len(found) != len(dataset.train_rows) or found.min() < -1 or found.max() >= len(dataset.class_names):
        return "labels of another number, or of no class"
    return None


# ----------------------------------------------------------------------------------------------------------------- bags


def bags_file(rng: Rng, folder: Path) -> tuple[Path, np.ndarray, list[list[str]], tuple[str, ...], np.ndarray]:
    """Returns a file, the bag of each sample, its rows with their head, the classes, and each sample's class."""
    names = NAMES[rng.integers(len(NAMES))]
    count, size = int(rng.integers(2, 6)), int(rng.integers(12, 40))
    calls = [f"ward {b}" for b in range(count)] if rng.integers(2) else [str(7 * b) for b in range(count)]
    place = np.concatenate([np.arange(count), rng.integers(-1, count, size - count)])
    bag_of = np.array([name_of(calls[b]) if b >= 0 else "" for b in place.tolist()], dtype=object)
    truth = rng.integers(0, len(names), size)
    order = rng.permutation(len(names))
    rows = [["bag", *(names[label] for label in order)]]
    for bag in rng.permutation(count).tolist():
        counts = np.bincount(truth[place == bag], minlength=len(names))
        call = f"{calls[bag]}.0" if calls[bag].isdigit() and rng.integers(2) else calls[bag]
        rows.append([call, *(str(counts[label]) if rng.integers(2) else f"{counts[label]}.0" for label in order)])
    path = folder / "bags.csv"
    return path, bag_of, rows, names, truth


def write_rows(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def right_bags(rng: Rng, folder: Path) -> str | None:
    path, bag_of, rows, names, truth = bags_file(rng, folder)
    write_rows(path, rows)
    found = asked(lambda: read_bags(path, bag_of, names, False))
    if isinstance(found, (str, RuntimeError)):
        return f"refused: {found}"
    bag = found.bag.numpy()
    if not np.array_equal(bag < 0, bag_of == ""):
        return "other samples are in bags"
    for number, counts in enumerate(found.counts.tolist()):
        if len(set(bag_of[bag == number])) != 1:
            return "samples of several bags in one"
        if counts != np.bincount(truth[bag == number], minlength=len(names)).tolist():
            return "other counts"
    return None


def wrong_bags(rng: Rng, folder: Path) -> str | None:
    path, bag_of, rows, names, _ = bags_file(rng, folder)
    row, column = int(rng.integers(1, len(rows))), int(rng.integers(1, len(rows[0])))
    faults = [
        "sum",
        "negative",
        "part",
        "text",
        "twice",
        "no name",
        "unknown",
        "class",
        "class twice",
        "short",
        "sample",
    ]
    fault = faults[rng.integers(len(faults))]
    if fault == "sum":
        rows[row][column] = str(int(float(rows[row][column])) + 1)
    elif fault in ("negative", "part", "text"):
        rows[row][column] = {"negative": "-1", "part": "0.5", "text": ["", "many", "1e999", "nan"][rng.integers(4)]}[
            fault
        ]
    elif fault == "twice":
        rows.append(list(rows[row]))
    elif fault in ("no name", "unknown"):
        rows[row][0] = "" if fault == "no name" else "ward x"
    elif fault in ("class", "class twice"):
        rows[0][column] = "fox" if fault == "class" else rows[0][1 + column % (len(rows[0]) - 1)]
    elif fault == "short":
        rows[row].pop()
    else:
        bag_of[0] = "nowhere"
    write_rows(path, rows)
    return refused(asked(lambda: read_bags(path, bag_of, names, bool(rng.integers(2)))), fault)


def changed_bags(rng: Rng, folder: Path) -> str | None:
    path, bag_of, rows, names, _ = bags_file(rng, folder)
    write_rows(path, rows)
    with_other_bytes(rng, path)
    found = asked(lambda: read_bags(path, bag_of, names, False))
    if isinstance(found, (str, RuntimeError)):
        return odd(found)
    sizes = torch.bincount(found.bag[found.bag >= 0], minlength=len(found.counts))
    return None if torch.equal(found.counts.sum(1), sizes) and (found.counts >= 0).all() else "counts do not hold"


# -------------------------------------------------------------------------------------------------- labelling functions


class Rude:
    """An answer that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError

    __str__ = __hash__ = __eq__ = __repr__  # type: ignore[assignment]


def failing(sample: object) -> object:
    raise [KeyError, ZeroDivisionError, SystemExit, RecursionError, MemoryError][len(str(sample)) % 5]("a\nb" * 500)


def answers(rng: Rng, folder: Path) -> str | None:
    """Right answers are counted as votes for their class, all others as failures or no class."""
    names = NAMES[rng.integers(len(NAMES))]
    label = int(rng.integers(len(names)))
    right = [names[label], f" {names[label].upper()}\n", np.str_(names[label])]
    if ClassNames(names).are_numbers:
        right += [float(names[label]), np.float32(names[label])]
    else:
        right += [label, float(label), np.int64(label), np.uint8(label), torch.tensor(label), np.array(label)]
    silent = [None, "", "NA", float("nan"), np.nan] + ([-1, np.int8(-1)] if "-1" not in names else [])
    wrong: list[Any] = [[label], {}, "fox", 99, -2, 1e300, 10**400, 1j, b"\xff", Rude(), np.zeros(3), object, failing]
    wrong += [(n for n in [1]), np.datetime64(1, "s")]
    kind = ["right", "silent", "wrong", "failing", "arguments"][rng.integers(5)]
    pool = {"right": right, "silent": silent, "wrong": wrong}.get(kind, [None])
    answer = pool[rng.integers(len(pool))]
    function: Callable[..., Any] = {"failing": failing, "arguments": lambda a, b: 1}.get(kind, lambda sample: answer)
    found = asked(lambda: cast_votes([function], range(3), names))
    if isinstance(found, (str, RuntimeError)):
        return f"{kind}: {found}"
    (report,) = found.reports
    counted = {"right": report.votes, "silent": report.abstained, "wrong": report.invalid}.get(kind, report.failed)
    if report.asked != 3 or counted != 3:
        return f"{kind} answer {type(answer)} of {names}: {report}"
    if found.votes.tolist() != [[label if kind == "right" else -1]] * 3:
        return f"{kind} answer {type(answer)} of {names}: votes {found.votes.tolist()}"
    said = report.warning()
    if (said is None) != (kind in ("right", "silent")) or odd(said):
        return f"{kind}: said {said!r}"
    stopped = asked(lambda: cast_votes([function], range(3), names, stop=True))
    return None if isinstance(stopped, str) == (said is not None) and not odd(stopped) else f"{kind}: {stopped}"


PIECES = (
    "import numpy as np\n",
    "def f(x):\n    return 1\n",
    "class Thing:\n    pass\n",
    "_hidden = 3\n",
    "async def g(x):\n    return 1\n",
    "import nothing_of_that_name\n",
    "1 / 0\n",
    "raise SystemExit('bye')\n",
    "raise ValueError('a\\nb' * 900)\n",
    "labeling_functions = 3\n",
    "labeling_functions = [len, 'max']\n",
    "def (\n",
    "\x00\n",
    "é = lambda x: None\n",
    "@property\ndef h(x):\n    return 1\n",
    "exit()\n",
)


def modules(rng: Rng, folder: Path) -> str | None:
    path = folder / "mine.py"
    text = "".join(PIECES[place] for place in rng.integers(len(PIECES), size=int(rng.integers(0, 5))))
    path.write_bytes(text.encode(["utf-8", "latin-1"][rng.integers(2)]))
    found = asked(lambda: load_functions(str(path)))
    if isinstance(found, (str, RuntimeError)):
        return odd(found)
    return None if found and all(map(callable, found)) else f"no functions: {found}"


# -------------------------------------------------------------------------------------------------------------- clients


def clients(rng: Rng, folder: Path) -> str | None:
    count = int(rng.integers(1, 6))
    cells = [["hospital ", "", "0", "é"][rng.integers(4)] + str(place) for place in range(count)]
    owner = np.concatenate([np.arange(count), rng.integers(0, count, 20)])
    values = np.array([name_of(f" {cells[place]} ") for place in owner], dtype=object)
    fault = ["none", "none", "missing", "count"][rng.integers(4)]
    if fault == "missing":
        values[rng.integers(len(values))] = name_of(["", "NA", None, float("nan")][rng.integers(4)])
    config = PartitionConfig(kind="column", column="site")
    found = asked(lambda: column_owners(values, count + (fault == "count"), config))
    if fault != "none":
        return refused(found, fault)
    if isinstance(found, (str, RuntimeError)):
        distinct = len(set(values.tolist()))
        return odd(found) if distinct != count else f"refused: {found}"
    pairs = {(values[row], int(client)) for row, client in enumerate(found[0])}
    return None if len(pairs) == count and all(found[1][client] == name for name, client in pairs) else "other clients"
