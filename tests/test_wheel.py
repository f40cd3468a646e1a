"""The package as it is installed: what the wheel holds, and that the command works from it outside of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import pytest

from fedlabel.cli.init import ORDER
from fedlabel.hardware import PACKAGE_ROOT, SOURCE_PACKAGES

pytestmark = pytest.mark.slow
NO_BACKEND = (
    "No matching distribution found for hatchling",
    "Could not find a version that satisfies",
    "No module named pip",
)


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "10")
    command = [sys.executable, "-m", "pip", *arguments, *quiet]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout; its tests are skipped where pip, or the build backend, cannot be had."""
    out = tmp_path_factory.mktemp("wheel")
    own = ["--no-build-isolation"] if find_spec("hatchling") else []
    done = pip("wheel", "--no-deps", *own, "--wheel-dir", str(out), str(PACKAGE_ROOT))
    if done.returncode and any(reason in done.stderr for reason in NO_BACKEND):
        pytest.skip(f"the wheel cannot be built here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("fedlabel-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel alone installed in it; what it depends on is this environment's."""
    site = tmp_path_factory.mktemp("site")
    done = pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    assert done.returncode == 0, done.stderr
    return site


def fedlabel(site: Path, cwd: Path, *arguments: str) -> str:
    """Runs the installed command, which finds our packages in `site` first, and returns its output."""
    done = subprocess.run(
        [str(site / "bin" / "fedlabel"), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(site), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_the_packages_and_their_files_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = {PurePosixPath(name).parts[0] for name in names if ".dist-info/" in name}
    assert {PurePosixPath(name).parts[0] for name in names} == {"fedlabel", "clients", "server", *info}
    configs = {path.relative_to(PACKAGE_ROOT).as_posix() for path in (PACKAGE_ROOT / "configs").rglob("*.*")}
    assert {name.removeprefix("fedlabel/") for name in names if name.startswith("fedlabel/configs/")} == configs
    template = {name.rpartition("/")[2] for name in names if name.startswith("fedlabel/cli/template/")}
    assert template == {*ORDER}
    study = {path.relative_to(PACKAGE_ROOT).as_posix() for path in (PACKAGE_ROOT / "fedlabel" / "study").rglob("*.*")}
    data = {name for name in study if not name.endswith((".py", ".pyc"))}
    assert len(data) > 3
    assert data <= {*names}
    assert "fedlabel/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


def test_the_installed_command_works_outside_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    listed = fedlabel(installed, tmp_path, "list")
    for name in ("experiment/digits.yaml", "devices/two_days.yaml", "sweep/digits.yaml"):
        assert name in listed
    short = ("num_rounds=1", "num_clients=2", "model.name=mlp", "training.local_steps=1", "evaluation.figures=false")
    shipped = ("experiment/digits.yaml", "devices/two_days.yaml")  # the second names a trace beside it
    fedlabel(installed, tmp_path, "run", *shipped, *short, "device=cpu", "--name", "a")
    assert (tmp_path / "runs" / "a" / "summary.json").is_file()
    assert "fedlabel │ 0." in " ".join(fedlabel(installed, tmp_path, "doctor").split())
    fedlabel(installed, tmp_path, "init", "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == sorted(ORDER)


def test_the_code_that_runs_is_the_installed_one(installed: Path, tmp_path: Path) -> None:
    """Else the test above would say nothing: this environment knows the checkout, too."""
    code = "import fedlabel, clients, server; print(*(each.__file__ for each in (fedlabel, clients, server)))"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert all(Path(file).is_relative_to(installed) for file in done.stdout.split())


def interpreter(version: str) -> str | None:
    """Returns a working Python of this version, from the search path or pyenv; None without one."""
    places = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for place in filter(None, places):  # pyenv puts a stand-in on the path that fails where a version is not chosen
        found = subprocess.run([str(place), "--version"], capture_output=True, text=True, check=False)
        if found.returncode == 0 and found.stdout.startswith(f"Python {version}."):
            return str(place)
    return None


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_sources_compile_without_a_warning(version: str, tmp_path: Path) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    for package in SOURCE_PACKAGES:
        shutil.copytree(PACKAGE_ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [python, "-W", "error", "-m", "compileall", "-q", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
