"""Commands that are copied from a page: its code blocks, and a shell that runs them one after the other."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path


def blocks(page: Path) -> dict[str, list[str]]:
    """Returns the bash blocks of a Markdown page by the heading that they stand below."""
    found: dict[str, list[str]] = {}
    heading = ""
    parts = re.split(r"^(#+ [^\n]*|```\w*\n.*?^```)$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for part in parts:
        if part.startswith("#"):
            heading = part.lstrip("# ")
        elif part.startswith("```bash\n"):
            found.setdefault(heading, []).append(part.removeprefix("```bash\n").removesuffix("```"))
    return found


class Shell:
    """A terminal: blocks run in one working directory after the other, and what they export stays.

    Args:
        folder: where it begins, and where outputs are written.
        env: its environment.
    """

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self._folder, self._env = folder, dict(env)
        self._memory = folder / "exported.sh"
        self.seconds = 0.0
        """That all blocks have taken."""

    def run(self, block: str, fails: bool = False) -> str:
        """Runs a block as it is, and returns what it prints; processes that it leaves in the background go on."""
        output = self._folder / "output.txt"
        load = f'[[ ! -e "{self._memory}" ]] || . "{self._memory}"\n'
        text = f'{load}set -euo pipefail\n{block}\nexport -p > "{self._memory}"\n'
        began = time.monotonic()
        with output.open("wb") as file:  # not a pipe, which what stays in the background would keep open
            done = subprocess.run(
                ["bash", "-c", text],
                cwd=self._folder,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=500,
            )
        self.seconds += time.monotonic() - began
        printed = output.read_text()
        assert (done.returncode != 0) == fails, f"{block}\n--- {done.returncode}\n{printed}"
        return printed
