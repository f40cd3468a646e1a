"""What somebody asks to run: a configuration, a name for the run's folder, and whether to go on with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedlabel.config import ConfigError, ExperimentConfig, load_config, parse_config, to_yaml
from fedlabel.errors import naming


def default_name(config: ExperimentConfig) -> str:
    """Returns method-dataset-seed-time, e.g. "fedlabel-digits-seed0-20260131-235959"."""
    method = config.method.name.rpartition(":")[2]
    return f"{method}-{config.data.name}-seed{config.seed}-{datetime.now():%Y%m%d-%H%M%S}"


def check_name(name: str | None, resume: bool, option: str = "--") -> None:
    """Raises if a name is none of a folder, or missing for a run to resume.

    Args:
        name: the run's; None: not given.
        resume: whether to go on with it.
        option: what is before the names of options where they are given.

    Raises:
        ConfigError: the name is not as needed.
    """
    if resume and name is None:
        raise ConfigError(f"{option}resume needs {option}name: which run folder to go on with.")
    if name is not None and (not name or Path(name).name != name):
        out = "; --out says where it goes" if option == "--" else ""
        raise ConfigError(f"{option}name (={name}) must be the name of one folder, without a slash{out}.")


def resolve(
    config: ExperimentConfig | str | Path | Sequence[str | Path],
    overrides: Sequence[str],
    saved: Path | None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> ExperimentConfig:
    """Returns the configuration that is asked for.

    Args:
        config: a configuration, or YAML files.
        overrides: key=value, applied last.
        saved: the config.yaml of the run to go on with; what is not given anew comes from there.
        settings: keys and values, applied before the overrides.

    Raises:
        ValueError: it cannot be read, or is of another method than the saved one.
    """
    if isinstance(config, ExperimentConfig):
        return parse_config(to_yaml(config), overrides, settings)
    paths = [config] if isinstance(config, (str, Path)) else list(config)
    if saved is None:
        return load_config(paths, overrides, settings)
    with naming(saved):
        if not saved.is_file():
            raise ConfigError(f"{saved} does not exist: there is no such run to resume. Check --name and --out.")
    try:
        found = load_config([saved])
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{saved} is damaged: {reason} Put it back as it was, or begin a new run.") from error
    if not paths and not overrides and not settings:
        return found
    method, saved_method = load_config(paths, overrides, settings).method.name, found.method.name
    named = any(override.startswith("method.name=") for override in overrides) or paths or "method" in settings
    if named and method != saved_method:
        raise ConfigError(f"`method.name` (={method}) differs from the run's ({saved_method}); resume it as it was.")
    return load_config([saved, *paths], overrides, settings)
