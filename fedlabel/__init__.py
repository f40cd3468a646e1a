"""Federated learning for data whose labels are few, imprecise, noisy or known only as counts."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlabel.config import ExperimentConfig, load_config
    from fedlabel.methods.recipe import Method, Phase, Recipe, Stage
    from server.simulation import RunResult

__all__ = ["Method", "Phase", "Recipe", "RunResult", "Stage", "load_config", "load_run", "run"]
_HOMES = {
    "load_config": "fedlabel.config",
    **dict.fromkeys(("Method", "Phase", "Recipe", "Stage"), "fedlabel.methods.recipe"),
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is asked for: most need torch."""
    if name not in {*_HOMES, "RunResult"}:
        raise AttributeError(f"module fedlabel has no attribute {name}")
    if name == "RunResult":
        from fedlabel.importing import claim_packages

        claim_packages()
        from server.simulation import RunResult

        return RunResult
    return getattr(importlib.import_module(_HOMES[name]), name)


def run(
    config: ExperimentConfig | str | Path | Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    out: str | Path = "runs",
    resume: bool = False,
    profile: bool = False,
) -> RunResult:
    """Runs an experiment on this machine; the same as `fedlabel run`, without its progress bar.

    Args:
        config: a configuration, a YAML file, or several (later ones win); default: FedLabel on the embedded data.
        overrides: "key=value" strings; they win over `config`.
        name: the run's folder in `out`; default: method, data set, seed and time.
        out: where run folders are kept.
        resume: go on from the newest checkpoint of run `name`.
        profile: measure where a round's time goes, as `fedlabel run --profile` does (grid.profile=true).

    Returns:
        `path` and `summary` (the folder, and what is in its summary.json), `metrics` and `history` (one dictionary a
        round, and the same as a table), `model` (a torch module with its preprocessing) and `predict`.

    Raises:
        ValueError: configuration, data, checkpoint or folder are not as needed.
        RuntimeError: every client of a round failed.
    """
    from fedlabel.importing import claim_packages

    claim_packages()
    from server.simulation import simulate

    overrides = [*overrides, *["grid.profile=true"] * profile]
    return simulate(config, overrides, name=name, out=out, resume=resume)


def load_run(path: str | Path) -> RunResult:
    """Returns the result of a run that was done before, or is going on.

    Args:
        path: the run's folder.

    Raises:
        ValueError: it is none, or its files are damaged.
    """
    from fedlabel.importing import claim_packages

    claim_packages()
    from server.simulation import load_run

    return load_run(path)
