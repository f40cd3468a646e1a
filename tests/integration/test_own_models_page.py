"""docs/own-models.md, as somebody who reads it does it: files are saved, commands run, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedlabel.hardware import PACKAGE_ROOT
from tests.integration.markdown import Shell, blocks
from tests.integration.processes import environment

PAGE = PACKAGE_ROOT / "docs" / "own-models.md"


@pytest.mark.slow
def test_the_page_works(tmp_path: Path) -> None:
    text = PAGE.read_text()
    files = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(files) == text.count("```python")
    for name, content in files:
        (tmp_path / name).write_text(content)
    shell = Shell(tmp_path, environment())
    printed = "".join(shell.run(block) for each in blocks(PAGE).values() for block in each)
    assert "3 of 4 arrays" not in printed
    assert "2 of 4 arrays were loaded; of another shape, so drawn at random: head.weight, head.bias" in " ".join(
        printed.split()
    )
    assert (tmp_path / "predictions.csv").read_text().startswith("sample,predicted,p:0,p:1")
    assert len((tmp_path / "again.csv").read_text().splitlines()) == 4
    assert printed.rstrip().endswith("['calm', 'angry', 'calm']")
