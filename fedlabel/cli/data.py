"""`fedlabel data`: checks a node's folder and makes the schema of a federation; and the folders of a simulated one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedlabel.cli.progress import make_table
from fedlabel.names import counted

if TYPE_CHECKING:
    from rich.table import Table

    from fedlabel.config import ExperimentConfig
    from fedlabel.data.nodes.folder import NodeData
    from fedlabel.data.nodes.schema import Schema
    from fedlabel.experiment import Experiment

CONFIG_YAML, README = "config.yaml", "README.md"


def schema_of(paths: Sequence[Path], classes: str, categorical: str, flip: bool) -> Schema:
    """Returns the schema that folders, or files with their statistics, make; classes, categorical: comma separated."""
    from fedlabel.data.nodes.statistics import folder_statistics, load_statistics, make_schema

    columns = names_in(categorical)
    parts = [folder_statistics(path, columns) if path.is_dir() else load_statistics(path) for path in paths]
    return make_schema(parts, list(map(str, paths)), names_in(classes), flip)


def names_in(text: str) -> list[str]:
    """Returns comma separated names."""
    return [name.strip() for name in text.split(",") if name.strip()]


def card_tables(data: NodeData, schema: Schema) -> list[Table]:
    """Returns the label card of a folder: how many samples have which kind of label, and how classes are balanced."""
    import torch

    from fedlabel.data.labels.supervision import KIND_NAMES

    record = data.record
    kinds = torch.bincount(record.kind, minlength=len(KIND_NAMES)).tolist()
    amounts = make_table("kind of label", "samples", title="label card")
    for name, number in zip(KIND_NAMES, kinds, strict=True):
        if number:
            amounts.add_row(name, f"{number:,}")
    for name, number in (("bags", len(record.bag_counts)), ("held out", len(data.held_out.labels))):
        if number:
            amounts.add_row(name, f"{number:,}")
    classes = len(schema.classes)
    certain, sets = record.labeled & ~record.noisy, ~record.labeled & ~record.candidates.all(1)

    def count(labels: torch.Tensor) -> list[int]:
        return torch.bincount(labels[labels >= 0].flatten(), minlength=classes).tolist()

    columns = {
        "label": count(record.label[certain]),
        "noisy label": count(record.label[record.labeled & record.noisy]),
        "in a candidate set": record.candidates[sets].sum(0).tolist(),
        "annotators' labels": count(record.annotations),
        "in bags": record.bag_counts.sum(0).tolist(),
        "votes": count(record.votes),
        "held out": count(data.held_out.labels),
    }
    shown = {name: numbers for name, numbers in columns.items() if any(numbers)}
    if not shown:
        return [amounts]
    balance = make_table("class", *shown, title="by class")
    for place, name in enumerate(schema.classes):
        balance.add_row(name, *(f"{numbers[place]:,}" for numbers in shown.values()))
    return [amounts, balance]


def export_experiment(experiment: Experiment, path: Path, held_out: bool) -> None:
    """Writes a simulated experiment as folders of nodes, with the configuration of the deployment and how to start it.

    Raises:
        ValueError: see `export_federation`.
    """
    from fedlabel.config import to_yaml
    from fedlabel.data.nodes.export import export_federation
    from fedlabel.errors import naming

    config = experiment.config
    deployed = deployed_config(config, path, held_out)  # refuses what cannot be deployed before anything is written
    budgets = [part.count_epsilon for part in config.supervision.parts if part.count_epsilon is not None]
    images, test = experiment.images, experiment.evaluates_on.split.images
    own, epsilon = experiment.federation, experiment.labels.label_epsilon
    export_federation(own, images, test, path, held_out, min(budgets, default=None), epsilon)
    with naming(path):
        (path / CONFIG_YAML).write_text(to_yaml(deployed), encoding="utf-8")
        (path / README).write_text(_readme(config, path, held_out), encoding="utf-8")


def deployed_config(config: ExperimentConfig, path: Path, held_out: bool) -> ExperimentConfig:
    """Returns the configuration of the same experiment on exported folders; see `export_experiment`."""
    from fedlabel.config import ConfigError
    from fedlabel.data.labels.supervision_config import SupervisionConfig
    from fedlabel.data.nodes.export import SCHEMA_YAML, TEST_FOLDER
    from fedlabel.data.partition import PartitionConfig
    from fedlabel.data.sets.config import NODES, DataConfig
    from fedlabel.data.skew import SkewConfig

    if config.evaluation.split != "test":
        raise ConfigError(f"`evaluation.split` (={config.evaluation.split}) must be test for --export.")
    root = path.absolute()
    test = None if held_out else str(root / TEST_FOLDER)
    return replace(
        config,
        data=DataConfig(name=NODES, schema=str(root / SCHEMA_YAML), test=test),
        partition=PartitionConfig(),
        labeled_partition=None,
        supervision=SupervisionConfig(),
        skew=SkewConfig(),
        evaluation=replace(config.evaluation, at="nodes" if held_out else "server", select=None),
    )


def _readme(config: ExperimentConfig, path: Path, held_out: bool) -> str:
    from fedlabel.data.nodes.export import SCHEMA_YAML, TEST_FOLDER, client_folder

    root = path.absolute()
    nodes = "\n".join(
        f"    --node-config 'data=\"{root / client_folder(client)}\" client={client}'"
        for client in range(config.num_clients)
    )
    tested = "what the nodes hold out" if held_out else f"the server's {TEST_FOLDER}/"
    return f"""# {counted(config.num_clients, "node")} of a simulated federation

Each `client-...` is the folder of a node, with what that client holds and nothing that it does not know;
`{SCHEMA_YAML}` is the schema of all, `{CONFIG_YAML}` the configuration of the run; models are evaluated on {tested}.
Start a `flower-supernode` for each folder with

{nodes}

and the run with

    flwr run . SUPERLINK --stream --run-config 'configs="{root / CONFIG_YAML}"'

`client` gives a node the number that it has in the simulation, by which its random numbers are drawn; without it the
server numbers the nodes.
"""
