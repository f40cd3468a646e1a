"""Tables: what is learnt from which rows, the files as they are distributed, and one message for each wrong thing."""

from __future__ import annotations

import gzip
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlabel.data.sets.config import SETS, DataConfig, DataError
from fedlabel.data.sets.datasets import Dataset, load_dataset
from fedlabel.data.sets.loaders import Split
from fedlabel.data.sets.tables import Table, encode

REAL = Path(__file__).parents[3].parent / "shared" / "data"
needs_real = pytest.mark.skipif(not (REAL / "tabular").is_dir(), reason="no folder ../shared/data with the real tables")

TABLES = sorted(name for name, entry in SETS.items() if entry.tabular)
ADULT_ROW = "{age}, {work}, 1, Bachelors, 13, Single, Sales, Wife, White, Female, 0, 0, 40, Peru, {income}"


def table(numbers: list[list[float]], categories: list[list[str]]) -> Table:
    return Table(np.array(numbers), np.array(categories), torch.zeros(len(numbers), dtype=torch.int64))


def values(split: Split) -> list[list[float]]:
    return split.images.flatten(1).tolist()


def write(path: Path, *lines: str, packed: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if packed else text)
    return path


def rows_of(n: int, changed: int = -1) -> list[str]:
    """Lines `size,colour,kind` of n rows; row `changed` is far off and has a colour that no other has."""
    lines = [f"{i % 7},{('red', 'blue')[i % 3 == 0]},{'ab'[i % 2]}" for i in range(n)]
    if changed >= 0:
        lines[changed] = f"1000000,pink,{'ab'[changed % 2]}"
    return lines


def load(path: Path, seed: int = 0, **keys: object) -> Dataset:
    load_dataset.cache_clear()
    config = {"label_column": "kind", "validation_fraction": 0.0, **keys}
    return load_dataset(DataConfig(name="table", root=str(path), **config), seed)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- features


def test_features_by_hand() -> None:
    """Train numbers 0, 0, missing, 4: the median 0 fills in, so mean 1 and variance (1 + 1 + 1 + 9) / 4 = 3.

    The second column is constant: all 0. Categories in order: b, r. Missing elsewhere is 0, too, and scaled.
    """
    nan = float("nan")
    train = table([[0, 7], [0, 7], [nan, 7], [4, 7]], [["r"], ["b"], ["r"], ["r"]])
    other = table([[nan, 8], [7, 7]], [["green"], ["b"]])
    made = encode(train, (other,))
    assert all(split.images.dtype == torch.float32 for split in made)
    assert made[0].images.shape == (4, 4, 1, 1)
    unit = 1 / 3**0.5
    expected = [[-unit, 0, 0, 1], [-unit, 0, 1, 0], [-unit, 0, 0, 1], [3 * unit, 0, 0, 1]]
    assert np.allclose(values(made[0]), expected)
    assert np.allclose(values(made[1]), [[-unit, 1, 0, 0], [6 * unit, 0, 1, 0]])  # an unknown colour is 0 everywhere


def test_only_numbers_only_categories_and_no_rows() -> None:
    numbers, texts = np.zeros((2, 0)), np.zeros((2, 0), dtype=str)
    labels = torch.tensor([1, 0])
    assert values(encode(Table(numbers, np.array([["x"], ["y"]]), labels), ())[0]) == [[1, 0], [0, 1]]
    train, empty = encode(table := Table(np.array([[1.0], [3.0]]), texts, labels), (table.rows(labels[:0]),))
    assert values(train) == [[-1], [1]]
    assert train.labels.tolist() == [1, 0]
    assert empty.images.shape == (0, 1, 1, 1)
    nothing_known = encode(Table(np.array([[float("nan")], [float("nan")]]), texts, labels), ())[0]
    assert values(nothing_known) == [[0], [0]]


def changed_rows(before: Dataset, after: Dataset, part: str) -> Tensor:
    one, two = getattr(before, part).images, getattr(after, part).images
    return (one != two).flatten(1).any(1)


@pytest.mark.parametrize("part", ["test", "validation"])
def test_rows_that_are_not_trained_on_change_no_feature_of_others(tmp_path: Path, part: str) -> None:
    """A row with a huge number and a new category, in turn at every place: only where it is trained on others move."""
    fraction = {"validation_fraction": 0.25}
    before = load(write(tmp_path / "a.csv", "size,colour,kind", *rows_of(40)), **fraction)
    seen = 0
    for place in range(40):
        lines = rows_of(40, changed=place)
        after = load(write(tmp_path / "b.csv", "size,colour,kind", *lines), **fraction)
        if before.train.images.shape != after.train.images.shape:  # pink was learnt
            continue
        assert torch.equal(before.train.images, after.train.images)
        moved = {name: int(changed_rows(before, after, name).sum()) for name in ("test", "validation")}
        assert sum(moved.values()) == 1
        seen += moved[part]
    assert seen == len(getattr(before, part).labels) > 5


def test_training_rows_are_what_is_standardised(tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.csv", "size,colour,kind", *rows_of(100)), validation_fraction=0.3, train_samples=40)
    size = data.train.images[:, 0].double()
    assert size.mean().item() == pytest.approx(0, abs=1e-6)
    assert size.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert abs(data.validation.images[:, 0].mean().item()) > 1e-3
    assert data.train.images[:, 1:].unique().tolist() == [0, 1]
    assert (data.mean, data.std) == ((0.0,) * 3, (1.0,) * 3)


# ---------------------------------------------------------------------------------------------------------- data sets


def test_breast_cancer() -> None:
    data = load_dataset(DataConfig("breast_cancer"), seed=0)
    assert (data.input_shape, data.class_names, data.tabular) == ((30, 1, 1), ("malignant", "benign"), True)
    assert not data.allow_flip
    assert (len(data.train.labels), len(data.validation.labels), len(data.test.labels)) == (410, 45, 114)
    assert torch.bincount(data.test.labels).tolist() == [42, 72]  # 212 and 357 of 569
    assert not load_dataset(DataConfig(), seed=0).tabular


def test_the_test_set_does_not_follow_the_seed() -> None:
    one, two = (load_dataset(DataConfig("breast_cancer", validation_fraction=0.0), seed=seed) for seed in (1, 2))
    assert torch.equal(one.test.images, two.test.images)
    assert one.test.labels.nonzero().flatten()[:8].tolist() == [
        10,
        15,
        19,
        20,
        21,
        22,
        23,
        24,
    ]
    half = load_dataset(DataConfig("breast_cancer", test_fraction=0.5), seed=1)
    assert len(half.test.labels) == 285


def write_adult(folder: Path, packed: bool = False) -> None:
    suffix = ".gz" if packed else ""
    train = [ADULT_ROW.format(age=20 + i, work="?" if i == 0 else "Private", income="<=50K") for i in range(3)]
    train.append(ADULT_ROW.format(age=60, work="Private", income=">50K"))
    test = [ADULT_ROW.format(age=21, work="?", income=">50K."), ADULT_ROW.format(age=21, work="Never", income="<=50K.")]
    write(folder / f"adult.data{suffix}", *train, "", packed=packed)
    write(folder / f"adult.test{suffix}", "|1x3 Cross validator", *test, "", packed=packed)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("folder", ["tabular/adult", "adult", "."])
def test_adult(tmp_path: Path, folder: str, packed: bool) -> None:
    """6 numbers; workclass has the categories ? and Private, of which the test set's Never is neither; 7 more texts."""
    write_adult(tmp_path / folder, packed)
    data = load_dataset(DataConfig("adult", str(tmp_path), validation_fraction=0.0), seed=0)
    assert data.class_names == ("<=50K", ">50K")
    assert data.train.labels.tolist() == [0, 0, 0, 1]
    assert data.test.labels.tolist() == [1, 0]
    assert data.train.images[:, 6:8].flatten(1).tolist() == [[1, 0], [0, 1], [0, 1], [0, 1]]
    assert data.test.images[:, 6:8].flatten(1).tolist() == [[1, 0], [0, 0]]
    assert data.input_shape == (6 + 2 + 7, 1, 1)
    assert torch.equal(data.test.images[:, 0], data.train.images[1, 0].expand(2, 1, 1))  # age 21


def test_bank_marketing_leaves_out_what_tells_the_label(tmp_path: Path) -> None:
    lines = [f'{i};"{("admin.", "services")[i % 2]}";{100 * i};"{("no", "yes")[i >= 15]}"' for i in range(20)]
    write(tmp_path / "bank-marketing" / "bank-full.csv.gz", '"age";"job";"duration";"y"', *lines, packed=True)
    config = DataConfig("bank_marketing", str(tmp_path), validation_fraction=0.0)
    data, all_columns = (load_dataset(each, 0) for each in (config, replace(config, drop_columns=())))
    assert data.class_names == ("no", "yes")
    assert (data.input_shape, all_columns.input_shape) == ((3, 1, 1), (4, 1, 1))
    assert torch.bincount(data.test.labels).tolist() == [3, 1]


def test_magic(tmp_path: Path) -> None:
    lines = [",".join(map(str, range(i, i + 10))) + "," + "gh"[i % 2] for i in range(20)]
    write(tmp_path / "magic04.data", *lines)
    data = load_dataset(DataConfig("magic", str(tmp_path)), seed=0)
    assert (data.input_shape, data.class_names) == ((10, 1, 1), ("h", "g"))


@pytest.mark.parametrize("name", ["adult", "bank_marketing", "magic"])
def test_a_missing_set_says_where_it_was_sought_and_where_it_comes_from(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(DataConfig(name, str(tmp_path)), seed=0)
    message = str(caught.value)
    assert f"`data.name` (={name}): there is no " in message
    assert f"{tmp_path / 'tabular'}" in message
    assert "https://archive.ics.uci.edu/dataset/" in message
    assert "data.root=" in message


# ----------------------------------------------------------------------------------------------- a table of the user's


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("packed", [True, False])
def test_csv_with_quotes_blanks_and_missing_cells(tmp_path: Path, separator: str, packed: bool) -> None:
    """Weights 1, 3 and 2 with one missing: the median 2 fills in. Label 10 comes after 9, and names stay texts."""
    lines = [
        '"weight";"my; name";class',
        '1;"a;b";9',
        " 3 ; c;10",
        "NA;c;9",
        '2;"a;b";10',
    ]
    text = [line.replace(";", separator) for line in lines]
    path = write(tmp_path / "set.csv", *text, packed=packed)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() if not packed else path.read_bytes())
    data = load(path, label_column="class", test_file="set.csv")
    assert data.class_names == ("9", "10")
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    far = 2**0.5
    assert np.allclose(values(data.train), [[-far, 1, 0], [far, 0, 1], [0, 0, 1], [0, 1, 0]])
    assert values(data.test) == values(data.train)
    assert load(path, label_column="class", test_file="set.csv", drop_columns=["weight"]).input_shape == (2, 1, 1)


def test_columns_set_aside_are_kept_in_every_split_but_are_no_features(tmp_path: Path) -> None:
    lines = [f"{row},ward{i}" for i, row in enumerate(rows_of(40))]
    path = write(tmp_path / "a.csv", "size,colour,kind,ward", *lines)
    data = load(path, aside_columns=["ward", "size"], validation_fraction=0.25)
    assert data.input_shape == (2, 1, 1)
    rows = [data.tables[part].column("ward").tolist() for part in ("train", "validation", "test")]
    assert list(map(len, rows)) == [24, 8, 8]
    assert rows[0] == [f"ward{row}" for row in data.train_rows.tolist()]
    assert sorted(rows[0] + rows[1] + rows[2]) == sorted(f"ward{i}" for i in range(40))
    assert data.feature("size", "test").tolist() == [str(int(row[4:]) % 7) for row in rows[2]]
    assert list(data.sample(0)) == ["colour"]
    with pytest.raises(DataError, match=r"`data.aside_columns`: .*no column site, only size, colour, ward"):
        load(path, aside_columns=["site"])


def test_columns_can_be_dropped_and_declared_categories(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "size,colour,kind", *rows_of(40))
    assert load(path).input_shape == (1 + 2, 1, 1)
    assert load(path, categorical=["size", "colour"]).input_shape == (7 + 2, 1, 1)
    assert load(path, drop_columns=["colour"]).input_shape == (1, 1, 1)
    assert len(load(path, test_fraction=0.5).test.labels) == 20
    assert load(path).own_size == 40  # rows of the file, test rows among them


@pytest.mark.parametrize(
    ("lines", "keys", "message"),
    [
        (["size,colour,kind"], {}, "holds no rows"),
        ([], {}, "holds no rows"),
        (["size,kind,size", "1,a,2"], {}, "two columns of the name `size`"),
        (["size,kind", "1,a", "2"], {}, "line 3: there are 1 cells for 2 columns"),
        (["size,kind", '1,"a'], {}, "cannot be read as CSV"),
        (["size,kind", *["1,a", "2,b"] * 5, "3,c"], {}, r"class `c` has one row \(data row 11\)"),
        (["size,kind", *["1,", "2,NA"] * 5], {}, "column kind has no label in any row"),
        (["size,kind", *["1,a"] * 9, "2,b"], {}, r"`data.test_fraction` \(=0.2\) .*10 rows of 2 classes"),
        (["size,kind", *["1,a", "inf,b"] * 9], {}, "column size, data row 2: `inf`, infinity"),
        (["size,kind", *["1,a", "2,b"] * 9], {"drop_columns": ["size"]}, "leaves no column"),
        (["size,kind", *["1,a", "2,b"] * 9], {"drop_columns": ["sise"]}, "has no column sise, only size"),
        (["size,kind", *["1,a", "2,b"] * 9], {"categorical": ["sise"]}, "`data.categorical`: .*no column sise"),
        (["size,kind", *["x,a", "2,b"] * 9], {}, "column size, data row 3: `x`, .* 7 of its 14 training cells are num"),
        (
            ["size,kind", *["1,a", "2,b"] * 9],
            {"label_column": "sort"},
            r"`data.label_column` \(=sort\).*only size, kind",
        ),
        (["size,kind", *["1,a", "2,a"] * 9], {}, "has 1 class; at least 2"),
        (["id,kind", *[f"n{i},{'ab'[i % 2]}" for i in range(1300)]], {}, r"column id has 1040 .*drop_columns=\[id\]"),
    ],
)
def test_errors_name_the_file_and_what_is_wrong(tmp_path: Path, lines: list[str], keys: dict, message: str) -> None:
    path = write(tmp_path / "mine.csv", *lines)
    with pytest.raises(DataError, match=message) as caught:
        load(path, **keys)
    assert "mine.csv" in str(caught.value) or "drop_columns" in keys


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["size,kind", "1,c"], r"test.csv: data row 1 has the label `c`, which is none of a, b"),
        (["size,sort", "1,a"], r"\(=kind\): .*test.csv has no such column"),
        (["kind", "a"], "must have the same columns; only one of them has size"),
        (["size,kind", "1,a", "large,a"], "test.csv: column size, data row 2: `large` is no number"),
        (["size,kind", "1,a", "1,", "1,?"], "column kind has no label in data row 2 .of 2 without."),
    ],
)
def test_a_test_file_that_does_not_fit(tmp_path: Path, lines: list[str], message: str) -> None:
    write(tmp_path / "test.csv", *lines)
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "mine.csv", "size,kind", *["1,a", "2,b"] * 9), test_file="test.csv")


@pytest.mark.parametrize("damage", ["cut", "latin"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "mine.csv", "size,colour,kind", *rows_of(40), packed=damage == "cut")
    content = path.read_bytes()
    path.write_bytes(content[:-20] if damage == "cut" else content + b"1,gr\xfcn,a\n")
    with pytest.raises(DataError, match=r"mine\.csv cannot be read as CSV"):
        load(path)
    with pytest.raises(DataError, match=r"`data.root` .*there is no file .*other.csv"):
        load(tmp_path / "other.csv")
    with pytest.raises(DataError, match=r"`data.test_file` \(=other.csv\): there is no file .*other.csv"):
        load(write(path, "size,kind", "1,a"), test_file="other.csv")


def test_parquet_gives_what_csv_gives(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    size = [None if i == 3 else i / 3 for i in range(40)]
    colour = [None if i == 5 else ("red", "blue")[i % 3 == 0] for i in range(40)]
    kind = [i % 2 for i in range(40)]
    parquet.write_table(pyarrow.table({"size": size, "colour": colour, "kind": kind}), tmp_path / "set.parquet")
    cells = [("" if s is None else str(s), c or "", str(k)) for s, c, k in zip(size, colour, kind, strict=True)]
    csv = load(write(tmp_path / "set.csv", "size,colour,kind", *map(",".join, cells)))
    data = load(tmp_path / "set.parquet")
    assert torch.equal(data.train.images, csv.train.images)
    assert torch.equal(data.test.labels, csv.test.labels)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1hello")
    with pytest.raises(DataError, match=r"bad\.parquet cannot be read as a Parquet file"):
        load(tmp_path / "bad.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"set\.parquet: Parquet files are read by pyarrow, which is not installed"):
        load(write(tmp_path / "set.parquet", "x"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "table"}, r"`data.label_column` \(=None\) must name the column"),
        ({"label_column": "y"}, r"`data.label_column` \(=y\) is for data.name=table, not for digits"),
        ({"name": "adult", "test_file": "y"}, r"`data.test_file` \(=y\) is for data.name=table, not for adult"),
        ({"drop_columns": ("y",)}, r"`data.drop_columns` \(=\['y'\]\) is for tables, not for digits"),
        ({"categorical": ()}, r"`data.categorical` \(=\[\]\) is for tables, not for digits"),
        ({"aside_columns": ("y",)}, r"`data.aside_columns` \(=\['y'\]\) is for tables, not for digits"),
        ({"name": "magic", "test_fraction": 1.0}, r"`data.test_fraction` \(=1.0\) must lie in \(0, 1\)"),
    ],
)
def test_keys_of_other_sets_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**keys)


# ------------------------------------------------------------------------------------------------- two of many classes


def test_positive_classes_are_put_together() -> None:
    whole = load_dataset(DataConfig(), seed=0)
    data = load_dataset(DataConfig(positive_classes=("3", "8")), seed=0)
    assert data.class_names == ("rest", "3+8")
    assert data.name == "digits (3+8 against the rest)"
    for part in ("train", "validation", "test"):
        one, two = getattr(whole, part), getattr(data, part)
        assert torch.equal(one.images, two.images)
        assert torch.equal(two.labels, ((one.labels == 3) | (one.labels == 8)).long())
    assert torch.equal(whole.train_rows, data.train_rows)


def test_names_come_before_numbers(tmp_path: Path) -> None:
    """Class 0 is called 1, class 1 is called 0, class 2 is called ten."""
    images, labels = np.zeros((30, 2, 2), np.uint8), np.arange(30) % 3
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "set.npz", class_names=np.array(["1", "0", "ten"]), **arrays)
    config = DataConfig("npz", str(tmp_path / "set.npz"), validation_fraction=0.0)
    for given, positive in (("1", 0), ("ten", 2), ("2", 2)):
        data = load_dataset(replace(config, positive_classes=(given,)), seed=0)
        assert torch.equal(data.train.labels, torch.from_numpy((labels == positive).astype(np.int64)))
    data = load_dataset(DataConfig("breast_cancer", positive_classes=("malignant",)), seed=0)
    assert torch.bincount(data.test.labels).tolist() == [72, 42]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("ship",), r"\(=\[ship\]\): ship is none of the classes 0, 1, .*, 9\."),
        (("10",), "10 is none of the classes 0, 1, "),
        (("-1",), "-1 is none of the classes 0, 1, "),
        (("3", "3"), "names a class twice: 3, 3"),
        (tuple("0123456789"), "names all 10 classes, which leaves none for the rest"),
    ],
)
def test_positive_classes_that_make_no_task(classes: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=f"`data.positive_classes` .*{message}"):
        load_dataset(DataConfig(positive_classes=classes), seed=0)


@needs_real
def test_animals_against_machines() -> None:
    config = DataConfig("cifar10", str(REAL), positive_classes=("airplane", "automobile", "8", "truck"))
    data = load_dataset(config, seed=0)
    assert data.class_names == ("rest", "airplane+automobile+ship+truck")
    assert torch.bincount(data.test.labels).tolist() == [6000, 4000]


# -------------------------------------------------------------------------------------------------------- real tables


@needs_real
@pytest.mark.parametrize(
    ("name", "shape", "train", "test"),
    [
        ("adult", (108, 1, 1), [24720, 7841], [12435, 3846]),  # as adult.names says: 32,561 and 16,281 rows
        ("bank_marketing", (50, 1, 1), [31937, 4231], [7985, 1058]),  # bank-names.txt: 45,211 rows, 5,289 of them yes
        ("magic", (10, 1, 1), [5350, 9866], [1338, 2466]),  # magic04.names: 12,332 gamma, 6,688 hadron
    ],
)
def test_real_tables(name: str, shape: tuple[int, int, int], train: list[int], test: list[int]) -> None:
    data = load_dataset(DataConfig(name, str(REAL), validation_fraction=0.0), seed=0)
    assert data.input_shape == shape
    assert torch.bincount(data.train.labels).tolist() == train
    assert torch.bincount(data.test.labels).tolist() == test
    assert all(torch.isfinite(split.images).all() for split in (data.train, data.test))
