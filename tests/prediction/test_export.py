"""A model as files: what is written is enough for the same predictions, and nothing in it is executed."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fedlabel
from fedlabel.data.sets.config import DataConfig
from fedlabel.data.sets.datasets import load_dataset
from fedlabel.prediction.export import PROGRAM, WEIGHTS, load_exported
from server.simulation import RunResult
from tests.cli.invoking import invoke
from tests.integration.tiny import run_tiny
from tests.prediction.test_results import TABLE, write_table


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run_tiny(tmp_path_factory.mktemp("runs"), "digits", "num_rounds=1", "training.local_steps=20")


@pytest.fixture(scope="module")
def exported(run: RunResult) -> Path:
    out = run.path.parent / "exported"
    invoke("export", run.path, "--out", out)
    return out


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_program_alone_gives_the_models_logits(run: RunResult, exported: Path) -> None:
    """For any number of inputs, without fedlabel's code: raw pixels in."""
    images = load_dataset(DataConfig(), 0).test.images
    program = torch.export.load(exported / PROGRAM).module()
    for count in (1, 7):
        assert torch.allclose(program(images[:count]), run.model(images[:count]), atol=1e-5)


def test_the_card_says_how_to_use_it(run: RunResult, exported: Path) -> None:
    card = json.loads((exported / "card.json").read_text())
    assert card["schema"]["classes"] == list("0123456789")
    assert card["schema"]["mean"] == list(run.card.schema.mean)
    assert card["input"] == {"dtype": "uint8", "shape": ["batch", 1, 8, 8], "values": "0 to 255"}
    assert card["metrics"]["eval/accuracy"] == run.metrics[-1]["eval/accuracy"]
    assert set(card["how_to_use"]) == {"weights", "program"}
    assert card["labels"]["true"] == 1  # no number of labels goes along
    assert run.card.labels.true > 1
    state = torch.load(exported / WEIGHTS, weights_only=True)
    assert state.keys() == run.model.network.state_dict().keys()


def test_predictions_of_images_are_a_csv_file(run: RunResult, exported: Path, tmp_path: Path) -> None:
    """From a folder and from an array, by the run, the exported weights and the program: all the same."""
    images = load_dataset(DataConfig(), 0).test.images[:5].numpy()
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for place, image in enumerate(images):
        Image.fromarray(image[0]).save(tmp_path / "in" / "deep" / f"{place}.png")
    np.savez(tmp_path / "in.npz", x=images)
    wanted = run.predict(images)
    for number, source in enumerate((run.path, exported)):
        for inputs in (tmp_path / "in", tmp_path / "in.npz"):
            out = tmp_path / f"{number}.csv"
            said = invoke("predict", source, inputs, "--out", out)
            assert "5 inputs" in said
            rows = read_rows(out)
            assert [row["predicted"] for row in rows] == wanted.labels
            assert [row["sample"] for row in rows] == [f"deep/{n}.png" if inputs.is_dir() else str(n) for n in range(5)]
            found = [[float(row[f"p:{name}"]) for name in run.classes] for row in rows]
            assert np.allclose(found, wanted.probabilities, atol=1e-6)
    for values in (images, images / 255, images.astype(np.float32), images.astype(np.int64)):
        np.savez(tmp_path / "in.npz", x=values)
        invoke("predict", exported, tmp_path / "in.npz", "--out", tmp_path / "program.csv", "--program")
        assert (tmp_path / "program.csv").read_text() == out.read_text()


def test_predictions_of_a_table(tmp_path: Path) -> None:
    write_table(tmp_path / "rows.csv")
    own = (f"data.root={tmp_path / 'rows.csv'}", "data.categorical=[code]", "num_rounds=1", "data.missing=[-9]")
    result = run_tiny(tmp_path, "table", *TABLE, *own)
    invoke("export", result.path, "--out", tmp_path / "model")
    (tmp_path / "new.csv").write_text("code,size,colour,other\n1,-9,red,x\n2,,pink,y\n0,1.5,blue,z\n")
    said = invoke("predict", tmp_path / "model", tmp_path / "new.csv", "--out", tmp_path / "out.csv")
    assert "1 of 3 cells of column colour hold none of the categories" in said
    wanted = result.predict({"code": [1, 2, 0], "size": [None, None, 1.5], "colour": ["red", "pink", "blue"]})
    assert [row["predicted"] for row in read_rows(tmp_path / "out.csv")] == wanted.labels
    program, card, _ = load_exported(tmp_path / "model", program=True)
    rows = torch.tensor([[1.5, 0.0, 2.0], [float("nan"), -1.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(program(rows), result.model(rows), atol=1e-5)
    assert card.schema == result.card.schema
    frame = __import__("pandas").read_csv(tmp_path / "new.csv")
    frame.to_parquet(tmp_path / "new.parquet")
    invoke("predict", result.path, tmp_path / "new.parquet", "--out", tmp_path / "parquet.csv")
    assert (tmp_path / "parquet.csv").read_text() == (tmp_path / "out.csv").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.name=co_teaching", "supervision.kind=noisy", "supervision.noise_rate=0.2"),
        ("method.name=fedmatch",),
        (
            "method.name=llp_bp",
            "supervision.kind=bags",
            "supervision.bag_size=8",
            "method.stage_rounds=1",
            "num_rounds=2",
        ),
        ("model.name=cnn", "method.name=supervised"),
    ],
)
def test_networks_of_several_parts_have_a_program(overrides: tuple[str, ...], tmp_path: Path) -> None:
    keys = ["num_clients=3", "num_rounds=1", "training.local_steps=1", "model.name=mlp", "evaluation.figures=false"]
    result = fedlabel.run([], [*keys, *overrides], name="run", out=tmp_path)
    assert "note" not in invoke("export", result.path, "--out", tmp_path / "model")
    images = load_dataset(DataConfig(), 0).test.images[:3]
    program, _, _ = load_exported(tmp_path / "model", program=True)
    assert torch.allclose(program(images), result.model(images), atol=1e-5)


def test_a_folder_is_not_overwritten(run: RunResult, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").touch()
    said = invoke("predict", tmp_path, tmp_path / "in.csv", status=2)
    assert "is neither the folder of a run nor one that `fedlabel export` wrote" in said
    assert "is not empty" in invoke("export", run.path, "--out", exported, status=2)
    assert "is not the folder of a run" in invoke("export", tmp_path, "--out", tmp_path / "x", status=2)


@pytest.mark.parametrize("name", ["card.json", WEIGHTS, PROGRAM])
def test_damage_is_an_error_of_one_line(name: str, exported: Path, tmp_path: Path) -> None:
    for each in exported.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes() if each.name != name else each.read_bytes()[:20])
    np.savez(tmp_path / "in.npz", x=np.zeros((1, 8, 8), np.uint8))
    flag = ["--program"] if name == PROGRAM else []
    said = invoke("predict", tmp_path, tmp_path / "in.npz", "--out", tmp_path / "o.csv", *flag, status=2)
    assert f"{name} is damaged" in said
    (tmp_path / name).unlink()  # without a card it is no such folder at all
    said = invoke("predict", tmp_path, tmp_path / "in.npz", "--out", tmp_path / "o.csv", *flag, status=2)
    assert ("is neither the folder" if name == "card.json" else name) in said
    assert not (tmp_path / "o.csv").exists()


def copied(exported: Path, to: Path, **changes: object) -> dict[str, object]:
    """Copies an exported folder, with other entries in its card; returns the card."""
    for each in exported.iterdir():
        (to / each.name).write_bytes(each.read_bytes())
    card = json.loads((to / "card.json").read_text())
    (to / "card.json").write_text(json.dumps({**card, **changes}))
    return card  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [1, 8]}, r"`shape` \(=\[1, 8\]\) must be three whole numbers above 0"),
        ({"shape": [1, 8.5, 8]}, "`shape` .* must be three whole numbers above 0"),
        ({"mean": []}, r"`mean` \(=\[\]\) must have a finite number for each of 1 channels"),
        ({"std": [0.0]}, r"`std` \(=\[0.0\]\) must have .* each above 0"),
        ({"std": ["a"]}, "is no model card .TypeError"),
        ({"mean": [float("nan")]}, "`mean` .* must have a finite number"),
        ({"classes": []}, "`classes` .* must be the names of two or more classes"),
        ({"columns": [{"name": "a", "kind": "number", "std": 0, "categories": []}]}, "column a must have a kind"),
        ({"columns": [{"name": "a", "kind": "number", "categories": []}]}, r"must be \[1, 1, 1\] by its columns"),
    ],
)
def test_a_damaged_card_is_an_error_of_one_line(
    changes: dict[str, object], message: str, exported: Path, tmp_path: Path
) -> None:
    card = json.loads((exported / "card.json").read_text())
    copied(exported, tmp_path, schema={**card["schema"], **changes})
    for program in (True, False):
        with pytest.raises(ValueError, match=message):
            load_exported(tmp_path, program)


@pytest.mark.parametrize("section", ["method", "model"])
def test_nothing_that_the_configuration_names_is_imported(
    section: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to read the weights nor to run the program."""
    text = str(json.loads((exported / "card.json").read_text())["config"])
    name = "fedlabel" if section == "method" else "mlp"
    assert f"{section}:\n  name: {name}\n" in text
    copied(exported, tmp_path, config=text.replace(f"{section}:\n  name: {name}\n", f"{section}:\n  name: trap:Trap\n"))
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=rf"`{section}.name` \(=trap:Trap\) of .* is code that is not fedlabel's"):
        load_exported(tmp_path)
    program, _, data = load_exported(tmp_path, program=True)
    assert program(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).shape == (1, 10)
    assert data == DataConfig()


@pytest.mark.parametrize(
    "config", [3, "a: [", "- 1", "1: 2", "method: fedlabel", "method: {name: 3}", "model: {}", None]
)
def test_a_configuration_that_cannot_be_read(config: object, exported: Path, tmp_path: Path) -> None:
    copied(exported, tmp_path, config=config)
    with pytest.raises(ValueError, match=r"card.json: its `config` cannot be read \("):
        load_exported(tmp_path)


def test_metrics_of_an_export_are_those_of_its_weights(tmp_path: Path) -> None:
    """A run that was ended one round after its newest checkpoint, see `on_round`."""
    keys = ["num_clients=3", "num_rounds=5", "model.name=mlp", "evaluation.figures=false", "checkpoint.every=2"]
    result = fedlabel.run([], keys, name="run", out=tmp_path, on_round=lambda row: row["round"] < 3)
    assert [row["round"] for row in result.metrics] == [1, 2, 3]
    assert result.round == 2
    invoke("export", result.path, "--out", tmp_path / "model")
    card = json.loads((tmp_path / "model" / "card.json").read_text())
    assert (card["round"], card["metrics"]["eval/loss"]) == (2, result.metrics[1]["eval/loss"])


def test_a_run_without_a_checkpoint_cannot_be_exported(run: RunResult, tmp_path: Path) -> None:
    for name in ("config.yaml", "card.json"):
        (tmp_path / name).write_bytes((run.path / name).read_bytes())
    (tmp_path / "metrics.jsonl").touch()
    assert "has no checkpoint as yet" in invoke("export", tmp_path, "--out", tmp_path / "model", status=1)
    assert not (tmp_path / "model").exists()


def test_weights_are_read_without_running_code(exported: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    (tmp_path / "card.json").write_bytes((exported / "card.json").read_bytes())
    torch.save({"x": Trap()}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="is damaged"):
        load_exported(tmp_path)
    assert not (tmp_path / "ran").exists()
