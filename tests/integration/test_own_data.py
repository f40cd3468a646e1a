"""A simulated federation, exported as folders of four nodes, and the same run on these nodes by Flower's messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedlabel
from clients.client_app import app
from fedlabel import load_run
from fedlabel.cli.data import export_experiment
from fedlabel.config import ExperimentConfig, load_config, to_yaml
from fedlabel.data.nodes.export import client_folder
from fedlabel.data.nodes.federation import Agreement, node_federation
from fedlabel.data.nodes.folder import read_node_folder
from fedlabel.data.nodes.schema import load_schema
from fedlabel.errors import RunError
from fedlabel.experiment import open_experiment
from fedlabel.record.json_files import read_metrics
from server.grids.flower import FlowerGrid
from server.server_app import open_on, run_federation
from server.simulation import simulate
from tests.integration.local_nodes import LocalNodes
from tests.integration.tiny import assert_same_weights, comparable_metrics, final_weights

FOUR_KINDS = (
    "num_clients=4",
    "num_rounds=3",
    "fraction_train=1.0",
    "partition.kind=iid",
    "supervision.mix=[{share: 0.25, kind: few_labels, label_rate: 0.2}, {share: 0.25, kind: noisy, noise_rate: 0.3}, "
    "{share: 0.25, kind: partial, partial_ratio: 0.3}, {share: 0.25, kind: bags, bag_size: 8}]",
    "model.name=mlp",
    "training.local_steps=3",
    "training.batch_size=8",
    "grid.stack=off",  # nodes train alone
    "evaluation.panel_samples=0",
    "evaluation.figures=false",
    "device=cpu",
)
METHODS = {"fedlabel": ("method.confidence_threshold=0.1",), "ill": ("method.name=ill",)}


class Exported:
    """A simulated run, and its federation as folders."""

    def __init__(self, root: Path, options: Sequence[str], held_out: bool) -> None:
        self.root, self.path, self.options = root, root / "nodes", list(options)
        self.simulated = simulate((), self.options, name="simulated", out=root).path
        self.experiment = open_experiment(to_yaml(load_config([], self.options)))
        export_experiment(self.experiment, self.path, held_out)

    def config(self, *overrides: str) -> ExperimentConfig:
        return load_config([self.path / "config.yaml"], overrides)

    def grid(self, order: Sequence[int] = (2, 0, 3, 1), **more: Any) -> FlowerGrid:
        """Nodes 1 to 4 with the folders of these clients."""
        nodes = [{"data": str(self.path / client_folder(client)), "client": client, **more} for client in order]
        return FlowerGrid(LocalNodes(app, 4, node_configs=nodes))

    def run(self, name: str, *overrides: str, **more: Any) -> Path:
        run_federation(self.config(*overrides), self.grid(**more), self.root / name)
        return self.root / name


@pytest.fixture(scope="module", params=list(METHODS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp(request.param), [*FOUR_KINDS, *METHODS[request.param]], held_out=False)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("held_out"), [*FOUR_KINDS, *METHODS["ill"]], held_out=True)


def test_deployed_equals_simulated_to_the_bit(exported: Exported) -> None:
    """Each of four nodes has another kind of label, and the server has none."""
    kinds = exported.experiment.federation.kinds()
    assert [(row > 0).nonzero()[0].tolist() for row in kinds] != [kinds[0].nonzero()[0].tolist()] * 4
    deployed = exported.run("deployed")
    assert_same_weights(final_weights(deployed), final_weights(exported.simulated))
    rows, expected = comparable_metrics(deployed), comparable_metrics(exported.simulated)
    for row, there in zip(rows, expected, strict=True):
        assert row["eval/accuracy"] == there["eval/accuracy"]
        assert row["eval/loss"] == there["eval/loss"]
        assert row["train/loss"] == there["train/loss"]
        assert "eval/mean_client_accuracy" not in row  # nobody says whose the server's test samples are
        assert not any(name.startswith(("pseudo/accuracy", "posterior/accuracy")) for name in row)
    assert any("pseudo/accuracy" in row or "posterior/accuracy" in row for row in expected)


def test_evaluation_on_what_nodes_hold_out_equals_that_of_all_in_one_place(held_out: Exported) -> None:
    deployed = held_out.run("deployed")
    assert_same_weights(final_weights(deployed), final_weights(held_out.simulated))
    rows, expected = comparable_metrics(deployed), comparable_metrics(held_out.simulated)
    for row, there in zip(rows, expected, strict=True):
        for name in ("eval/accuracy", "eval/balanced_accuracy", "eval/class_accuracy"):
            assert row[name] == there[name]
        for name in ("eval/loss", "eval/ece"):
            assert row[name] == pytest.approx(there[name], rel=1e-12)
        assert "eval/client_accuracy" not in row
        assert "eval/worst_client_accuracy" not in row


def test_a_node_that_agrees_has_its_own_accuracy_shown(held_out: Exported) -> None:
    """Nothing else of a simulation is shown, such as a panel of samples."""
    overrides = ("num_rounds=1", "evaluation.panel_samples=4", "evaluation.figures=true")
    deployed = held_out.run("shared", *overrides, **{"share-evaluation": True})
    row, there = comparable_metrics(deployed)[0], comparable_metrics(held_out.simulated)[0]
    assert row["eval/client_accuracy"] == there["eval/client_accuracy"]
    assert row["eval/worst_client_accuracy"] == there["eval/worst_client_accuracy"]


def test_evaluation_follows_every_and_none_is_allowed(held_out: Exported) -> None:
    rows = comparable_metrics(held_out.run("every", "num_rounds=7", "evaluation.every=6"))
    assert ["eval/accuracy" in row for row in rows] == [False, False, True, True, True, True, True]
    rows = comparable_metrics(held_out.run("none", "evaluation.at=none", "num_rounds=1"))
    assert not any(name.startswith("eval/") for row in rows for name in row)


def test_a_run_is_resumed_on_the_same_nodes(held_out: Exported) -> None:
    path = held_out.run("resumed", "num_rounds=2")
    run_federation(held_out.config("num_rounds=3"), held_out.grid(), path, resume=True)
    assert [row["round"] for row in comparable_metrics(path)] == [1, 2, 3]
    grid = held_out.grid()  # two clients change places: what they hold is no longer what it was
    configs = grid._grid.node_configs  # type: ignore[attr-defined]
    configs[0]["client"], configs[1]["client"] = configs[1]["client"], configs[0]["client"]
    with pytest.raises(
        RunError, match=r"Only 2 of `num_clients` \(=4\) nodes can go on with the run.*holds other data"
    ):
        run_federation(held_out.config("num_rounds=4", "grid.connect_timeout=0.5"), grid, path, resume=True)


def test_a_run_is_resumed_without_a_node_that_is_gone(held_out: Exported) -> None:
    """A new run needs all."""
    few = ("grid.min_nodes=3", "grid.connect_timeout=0.5", "grid.timeout=30")
    grid = held_out.grid()
    grid._grid.count = 3  # type: ignore[attr-defined]
    with pytest.raises(RunError, match=r"Only 3 of `num_clients` \(=4\) nodes can take part"):
        run_federation(held_out.config(*few), grid, held_out.root / "never")
    path = held_out.run("three", "num_rounds=1")
    run_federation(held_out.config("num_rounds=2", *few), grid, path, resume=True)
    assert [row["system/failed_clients"] for row in read_metrics(path)] == [0, 1]
    assert "Round 2, client 1: NotConnected" in (path / "failures.log").read_text()
    federation = json.loads((path / "partition.json").read_text())
    assert len(federation["clients"]) == 4
    (path / "partition.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read .* unknown what nodes held when the run began"):
        run_federation(held_out.config("num_rounds=3"), held_out.grid(), path, resume=True)


def test_nodes_without_a_number_are_numbered_by_the_server(held_out: Exported) -> None:
    nodes = [{"data": str(held_out.path / client_folder(client))} for client in range(4)]
    path = held_out.root / "numbered"
    run_federation(held_out.config("num_rounds=1"), FlowerGrid(LocalNodes(app, 4, node_configs=nodes)), path)
    (first, *_), number = json.loads((path / "partition.json").read_text())["clients"], 0
    assert first["card"]["samples"] == len(held_out.experiment.federation.parts[number])
    expected = held_out.run("by_client", "num_rounds=1")
    assert_same_weights(final_weights(path), final_weights(expected))


def test_rows_of_a_table_are_deployed_like_images(tmp_path: Path) -> None:
    """With missing numbers and categories, of which some nodes lack one."""
    rng = np.random.default_rng(0)
    job, label = rng.choice(["nurse", "cook", "a, quoted"], 120), rng.integers(0, 2, 120)
    age = [f"{40 + 20 * rng.normal():.3f}" if rng.random() < 0.9 else "" for _ in range(120)]
    rows = [f'{a},"{j}",{n}' for a, j, n in zip(age, job, np.where(label, "yes", "no"), strict=True)]
    (tmp_path / "table.csv").write_text("\n".join(["age,job,bought", *rows, '1,"seldom",yes']) + "\n")
    options = ["data.name=table", f"data.root={tmp_path / 'table.csv'}", "data.label_column=bought"]
    options += ["method.name=supervised", "supervision.label_rate=0.8"]
    exported = Exported(tmp_path, [*(o for o in FOUR_KINDS if not o.startswith("supervision")), *options], True)
    deployed = exported.run("deployed")
    assert_same_weights(final_weights(deployed), final_weights(exported.simulated))
    row, there = comparable_metrics(deployed)[-1], comparable_metrics(exported.simulated)[-1]
    assert row["eval/accuracy"] == there["eval/accuracy"]
    assert "eval/auc" in there
    assert "eval/auc" not in row  # it does not add up
    schema = load_schema(exported.path / "schema.yaml")
    for client in range(4):
        data = read_node_folder(exported.path / client_folder(client), schema)
        assert torch.equal(data.inputs, exported.experiment.client_data(client).images)
    found, wanted = (load_run(path).predict(tmp_path / "table.csv") for path in (deployed, exported.simulated))
    assert found.classes == wanted.classes
    assert np.array_equal(found.probabilities, wanted.probabilities)


def test_what_the_server_writes_and_gets_has_no_sample(held_out: Exported) -> None:
    path = held_out.run("written", "num_rounds=1")
    written = json.loads((path / "partition.json").read_text())
    assert set(written) == {"sha256", "data", "dataset", "clients"}
    assert {type(value) for client in written["clients"] for value in client.values()} == {int, list, dict}
    audit = json.loads((path / "supervision.json").read_text())
    assert audit["kinds"]["clients"] == held_out.experiment.federation.kinds().tolist()
    expected = held_out.experiment.federation.card
    assert audit["label_card"] == {**expected._asdict(), "votes": list(expected.votes)}


REFUSED = {
    "a node without a folder": (lambda nodes: nodes[1].pop("data"), RunError, "this node was started without: give"),
    "two with one number": (lambda nodes: nodes[1].update(client=2), RunError, "both started with client=2"),
    "a folder that is gone": (
        lambda nodes: nodes[1].update(data="/nowhere"),
        RunError,
        "cannot be read; its log says why",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_wrong_with_a_node_is_said(held_out: Exported, case: str) -> None:
    spoil, kind, message = REFUSED[case]
    grid = held_out.grid()
    spoil(grid._grid.node_configs)  # type: ignore[attr-defined, no-untyped-call]
    with pytest.raises(kind, match=message):
        open_on(grid, held_out.config())


def test_defects_of_a_folder_stay_at_the_node(
    held_out: Exported, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "node"
    shutil.copytree(held_out.path / client_folder(0), folder)
    with (folder / "labels.csv").open("a") as file:
        file.write("secret" + "," * (folder / "labels.csv").read_text().split("\n")[0].count(",") + "\n")
    grid = held_out.grid()
    grid._grid.node_configs[1]["data"] = str(folder)  # type: ignore[attr-defined]
    with pytest.raises(
        RunError, match="the node's folder has 1 defect, or does not fit the schema; its log says more"
    ) as caught:
        open_on(grid, held_out.config())
    assert "secret" not in str(caught.value)
    assert "secret" in caplog.text


def test_a_folder_and_a_named_data_set_do_not_go_together(held_out: Exported, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="was started with data of its own"):
        run_federation(load_config([], held_out.options), held_out.grid(), tmp_path / "run")
    with pytest.raises(ValueError, match="the samples are in the folders of real nodes"):
        fedlabel.run(held_out.config(), out=tmp_path, name="simulated")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.schema=null"], "`data.schema` \\(=None\\) must name the file"),
        (["evaluation.at=server"], "`evaluation.at` \\(=server\\) needs a labelled folder"),
        (["data.test=x"], "`data.test` \\(=x\\) is used with evaluation.at=server, and that is nodes"),
        (["data.schema=/nowhere.yaml"], "there is no such file"),
    ],
)
def test_what_the_server_lacks_is_said(held_out: Exported, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_on(held_out.grid(), held_out.config(*overrides))


def test_a_node_knows_no_true_label_of_its_training_samples(held_out: Exported) -> None:
    schema = load_schema(held_out.path / "schema.yaml")
    agreement = Agreement(schema, held_out.experiment.labels)
    for client in range(4):
        data = read_node_folder(held_out.path / client_folder(client), schema)
        federation = node_federation(data, agreement, client, 4)
        assert (federation.hidden_labels(client) == -1).all()
        assert torch.equal(data.inputs, held_out.experiment.client_data(client).images)
        assert federation.kinds()[client].tolist() == held_out.experiment.federation.kinds()[client].tolist()
