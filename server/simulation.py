"""Runs on this machine: the local entry point, as `server_app.py` is Flower's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedlabel.config import ConfigError, ExperimentConfig, to_yaml
from fedlabel.data.federation import build_federation, count_owners
from fedlabel.data.partition import COLUMN
from fedlabel.data.sets.config import SETS
from fedlabel.data.sets.datasets import load_dataset
from fedlabel.errors import check_folder, naming
from fedlabel.experiment import Experiment, open_experiment
from fedlabel.hardware import usable_cores
from fedlabel.models import is_foreign
from fedlabel.record.json_files import read_metrics
from fedlabel.record.names import CONFIG_YAML
from server.grids.base import ClientGrid
from server.grids.in_process import InProcessGrid
from server.grids.ray import RayGrid
from server.request import check_name, default_name, resolve
from server.results import RunResult, load_run
from server.server import OnRound
from server.server_app import run_federation
from server.strategy import check_cohort

__all__ = ["RunResult", "load_run", "open_grid", "simulate"]


def simulate(
    config: ExperimentConfig | str | Path | Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    *,
    settings: Mapping[str, Any] = MappingProxyType({}),
    name: str | None = None,
    out: str | Path = "runs",
    resume: bool = False,
    count_clients: bool = False,
    on_start: Callable[[Experiment, Path], None] = lambda experiment, path: None,
    on_round: OnRound = lambda round_number, metrics: None,
) -> RunResult:
    """See `fedlabel.run`.

    Args:
        config: see there.
        overrides: see there.
        settings: keys and values, see `fedlabel.config.load_config`.
        name: see there.
        out: see there.
        resume: see there.
        count_clients: with partition.kind=column, take as many clients as own training samples, whatever
            `num_clients` is.
        on_start: called when everything is found sound, with the experiment and the run's folder.
        on_round: called after every round with its metrics; False ends the run.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    resolved = resolve(config, overrides, Path(out) / name / CONFIG_YAML if resume and name else None, settings)
    check_name(name, resume)
    path = Path(out) / (name or default_name(resolved))
    with naming(path):
        if not resume and path.exists():
            raise ConfigError(
                f"{path} exists already; give another --name, or --resume to go on with it (in Python: name=..., "
                "resume=True)."
            )
    if not resume:
        check_folder(path.parent)
    # The user's own files and functions may have been changed since this process read them.
    own = SETS[resolved.data.name].own or resolved.devices.trace or resolved.supervision.audit
    if own or any(part.module or part.labels_file for part in resolved.supervision.parts):
        for cached in (open_experiment, build_federation, load_dataset):
            cached.cache_clear()
    if count_clients and resolved.partition.kind == COLUMN:
        parts = (resolved.data, resolved.partition, resolved.labeled_partition, resolved.supervision, resolved.seed)
        resolved = replace(resolved, num_clients=count_owners(*parts))
    check_cohort(resolved.strategy, resolved.cohort_size)
    if is_foreign(resolved.model.name):  # a function may make another network each time, whatever its name
        open_experiment.cache_clear()
    experiment = open_experiment(to_yaml(resolved))
    on_start(experiment, path)
    with open_grid(resolved, experiment.device.type == "cuda") as grid:
        summary = run_federation(resolved, grid, path, resume, on_round)
    return RunResult(path, summary, read_metrics(path))


@contextmanager
def open_grid(config: ExperimentConfig, use_gpu: bool) -> Iterator[ClientGrid]:
    """Opens the grid of simulated clients that `grid.kind` names."""
    if config.grid.kind == "ray":
        workers = config.grid.num_workers or (1 if use_gpu else usable_cores())
        with RayGrid(min(workers, config.num_clients), use_gpu) as ray_grid:
            yield ray_grid
    else:
        yield InProcessGrid()
