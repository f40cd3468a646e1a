"""Calls the command in this process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from fedlabel.cli.main import app


def invoke(*arguments: str | Path, status: int = 0) -> str:
    """Returns what `fedlabel ...` prints, in one line; its exit status is looked at."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == status, done.output
    return " ".join(done.output.split())
