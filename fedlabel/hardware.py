"""The environment of a run: device, machine, versions of packages and of this code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds the packages `fedlabel`, `clients` and `server` beside each other."""

SOURCE_PACKAGES = ("clients", "fedlabel", "server")
DISTRIBUTIONS = ("fedlabel", "torch", "torchvision", "flwr", "ray", "numpy", "omegaconf", "tensorboard")


def resolve_device(name: str) -> torch.device:
    """Returns the torch device that the configuration key `device` selects.

    Args:
        name: auto (CUDA if there is one, else the CPU), cpu, cuda, or cuda:N.

    Raises:
        ValueError: the name is none of these, or there is no such CUDA device.
    """
    import torch  # here: `fedlabel --help` does not need it

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        hint = " Did you mean cuda?" if name.lower().startswith(("gpu", "cuda", "nvidia")) or name.isdecimal() else ""
        raise ValueError(f"`device` (={name}) must be one of auto, cpu, cuda, cuda:N (N = 0, 1, ...).{hint}")
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    if int(name.partition(":")[2] or 0) >= count:
        raise ValueError(
            f"`device` (={name}) is not available: torch {torch.__version__} finds {count} CUDA devices here; "
            "use device=auto or cpu."
        )
    return torch.device(name)


def usable_cores() -> int:
    """Returns the number of cores that this process may be scheduled on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_hardware(device: torch.device) -> dict[str, str | int | float]:
    """Returns the hardware that timings depend on: CPU, cores, memory and, if `device` is CUDA, the GPU.

    `usable_cores` counts the cores this process may be scheduled on, which can be fewer than `logical_cores`.
    """
    import torch  # here: `fedlabel --help` does not need it

    logical = os.cpu_count() or 1
    hardware: dict[str, str | int | float] = {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "logical_cores": logical,
        "usable_cores": usable_cores(),
        "device": str(device),
    }
    if memory := memory_bytes():
        hardware["memory_gib"] = _gib(memory)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware |= {
            "gpu": properties.name,
            "gpu_memory_gib": _gib(properties.total_memory),
            "cuda": str(torch.version.cuda),
        }
    return hardware


def memory_bytes() -> int | None:
    """Returns the memory of this machine; None if the system does not report it."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def versions() -> dict[str, str]:
    """Returns package -> installed version, "not installed" where it is absent; imports none of them."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def source_commit(root: Path = PACKAGE_ROOT) -> str:
    """Returns the git commit of this code, with "-dirty" if tracked files differ from it; "unknown" without git.

    Args:
        root: folder that holds the package. It counts only if its repository tracks `fedlabel/__init__.py`: a copy
            installed somewhere below another project's repository has no commit of its own.
    """
    try:
        _git(root, "ls-files", "--error-unmatch", "fedlabel/__init__.py")
        commit = _git(root, "rev-parse", "HEAD").strip()
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no").strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if dirty else commit


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Returns the hash of the code this process runs; server and clients compare theirs before a run starts."""
    return hash_sources(PACKAGE_ROOT)


def hash_sources(root: Path) -> str:
    """Returns 16 hex digits of a SHA-256 over path and content of every *.py file of our packages in `root`."""
    digest = hashlib.sha256()
    files = {
        path.relative_to(root).as_posix(): path for name in SOURCE_PACKAGES for path in (root / name).rglob("*.py")
    }
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _gib(size: int) -> float:
    return round(size / 2**30, 1)
