"""Pictures of TensorBoard's tabs on a folder of runs, made by a headless Chromium (Debian: apt-get install chromium).

python scripts/screenshots.py RUNS OUT
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from fedlabel.cli.tensorboard import open_tensorboard

TABS = {"custom_scalars": 3000, "images": 2600, "text": 2000, "projector": 768, "hparams": 900}
"""Tab -> height of its picture; all are as wide as a laptop's screen."""
WIDTH = 1366
PORT = 6106
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def browser() -> str | None:
    """Returns the path of a Chromium; None: there is none."""
    return next((path for path in map(shutil.which, CHROMIUM) if path is not None), None)


def screenshot(chromium: str, url: str, height: int, file: Path) -> list[str]:
    """Writes a picture of a page and returns the errors in its console.

    Args:
        chromium: the program.
        url: of the page.
        height: of the picture.
        file: where it goes, a PNG.
    """
    with tempfile.TemporaryDirectory() as profile:
        options = (
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--disable-dev-shm-usage", "--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={profile}"),
            *("--virtual-time-budget=30000", f"--window-size={WIDTH},{height}", f"--screenshot={file}"),
        )
        done = subprocess.run([chromium, *options, url], capture_output=True, text=True, timeout=180, check=True)
    return [line for line in done.stderr.splitlines() if re.search(r"CONSOLE.*(Uncaught|ERROR|[Ee]rror:|Failed)", line)]


def main() -> None:
    """Writes a picture for each tab."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    chromium = browser()
    if chromium is None:
        raise SystemExit(
            f"There is none of {', '.join(CHROMIUM)}: install one, on Debian with apt-get install chromium."
        )
    asked.out.mkdir(parents=True, exist_ok=True)
    url, _ = open_tensorboard(asked.runs, PORT)
    for tab, height in TABS.items():
        errors = screenshot(chromium, f"{url}#{tab}", height, asked.out.absolute() / f"{tab}.png")
        print(f"{asked.out / tab}.png", *errors, sep="\n  ")


if __name__ == "__main__":
    main()
