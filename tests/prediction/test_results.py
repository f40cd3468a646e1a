"""The model of a run, used from Python: raw inputs in, the run's own accuracy out."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

import fedlabel
from fedlabel.config import load_config
from fedlabel.data.sets.config import DataConfig
from fedlabel.data.sets.datasets import load_dataset
from fedlabel.errors import RunError
from fedlabel.experiment import Experiment
from fedlabel.prediction.card import Card, parse_card
from fedlabel.prediction.module import trained_model
from server.simulation import RunResult
from tests.integration.tiny import TINY, run_tiny

TABLE = ("data.name=table", "data.label_column=kind", "supervision.label_rate=0.5", "num_clients=3")


def write_table(path: Path, rows: int = 120) -> None:
    """Numbers with gaps, texts, and a column of codes, of two classes that can be told apart."""
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["size", "colour", "code", "kind"])
        for row in range(rows):
            kind = row % 2
            size = "" if row % 11 == 0 else f"{rng.normal(3 * kind):.3f}"
            out.writerow(
                [size, rng.choice(["red", "blue"] if kind else ["blue", "green"]), rng.integers(3), ["no", "yes"][kind]]
            )


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run_tiny(tmp_path_factory.mktemp("runs"), "digits", "num_rounds=2", "training.local_steps=20")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Path]:
    folder = tmp_path_factory.mktemp("runs")
    write_table(folder / "rows.csv")
    own = (f"data.root={folder / 'rows.csv'}", "data.categorical=[code]", "num_rounds=2")
    return run_tiny(folder, "table", *TABLE, *own), folder / "rows.csv"


def test_raw_images_give_the_accuracy_of_the_run(digits: RunResult) -> None:
    """In each form of images; without the model's own normalisation the accuracy is another one."""
    test = load_dataset(DataConfig(), 0).test
    wanted = digits.metrics[-1]["eval/accuracy"]
    pixels = test.images.numpy()
    for images in (
        test.images,
        pixels,
        pixels[:, 0],
        pixels.transpose(0, 2, 3, 1),
        test.images.float() / 255,
        pixels * 1.0,
    ):
        found = digits.predict(images)
        assert (found.index == test.labels.numpy()).mean() == wanted
        assert found.probabilities.sum(1) == pytest.approx(1, abs=1e-5)
    assert found.labels[0] == digits.classes[found.index[0]]
    logits = digits.model(test.images).detach()
    loss = float(torch.nn.functional.cross_entropy(logits, test.labels))
    assert loss == pytest.approx(digits.metrics[-1]["eval/loss"], rel=1e-5)
    bare = digits.model.network(test.images.float()).argmax(1)
    assert float((bare == test.labels).double().mean()) != wanted


def test_rows_of_a_table_as_the_file_has_them(table: tuple[RunResult, Path]) -> None:
    """The test set is split off the file, so what the run evaluated is a part of it: features must be the same bits."""
    result, path = table
    experiment = Experiment(result.config)
    frame = pandas.read_csv(path)
    test = experiment.federation.dataset.test
    model, rows = result.model, experiment.federation.dataset.tables["test"]
    place = {
        name: {text: number for number, text in enumerate(column.categories)}
        for column in result.card.schema.columns
        for name in [column.name]
    }
    codes = [[place[name][text] for text in rows.column(name)] for name in ("colour", "code")]
    raw = torch.tensor(np.stack([rows.column("size"), *codes], 1))
    assert torch.equal(model.preprocess(raw), test.images)
    assert float((model(raw).argmax(1) == test.labels).double().mean()) == result.metrics[-1]["eval/accuracy"]
    same = [
        result.predict(each).probabilities
        for each in (frame, path, str(path), frame.to_dict("list"), frame.to_dict("records"))
    ]
    for other in same[1:]:
        assert np.array_equal(same[0], other)
    assert np.array_equal(
        result.predict(raw).index, result.predict({name: rows.column(name) for name in rows.names}).index
    )


def test_a_run_is_loaded_again(digits: RunResult, tmp_path: Path) -> None:
    again = fedlabel.load_run(str(digits.path))
    assert again.summary == digits.summary
    assert again.metrics == digits.metrics
    images = load_dataset(DataConfig(), 0).test.images
    assert np.array_equal(again.predict(images).probabilities, digits.predict(images).probabilities)
    with pytest.raises(ValueError, match="is not the folder of a run"):
        fedlabel.load_run(tmp_path)


def test_a_run_that_goes_on_is_loaded_without_a_summary(digits: RunResult, tmp_path: Path) -> None:
    result = run_tiny(tmp_path, "run", "num_rounds=1")
    (result.path / "summary.json").unlink()
    going_on = fedlabel.load_run(result.path)
    assert going_on.summary == {}
    assert going_on.predict(np.zeros((1, 8, 8), np.uint8)).probabilities.shape == (1, 10)
    next(result.path.glob("checkpoints/*")).unlink()
    with pytest.raises(RunError, match="has no checkpoint as yet"):
        _ = fedlabel.load_run(result.path).model


def test_history_is_a_table(digits: RunResult) -> None:
    frame = pandas.DataFrame(digits.history)
    assert list(frame["round"]) == [1, 2]
    assert list(frame["eval/accuracy"]) == [row["eval/accuracy"] for row in digits.metrics]
    assert next(iter(frame.columns)) == "round"
    assert not any(isinstance(value, list) for column in digits.history.values() for value in column)
    gaps = RunResult(digits.path, {}, [{"round": 1, "a": 1.0, "b": None}, {"round": 2, "c": [1]}])
    assert repr(gaps.history) == "{'round': [1, 2], 'a': [1.0, nan], 'b': [nan, nan]}"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8), np.uint8), r"For a single one: `x\[None\]`"),
        (np.zeros((2, 9, 8), np.uint8), "trained on images of shape"),
        (np.full((2, 8, 8), 16.5), r"floats in \[0, 1\], and not normalised"),
        (np.full((2, 8, 8), np.nan), r"floats in \[0, 1\]"),
        (np.full((2, 8, 8), -1), r"whole numbers in \[0, 255\]"),
        (np.full((2, 8, 8), "a"), "images are uint8"),
        ([[1], [1, 2]], "give one array|inhomogeneous"),
        ("nowhere", "there is no such file or folder"),
    ],
)
def test_images_of_another_form_are_refused(digits: RunResult, images: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits.predict(images)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"size": [1], "colour": ["red"]}, "lacks the columns code"),
        ({"size": ["1", "big"], "colour": ["red"] * 2, "code": [1, 2]}, "column size, data row 2: big is no number"),
        ({"size": [1, 2], "colour": ["red"], "code": [1, 2]}, "columns have 1 and 2 cells"),
        (np.zeros((2, 4)), "must be rows of the table"),
        ({"size": [1, np.inf], "colour": ["red"] * 2, "code": [1, 2]}, "column size, data row 2: inf must be a finite"),
        ({"size": [-1e31], "colour": ["red"], "code": [1]}, "column size, data row 1: -1e.31 must be a finite number"),
        (np.array([[1.0, 0, 0], [-np.inf, 0, 0]]), "column size, data row 2: -inf must be a finite number"),
        (np.array([[1.0, 3, 0]]), "column colour, data row 1: 3 must be .* from 0 to 2, or -1"),
        (np.array([[1.0, 0, 0.5]]), "column code, data row 1: 0.5 must be the place of a category"),
        (np.array([[1.0, np.nan, 0]]), "column colour, data row 1: nan must be the place of a category"),
    ],
)
def test_rows_of_another_form_are_refused(table: tuple[RunResult, Path], rows: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table[0].predict(rows)


def test_a_cell_of_no_category_is_said(table: tuple[RunResult, Path], tmp_path: Path) -> None:
    from fedlabel.prediction.inputs import as_inputs

    rows = {"size": [1.0, pandas.NA], "colour": ["pink", "red"], "code": [1, 2.0]}
    found = as_inputs(rows, table[0].card)
    assert found.notes == ("`inputs`: 1 of 2 cells of column colour hold none of the categories of the training rows.",)
    assert found.tensor[:, 1].tolist() == [-1.0, 2.0]
    assert found.tensor[:, 2].tolist() == [1.0, 2.0]
    assert math.isnan(found.tensor[1, 0])


def test_an_unfinished_first_stage_has_no_model(tmp_path: Path) -> None:
    own = ("method.name=dp_ssl", "method.functions_rounds=2", "method.label_model_rounds=1", "num_rounds=4")
    own = (*own, "method.assignment_rounds=1")
    left_out = [each for each in TINY if not each.startswith("method.")]
    keys = [*left_out, *own, "method.num_functions=10", "method.heads_per_class=2", "checkpoint.keep=9"]
    path = fedlabel.run(overrides=keys, name="run", out=tmp_path).path
    assert fedlabel.load_run(path).predict(np.zeros((1, 8, 8), np.uint8)).probabilities.shape == (1, 10)
    for number in (3, 4):
        (path / f"checkpoints/round_{number:06d}.ckpt").unlink()
    with pytest.raises(RunError, match="has done 2 of 4 rounds and is in the stage `functions` of dp_ssl"):
        _ = fedlabel.load_run(path).model


def rebuilt(*overrides: str) -> bool:
    """Returns whether the model of a run, rebuilt from its card alone, gives what the experiment's own model gives."""
    left_out = [each for each in TINY if not each.startswith(("method.", "data.", "supervision."))]
    experiment = Experiment(load_config([], [*left_out, *overrides]))
    card = Card.of(experiment.federation, experiment.labels)
    assert parse_card(card.fields(), Path("x")) == card
    model = trained_model(experiment.config, card.without_counts(), experiment.initial_state, "here")
    images = experiment.evaluates_on.split.images[:9]
    number = experiment.config.num_rounds
    predictor = experiment.predictor(number, {"model": experiment.initial_state}, experiment.recipe.shared.start())
    assert predictor is not None
    return torch.equal(predictor(experiment.transform.normalize(images)), model(images).detach())


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.name=fedlabel",),
        ("method.name=co_teaching", "supervision.kind=noisy", "supervision.noise_rate=0.2"),
        ("method.name=fedmatch",),
        (
            "method.name=llp_bp",
            "supervision.kind=bags",
            "supervision.bag_size=8",
            "method.stage_rounds=2",
            "num_rounds=4",
        ),
        ("method.name=dp_ssl", "method.num_functions=10", "method.heads_per_class=2", "num_rounds=40"),
        ("model.name=torchvision:resnet18", "data.name=digits"),
    ],
)
def test_every_kind_of_network_is_rebuilt_from_its_card(overrides: tuple[str, ...]) -> None:
    assert rebuilt(*overrides)
