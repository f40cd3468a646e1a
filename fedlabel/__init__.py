"""Federated learning for data whose labels are few, imprecise, noisy or known only as counts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Unpack

    from torch import nn

    from fedlabel import datasets, prediction
    from fedlabel.config import ExperimentConfig, load_config
    from fedlabel.experiment import Experiment
    from fedlabel.methods.recipe import Method, Phase, Recipe, Stage
    from fedlabel.settings import Settings
    from server.simulation import RunResult

__all__ = [
    "ExperimentConfig",
    "Method",
    "Phase",
    "Recipe",
    "RunResult",
    "Settings",
    "Stage",
    "datasets",
    "load_config",
    "load_run",
    "prediction",
    "run",
]
_HOMES = {
    **dict.fromkeys(("ExperimentConfig", "load_config"), "fedlabel.config"),
    "Settings": "fedlabel.settings",
    **dict.fromkeys(("Method", "Phase", "Recipe", "Stage"), "fedlabel.methods.recipe"),
}


_MODULES = ("datasets", "prediction")


def __getattr__(name: str) -> Any:
    """Imports a public name when it is asked for: most need torch."""
    if name in _MODULES:
        return importlib.import_module(f"fedlabel.{name}")
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
    progress: bool = False,
    on_round: Callable[[dict[str, Any]], object] | None = None,
    **settings: Unpack[Settings],
) -> RunResult:
    """Runs an experiment on this machine; the same as `fedlabel run`.

    Args:
        config: a configuration, a YAML file, or several (later ones win); default: FedLabel on the embedded data.
        overrides: "key=value" strings; they win over `config` and `settings`.
        name: the run's folder in `out`; default: method, data set, seed and time.
        out: where run folders are kept.
        resume: go on from the newest checkpoint of run `name`.
        profile: measure where a round's time goes, as `fedlabel run --profile` does (grid.profile=true).
        progress: show the rounds, accuracy and time left: as a bar in a terminal or a notebook, else as lines.
        on_round: called after every round with "round" and the metrics of that round. If it returns False the run ends
            there, without a summary, and can be resumed; so it can if it raises.
        settings: keys of the configuration, which win over `config`: `fedlabel.run(method="fixmatch", num_clients=8,
            supervision={"label_rate": 0.1})`; see `Settings`. `model` may be a torch module, or a function that returns
            one; `data` what `fedlabel.datasets` makes of arrays, tables and data sets; if these have owners, there are
            as many clients unless `num_clients` is given.

    Returns:
        `path` and `summary` (the folder, and what is in its summary.json), `metrics` and `history` (one dictionary a
        round, and the same as a table), `model` (a torch module with its preprocessing) and `predict`.

    Raises:
        ValueError: configuration, data, checkpoint or folder are not as needed.
        RuntimeError: every client of a round failed.
    """
    from fedlabel.importing import claim_packages

    claim_packages()
    from fedlabel.cli.progress import make_console, run_progress
    from fedlabel.settings import as_layer
    from server.simulation import simulate

    overrides = [*overrides, *["grid.profile=true"] * profile]

    layer = as_layer(settings, Path(out))
    said = "num_clients" in settings or any(each.startswith("num_clients=") for each in overrides)
    with run_progress(make_console()) if progress else nullcontext() as shown:

        def begin(experiment: Experiment, path: Path) -> None:
            if shown is not None:
                shown[0](experiment)

        def see(round_number: int, metrics: Mapping[str, float]) -> object:
            if shown is not None:
                shown[1](round_number, metrics)
            return on_round({"round": round_number, **metrics}) if on_round is not None else None

        return simulate(
            config,
            overrides,
            settings=layer,
            name=name,
            out=out,
            resume=resume,
            count_clients="num_clients" in layer and not said,
            on_start=begin,
            on_round=see,
        )


def load_run(path: str | Path, *, model: nn.Module | Callable[..., nn.Module] | None = None) -> RunResult:
    """Returns the result of a run that was done before, or is going on.

    Args:
        path: the run's folder.
        model: what was passed to `run` as `model`, if it was a module or a function.

    Raises:
        ValueError: it is none, or its files are damaged; or `model` is not the one that was passed to `run`.
    """
    from fedlabel.importing import claim_packages

    claim_packages()
    from fedlabel.models import pass_model
    from server.simulation import load_run

    result = load_run(path)
    if model is not None and (given := pass_model(model)) != result.config.model.name:
        raise ValueError(
            f"`model` (={given}) is not what the run {path} was made with (={result.config.model.name}). A "
            "network is recognised by its class and a fingerprint of its structure and weights, or of its code: give "
            "it as it was passed to fedlabel.run. One named package.module:function is not given."
        )
    return result
