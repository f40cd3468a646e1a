from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedlabel.hardware import (
    PACKAGE_ROOT,
    describe_hardware,
    hash_sources,
    resolve_device,
    source_commit,
    source_hash,
    versions,
)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A small copy of the layout: packages beside each other, and files that are not ours."""
    for name in ("fedlabel/__init__.py", "fedlabel/methods/base.py", "clients/__init__.py", "server/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("count", "name", "expected"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "auto", "cuda"),
        (2, "cpu", "cpu"),
        (2, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_resolve_device(monkeypatch, count, name, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize(("count", "name"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_absent_cuda_device_is_refused_with_the_fix(monkeypatch, count, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=rf"`device` \(={name}\) is not available.*use device=auto or cpu"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:-1", "cpu:0", "CUDA"])
def test_unknown_device_names_what_is_allowed(name):
    with pytest.raises(ValueError, match=r"`device` .*must be one of auto, cpu, cuda, cuda:N"):
        resolve_device(name)


def test_describe_hardware():
    hardware = describe_hardware(torch.device("cpu"))
    assert 1 <= hardware["usable_cores"] <= hardware["logical_cores"]
    assert hardware["memory_gib"] > 0
    assert hardware["cpu"]
    assert hardware["platform"]
    assert hardware["device"] == "cpu"
    assert "gpu" not in hardware


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_describe_hardware_names_the_gpu():
    hardware = describe_hardware(resolve_device("cuda"))
    assert hardware["gpu"] == torch.cuda.get_device_name()
    assert hardware["gpu_memory_gib"] > 0


def test_versions_says_so_where_a_package_is_absent(monkeypatch):
    monkeypatch.setattr("fedlabel.hardware.DISTRIBUTIONS", ("torch", "no-such-package"))
    found = versions()
    assert found == {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": found["torch"],
        "no-such-package": "not installed",
    }
    assert torch.__version__.startswith(found["torch"].partition("+")[0])


def test_versions_imports_neither_flower_nor_ray():
    code = (
        "import sys, fedlabel.hardware as h, fedlabel.record.run_folder, fedlabel.record.figures\n"
        "h.source_hash(); found = h.versions()\n"
        "assert {'flwr', 'ray'} <= set(found) and not {'flwr', 'ray', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE_ROOT)


def test_source_commit(sources):
    assert source_commit(sources) == "unknown"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(sources), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    (sources / "README.md").write_text("text")
    git("add", "README.md")
    git("commit", "--quiet", "-m", "first")
    assert source_commit(sources) == "unknown", "the repository around does not track the package"

    git("add", ".")
    git("commit", "--quiet", "-m", "second")
    commit = git("rev-parse", "HEAD")
    assert source_commit(sources) == commit
    (sources / "untracked.txt").write_text("text")
    assert source_commit(sources) == commit
    (sources / "fedlabel/__init__.py").write_text("# changed\n")
    assert source_commit(sources) == f"{commit}-dirty"


def test_source_commit_without_git(monkeypatch, sources):
    monkeypatch.setenv("PATH", "")
    assert source_commit(sources) == "unknown"


def test_source_hash_is_that_of_this_code():
    assert source_hash() == hash_sources(PACKAGE_ROOT)
    assert len(source_hash()) == 16
    assert int(source_hash(), 16) >= 0


def test_hash_follows_content_and_names_of_our_sources_only(sources, tmp_path_factory):
    before = hash_sources(sources)
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(sources, copy)
    assert hash_sources(copy) == before, "the place does not matter"

    for other in ("README.md", "scripts/run.py", "fedlabel/data.csv", "fedlabel/__pycache__/base.cpython-312.pyc"):
        (copy / other).parent.mkdir(exist_ok=True)
        (copy / other).write_text("other")
    assert hash_sources(copy) == before, "files that are not ours do not matter"

    changed = copy / "fedlabel/methods/base.py"
    original = changed.read_text()
    changed.write_text(original + "#")
    assert hash_sources(copy) != before
    changed.write_text(original)
    assert hash_sources(copy) == before
    changed.rename(copy / "fedlabel/methods/other.py")
    assert hash_sources(copy) != before
