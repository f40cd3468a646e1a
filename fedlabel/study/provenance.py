"""What made a run: machine and command as text, from its summary.json."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def machine_text(hardware: Mapping[str, Any]) -> str:
    """Returns the machine of a run, from the summary's "hardware"."""
    cores = f"{hardware.get('usable_cores', '?')} of {hardware.get('logical_cores', '?')} cores"
    gpu = f", {hardware['gpu']} ({hardware.get('gpu_memory_gib')} GiB)" if "gpu" in hardware else ", no GPU used"
    return f"{hardware.get('cpu', 'unknown CPU')}, {cores}, {hardware.get('memory_gib', '?')} GiB{gpu}"


def versions_text(versions: Mapping[str, Any]) -> str:
    """Returns the versions of a run's packages, from the summary's "versions"."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def command_text(arguments: Sequence[str]) -> str:
    """Returns the command that ended a run, for a shell, from the summary's "command"."""
    return shlex.join([Path(arguments[0]).name, *arguments[1:]]) if arguments else "unknown"
