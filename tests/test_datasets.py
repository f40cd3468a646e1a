"""Data from Python: each form becomes a data set that a run, its workers and its resumption find again."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import fedlabel
from fedlabel import datasets
from fedlabel.config import load_config
from fedlabel.config_text import ConfigError
from fedlabel.data.partition import PartitionConfig
from fedlabel.data.sets.config import DataConfig, DataError
from fedlabel.data.sets.datasets import Dataset, load_dataset
from fedlabel.experiment import Experiment
from fedlabel.settings import Settings, as_layer
from tests.models.own_nets import Plain, Words

QUICK: Settings = {
    "num_clients": 3,
    "num_rounds": 1,
    "fraction_train": 1.0,
    "supervision": {"label_rate": 0.5},
    "training": {"local_steps": 2, "batch_size": 8},
    "evaluation": {"figures": False},
    "device": "cpu",
}
OWNED = (
    "partition.kind=column",
    "partition.column=client",
    "num_clients=3",
    "model.name=mlp",
    "supervision.label_rate=0.9",
)
RNG = np.random.default_rng(0)


def loaded(data: datasets.OwnData, out: Path, **fields: Any) -> Dataset:
    keys = data.save(out)["data"]
    return load_dataset(DataConfig(**{**keys, "validation_fraction": 0.0, **fields}), 0)


def blobs(n: int, shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of two classes, dark and bright."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    noise = rng.integers(0, 100, (n, *shape))
    return (noise + 100 * labels.reshape(-1, *[1] * len(shape))).astype(np.uint8), labels


def test_arrays_are_kept_once_under_their_content(tmp_path: Path) -> None:
    x, y = blobs(20, (6, 5))
    data = datasets.from_arrays(x, y, x[:4], y[:4], class_names=["dark", "bright"])
    dataset = loaded(data, tmp_path)
    assert np.array_equal(dataset.train.images[:, 0].numpy(), x)
    assert dataset.class_names == ("dark", "bright")
    again = datasets.from_arrays(torch.from_numpy(x), list(y), x[:4], y[:4], class_names=["dark", "bright"])
    assert again.save(tmp_path) == data.save(tmp_path)
    assert len(list((tmp_path / ".data").iterdir())) == 1
    datasets.from_arrays(x, 1 - y, x[:4], y[:4]).save(tmp_path)
    assert len(list((tmp_path / ".data").iterdir())) == 2


@pytest.mark.parametrize(("shape", "axis"), [((4, 9, 7), 1), ((9, 7, 5), 3), ((9, 7, 3), None), ((12, 7), None)])
@pytest.mark.parametrize("model", ["cnn", "resnet8", Plain])
def test_images_of_many_channels_and_no_square(
    shape: tuple[int, ...], axis: int | None, model: Any, tmp_path: Path
) -> None:
    """Whole runs with strong views; the model takes them in the form in which they came."""
    x, y = blobs(60, shape)
    data = datasets.from_arrays(x, y, x[:20], y[:20], channel_axis=axis)
    settings: Settings = {**QUICK, "augment": {"num_ops": 3, "cutout": 0.3}}
    result = fedlabel.run(name="x", out=tmp_path, data=data, model=model, method="fixmatch", **settings)
    channels = 1 if len(shape) == 2 else shape[0] if axis == 1 else shape[2]
    assert result.card.schema.shape[0] == channels
    right = (result.predict(x[:20]).index == y[:20]).mean()
    assert right == result.metrics[-1]["eval/accuracy"]


def test_a_strong_view_of_many_channels_moves_them_alike() -> None:
    """Geometric operations are the same in all channels of an image; those of values go by each channel alone."""
    from fedlabel.data.augment import AugmentConfig, strong
    from fedlabel.seeding import Draws

    grey = torch.from_numpy(RNG.integers(0, 256, (40, 1, 8, 6)).astype(np.uint8))
    config = AugmentConfig(num_ops=2, magnitude=20)
    one = strong(grey, Draws(torch.Generator().manual_seed(1)), config, flip=True)
    five = strong(grey.repeat(1, 5, 1, 1), Draws(torch.Generator().manual_seed(1)), config, flip=True)
    assert not torch.equal(one, grey)
    for channel in range(5):
        assert torch.equal(five[:, channel : channel + 1], one)


def test_clients_are_who_owns_the_samples(tmp_path: Path) -> None:
    x, y = blobs(30, (6, 5))
    names = np.array(["b", "a", "c"])[np.arange(30) % 3]
    settings: Settings = {**QUICK}
    del settings["num_clients"]
    result = fedlabel.run(
        name="x", out=tmp_path, data=datasets.from_arrays(x, y, x, y, client=names), model="mlp", **settings
    )
    assert result.config.num_clients == 3
    federation = Experiment(result.config).federation
    for client, rows in enumerate(federation.parts):
        assert set(names[federation.dataset.train_rows.numpy()[rows]]) == {"abc"[client]}
    mapping = {name: np.flatnonzero(names == name).tolist() for name in "abc"}
    same = datasets.from_arrays(x, y, x, y, client=mapping)
    assert same.save(tmp_path) == datasets.from_arrays(x, y, x, y, client=names).save(tmp_path)


@pytest.mark.parametrize(
    ("client", "message"),
    [
        (["a"] * 5, r"`client` has shape \(5,\)"),
        ({"a": range(30), "b": [3]}, "sample 3 is owned by a and by b"),
        ({"a": range(29)}, "says nothing of 1 of 30 samples, e.g. 29"),
        ({"a": [30]}, "a owns sample 30, and there are 30"),
    ],
)
def test_owners_that_are_none(client: Any, message: str) -> None:
    x, y = blobs(30, (6, 5))
    with pytest.raises(DataError, match=message):
        datasets.from_arrays(x, y, x, y, client=client)
    with pytest.raises(DataError, match="and `client` is None: give both"):
        datasets.from_arrays(x, y, x, y, client_test=client)


def tokens(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sentences of 12 words; those of class 1 use the second half of the vocabulary more often."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    return (rng.integers(1, 12, (n, 12)) + 8 * y[:, None]).astype(np.int64), y


def test_tokens_with_a_network_of_ones_own(tmp_path: Path) -> None:
    """Measured: 0.95 and more after three rounds, seeds 0 to 4. No word becomes another one by augmentation."""
    x, y = tokens(200, 0)
    x_test, y_test = tokens(100, 1)
    data = datasets.from_arrays(x, y, x_test, y_test)
    settings: Settings = {**QUICK, "num_rounds": 3, "training": {"local_steps": 20, "lr": 0.5}}
    result = fedlabel.run(name="x", out=tmp_path, data=data, model=Words, method="fixmatch", **settings)
    assert result.metrics[-1]["eval/accuracy"] > 0.9
    assert (result.predict(x_test).index == y_test).mean() == result.metrics[-1]["eval/accuracy"]
    experiment = Experiment(result.config)
    images = experiment.images[:50]
    from fedlabel.seeding import Draws

    views = experiment.transform.views(images, ("weak", "strong"), Draws(torch.Generator().manual_seed(0)))
    assert torch.equal(views["weak"], images)
    changed = views["strong"] != images
    assert changed.any()
    assert not views["strong"][changed].any()  # 0 is no word
    with pytest.raises(ValueError, match="as x_train of the run: an array of shape .12,. for each sample"):
        result.predict(x_test[:, :5])


def test_signals_are_used_as_they_are(tmp_path: Path) -> None:
    x = RNG.normal(size=(40, 3, 10)).astype(np.float32)
    y = (x.mean((1, 2)) > 0).astype(int)
    data = datasets.from_arrays(x, y, x[:10], y[:10], images=False)
    dataset = loaded(data, tmp_path)
    assert torch.equal(dataset.train.images, torch.from_numpy(x)[..., None])
    assert not dataset.discrete
    result = fedlabel.run(name="x", out=tmp_path, data=data, model="mlp", **QUICK)
    assert (result.predict(x[:10]).index == y[:10]).mean() == result.metrics[-1]["eval/accuracy"]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.full((4, 3), np.nan), "holds values from nan to nan"),
        (np.full((4, 3), 2**25), r"single precision holds each one up to 2\^24"),
        (np.full((4, 3), "a"), "must hold numbers"),
        (np.zeros(4), "must hold numbers"),
    ],
)
def test_arrays_that_are_no_inputs(x: np.ndarray, message: str, tmp_path: Path) -> None:
    y = [0, 1, 0, 1]
    with pytest.raises(DataError, match=message):
        loaded(datasets.from_arrays(x, y, x, y, images=False), tmp_path)


def test_a_table_with_owners(tmp_path: Path) -> None:
    """Codes that Python holds as texts are categories; whose a row is, is no feature; each client has its own."""
    n = 90
    frame = pandas.DataFrame(
        {
            "size": pandas.array([None if row % 7 == 0 else row % 2 + row % 5 for row in range(n)], dtype="Int64"),
            "code": [str(number % 4) for number in range(n)],
            "town": pandas.Categorical(np.array(["x", "y"])[np.arange(n) % 2]),
            "ward": [f"ward {number % 3}" for number in range(n)],
            "sick": np.arange(n) % 2 == 0,
        }
    )
    data = datasets.from_table(frame, label="sick", client="ward")
    assert (data.column, data.num_clients) == ("ward", 3)
    assert data.data == {"name": "table", "label_column": "sick", "categorical": ["code"]}
    settings: Settings = {**QUICK, "model": "mlp"}
    del settings["num_clients"]
    result = fedlabel.run(name="x", out=tmp_path, data=data, **settings)
    assert [column.name for column in result.card.schema.columns] == ["size", "code", "town"]
    assert [column.kind for column in result.card.schema.columns] == ["number", "category", "category"]
    assert len(result.predict(frame)) == n
    federation = Experiment(result.config).federation
    for client, rows in enumerate(federation.parts):
        assert set(federation.dataset.tables["train"].aside["ward"][rows]) == {f"ward {client}"}
    own_test = datasets.from_table(frame[:60], label="sick", test=frame[60:].to_dict("list"), drop=["ward"])
    dataset = loaded(own_test, tmp_path)
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (60, 30)
    with pytest.raises(DataError, match=r"`label` \(=sik\) is no column of the table.*Did you mean sick"):
        datasets.from_table(frame, label="sik")
    with pytest.raises(DataError, match="must be a pandas table"):
        datasets.from_table([1, 2], label="sick")
    with pytest.raises(DataError, match="columns of one length"):
        datasets.from_table({"a": [1], "b": [1, 2]}, label="a")


def test_clients_are_counted_after_the_test_set_is_split_off(tmp_path: Path) -> None:
    """Of 40 owners of two rows some have none left for training; and a number that is given stays."""
    table = {
        "x": list(range(80)),
        "sick": [row % 2 for row in range(80)],
        "ward": [f"w{row // 2}" for row in range(80)],
    }
    data = datasets.from_table(table, label="sick", client="ward")
    settings: Settings = {**QUICK, "model": "mlp", "partition": {"min_samples": 1}}
    del settings["num_clients"]
    result = fedlabel.run(name="x", out=tmp_path, data=data, **settings)
    train = Experiment(result.config).federation.dataset.tables["train"]
    assert result.config.num_clients == len(set(train.aside["ward"])) < data.num_clients == 40
    assert (result.config.partition.kind, result.config.partition.min_samples) == ("column", 1)
    more = fedlabel.run(overrides=["num_rounds=2"], name="x", out=tmp_path, resume=True, data=data)
    assert more.config.num_clients == result.config.num_clients
    for given in ({"overrides": ["num_clients=40"]}, {"num_clients": 40}):
        with pytest.raises(ValueError, match=r"and each is a client: set num_clients=\d+ \(=40\)"):
            fedlabel.run(name="y", out=tmp_path, data=data, **{**settings, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize("partition", ["iid", {"kind": "iid"}, {"column": "other"}, PartitionConfig()])
def test_a_partition_that_contradicts_the_owners_is_refused(partition: Any, tmp_path: Path) -> None:
    x, y = blobs(6, (6, 5))
    data = datasets.from_arrays(x, y, x, y, client=list("aabbcc"))
    for settings in ({"data": data, "partition": partition}, {"partition": partition, "data": data}):
        with pytest.raises(ConfigError, match=r"`partition.(kind|column)` \(=.*\) contradicts `client`"):
            as_layer(settings, tmp_path)


def test_images_with_a_palette_are_their_colours() -> None:
    """By the rule of image files: grey if all are, else in colour."""
    colours = np.array([[[255, 0, 0], [0, 0, 255]], [[0, 255, 0], [9, 9, 9]]], np.uint8)
    palette = Image.fromarray(colours).quantize(4)
    grey = Image.fromarray(colours[..., 0])
    stacked, _ = datasets._stacked([(palette, 0), (grey, 1)], "train")
    assert np.array_equal(stacked, np.stack([colours, np.repeat(colours[..., :1], 3, 2)]))
    stacked, _ = datasets._stacked([(grey.quantize(4), 0), (grey.convert("1"), 1)], "train")
    assert np.array_equal(stacked[0], colours[..., 0])
    assert set(stacked[1].flat) <= {0, 255}
    with pytest.raises(DataError, match="image 0 has more than 8 bits a pixel; 1 of 2 have"):
        datasets._stacked([(Image.new("I;16", (2, 2)), 0), (grey, 0)], "train")


def test_a_torch_dataset(tmp_path: Path) -> None:
    x, y = blobs(20, (4, 6, 5))
    sets = [TensorDataset(torch.from_numpy(x[part]), torch.from_numpy(y[part])) for part in (slice(16), slice(16, 20))]
    dataset = loaded(datasets.from_torch(*sets), tmp_path)
    assert np.array_equal(dataset.train.images.numpy(), x[:16])
    assert dataset.test.labels.tolist() == y[16:].tolist()
    with pytest.raises(DataError, match="item 0 must be a pair"):
        datasets.from_torch(TensorDataset(torch.zeros(2, 3)), sets[1])
    with pytest.raises(DataError, match="inputs of 2 shapes"):
        datasets.from_torch([(np.zeros((2, 2)), 0), (np.zeros((3, 2)), 0)], sets[1])
    with pytest.raises(DataError, match="holds no sample"):
        datasets.from_torch([], sets[1])


class Part(dict[str, list[Any]]):
    """A split as Hugging Face's package gives it."""

    features: ClassVar = {"label": types.SimpleNamespace(names=["no", "yes"])}

    @property
    def column_names(self) -> list[str]:
        return list(self)


def test_a_hugging_face_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = tokens(12, 0)
    part = Part(ids=x.tolist(), label=y.tolist(), who=["a", "b"] * 6)
    with pytest.raises(DataError, match="read by the package datasets, which is not installed"):
        datasets.from_huggingface(tmp_path)
    monkeypatch.setitem(
        sys.modules, "datasets", types.SimpleNamespace(load_from_disk=lambda path: {"train": part, "test": part})
    )
    data = datasets.from_huggingface(tmp_path, inputs="ids", client="who")
    assert data.num_clients == 2
    dataset = loaded(data, tmp_path)
    assert dataset.class_names == ("no", "yes")
    assert dataset.discrete
    assert torch.equal(dataset.train.images[:, :, 0, 0], torch.from_numpy(x).float())
    with pytest.raises(DataError, match="There is no split valid"):
        datasets.from_huggingface({"train": part}, inputs="ids", test="valid")
    with pytest.raises(DataError, match="has no column id, only ids, label, who. Did you mean ids"):
        datasets.from_huggingface({"train": part, "test": part}, inputs="id")


def test_leaf(tmp_path: Path) -> None:
    x, y = blobs(12, (6, 5))
    flat = (x.reshape(12, -1) / 255).round(6).tolist()
    users = {f"f{number}": list(range(number, 12, 3)) for number in range(3)}
    content = {user: {"x": [flat[r] for r in rows], "y": [int(y[r]) for r in rows]} for user, rows in users.items()}
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        for place, some in enumerate((["f0"], ["f1", "f2"])):
            text = json.dumps({"users": some, "user_data": {user: content[user] for user in some}})
            (tmp_path / name / f"{place}.json").write_text(text)
    data = datasets.from_leaf(tmp_path / "train", tmp_path / "test", shape=(6, 5))
    assert (data.num_clients, data.data["name"]) == (3, "npz")
    dataset = loaded(data, tmp_path)
    keys = [f"data.{key}={value}" for key, value in data.save(tmp_path)["data"].items()]
    tested = Experiment(load_config([], [*keys, *OWNED])).federation.test_parts
    assert [rows.tolist() for rows in tested] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    order = [row for rows in users.values() for row in rows]
    assert np.array_equal(dataset.train.images[:, 0].numpy(), x[order])
    with pytest.raises(DataError, match="does not fit inputs of shape"):
        datasets.from_leaf(tmp_path / "train", tmp_path / "test", shape=(7, 5))
    with pytest.raises(DataError, match="There is no .json file"):
        datasets.from_leaf(tmp_path / "none", tmp_path / "test")
    (tmp_path / "bad.json").write_text('{"users": ["a"], "user_data": {}}')
    with pytest.raises(DataError, match="is not in LEAF's form.*KeyError"):
        datasets.from_leaf(tmp_path / "bad.json", tmp_path / "test")


def test_arrays_of_objects_and_single_values_are_refused() -> None:
    x, y = blobs(4, (6, 5))
    with pytest.raises(DataError, match="`x_train` holds Python objects"):
        datasets.from_arrays(np.array([x[0], x[1][:2]], dtype=object), y, x, y)
    with pytest.raises(DataError, match="`y_train` is a single int"):
        datasets.from_arrays(x, 3, x, y)
    with pytest.raises(DataError, match=r"`channel_axis` \(=2\) must be 1 or 3"):
        datasets.from_arrays(x, y, x, y, channel_axis=2)


def test_a_run_is_resumed_from_what_was_kept(tmp_path: Path) -> None:
    """The command line finds the data, too; other data are noticed."""
    x, y = blobs(40, (6, 5))
    data = datasets.from_arrays(x, y, x[:9], y[:9])
    fedlabel.run(name="x", out=tmp_path, data=data, model="mlp", **QUICK)
    more = fedlabel.run(overrides=["num_rounds=2"], name="x", out=tmp_path, resume=True)
    assert len(more.metrics) == 2
    with pytest.raises(ValueError, match="The data are not what they were"):
        fedlabel.run(
            overrides=["num_rounds=3"],
            name="x",
            out=tmp_path,
            resume=True,
            data=datasets.from_arrays(x, 1 - y, x[:9], y[:9]),
        )
