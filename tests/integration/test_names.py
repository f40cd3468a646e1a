"""Files of the user's that are called like ours, or like what we import, change nothing; their method is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedlabel.importing import add_working_directory, claim_packages, import_path
from tests.integration.processes import environment
from tests.integration.tiny import TINY

ALIKE = ("server", "clients", "fedlabel", "numpy", "torch", "types", "random", "flwr", "tests", "struct", "tempfile")
METHOD = """
from dataclasses import dataclass
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.recipe import LabelKinds, Method, Phase, Recipe, Stage

@dataclass(frozen=True)
class Mine(Method):
    name: str = "my_method:Mine"

    def recipe(self, task):
        return Recipe((Stage((Phase("train", labels_loss),)),), uses=LabelKinds.TRUE)
"""
SWEEP = """
methods:
  mine: ["method.name=my_method:Mine"]
settings:
  all: []
seeds: [0]
overrides: [%s]
"""
OPTIONS = [
    *(option for option in TINY if not option.startswith(("method.", "num_"))),
    *("num_clients=2", "num_rounds=1", "evaluation.figures=false", "method.name=my_method:Mine"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with files that end the process that imports them, and a method."""
    for name in ALIKE:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the user was imported')\n")
    (tmp_path / "clients.py").rename(tmp_path / "clients_are_a_folder.py")
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "__init__.py").write_text("raise SystemExit('clients/ of the user was imported')\n")
    (tmp_path / "my_method.py").write_text(METHOD)
    return tmp_path


@pytest.fixture
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What an installer writes into bin/."""
    script = tmp_path_factory.mktemp("bin") / "fedlabel"
    script.write_text(
        "import sys\nfrom fedlabel.cli.main import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
    )
    return [sys.executable, str(script)]


def call(command: list[str], folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_names_in_the_working_directory(command: list[str], folder: Path) -> None:
    call(command, folder, "run", *OPTIONS, "--name", "x")
    assert (folder / "runs" / "x" / "summary.json").is_file()


@pytest.mark.slow
def test_names_in_the_working_directory_of_rays_workers(command: list[str], folder: Path) -> None:
    call(command, folder, "run", *OPTIONS, "grid.kind=ray", "grid.num_workers=1", "--name", "x")
    assert not (folder / "runs" / "x" / "failures.log").exists()


@pytest.mark.slow
def test_names_in_the_working_directory_of_a_sweep(command: list[str], folder: Path) -> None:
    shared = ", ".join(f"'{option}'" for option in OPTIONS if not option.startswith("method."))
    (folder / "sweep.yaml").write_text(SWEEP % shared)
    call(command, folder, "sweep", "sweep.yaml", "--workers", "1", "--out", "out")
    assert len(list((folder / "out").rglob("summary.json"))) == 1


@pytest.mark.slow
def test_names_beside_a_script(folder: Path) -> None:
    """Here the user's folder comes first, and what is called like a library would be imported: not so `server`."""
    for name in {*ALIKE} - {"server", "clients"}:
        (folder / f"{name}.py").unlink()
    options = [*OPTIONS, "grid.kind=ray", "grid.num_workers=1"]
    (folder / "train.py").write_text(f"import fedlabel\nfedlabel.run([], {options}, name='x')\n")
    call([sys.executable, "train.py"], folder)
    assert not (folder / "runs" / "x" / "failures.log").exists()


def test_a_module_that_was_imported_before_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "server.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "server")
    __import__("server")
    with pytest.raises(ValueError, match=rf"`server` that is not fedlabel's .*\(from {tmp_path}/server.py\)"):
        claim_packages()


def test_the_working_directory_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/bin", "/lib"])
    monkeypatch.chdir(tmp_path)
    add_working_directory()
    add_working_directory()
    assert sys.path == ["/bin", "/lib", str(tmp_path)]


def test_other_processes_find_our_packages_before_all_but_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlabel.hardware import PACKAGE_ROOT

    library = str(Path(sys.modules["os"].__file__ or "").parent)
    monkeypatch.setattr(sys, "path", ["/home/user", library, "/venv/site-packages", str(PACKAGE_ROOT)])
    assert import_path() == [library, str(PACKAGE_ROOT), "/home/user", "/venv/site-packages"]
