"""Pictures of TensorBoard's tabs and of `fedlabel report`, by a headless Chromium (Debian: apt-get install chromium).

python scripts/screenshots.py RUNS OUT          all tabs of TensorBoard on a folder of runs, and each run's report:
                                                on a laptop and on a phone, light and dark
python scripts/screenshots.py --docs            trains a small run and makes the pictures of docs/inspect.md
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from fedlabel.cli.tensorboard import open_tensorboard
from fedlabel.record.event_file import read_pictures
from fedlabel.record.names import CONFIG_YAML
from fedlabel.study.report_page import write_report

TABS = {"custom_scalars": 3000, "images": 2600, "text": 2000, "projector": 768, "hparams": 900}
"""Tab -> height of its picture; all are as wide as a laptop's screen."""
WIDTH, PHONE = 1366, 390
PORT = 6106
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
DARK = "--blink-settings=preferredColorScheme=0"
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=30000"),
)
ERROR = re.compile(r"CONSOLE.*(Uncaught|ERROR|[Ee]rror:|Failed)")
DOCS = Path(__file__).resolve().parents[1] / "docs" / "figures" / "inspect"
DOCS_RUN = (
    *("num_rounds=20", "num_clients=10", "fraction_train=0.5", "tracking.level=full", "device=cpu"),
    "evaluation.panel_samples=8",
)
"""What the pictures of docs/inspect.md show: FedLabel on the embedded digits."""
DOCS_FIGURES = ("eval/clients_over_rounds", "pseudo/experts", "pseudo/precision_coverage", "pseudo/samples_wrong")


def browser() -> str | None:
    """Returns the path of a Chromium; None: there is none."""
    return next((path for path in map(shutil.which, CHROMIUM) if path is not None), None)


def browse(chromium: str, url: str, *options: str) -> tuple[str, list[str]]:
    """Opens a page in a new profile and returns what the program prints, and the lines of the page's console.

    Args:
        chromium: the program.
        url: of the page.
        options: of Chromium, e.g. --dump-dom, which prints the page after its scripts have run.
    """
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, *OPTIONS, f"--user-data-dir={profile}", *options, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def screenshot(chromium: str, url: str, height: int, file: Path, width: int = WIDTH, dark: bool = False) -> list[str]:
    """Writes a picture of a page and returns the errors in its console.

    Args:
        chromium: the program.
        url: of the page.
        height: of the picture.
        file: where it goes, a PNG.
        width: of the picture.
        dark: whether the reader prefers dark pages.
    """
    size, dark_options = f"--window-size={width},{height}", [DARK] * dark
    _, console = browse(chromium, url, size, *dark_options, f"--screenshot={file.absolute()}")
    return [line for line in console if ERROR.search(line)]


def picture_all(chromium: str, runs: Path, out: Path) -> None:
    """Writes a picture for each tab of TensorBoard, and four for each run's report."""
    url, _ = open_tensorboard(runs, PORT)
    for tab, height in TABS.items():
        errors = screenshot(chromium, f"{url}#{tab}", height, out / f"{tab}.png")
        print(f"{out / tab}.png", *errors, sep="\n  ")
    for run in sorted(file.parent for file in runs.rglob(CONFIG_YAML)):
        page = out / f"report-{run.name}.html"
        write_report([run], page)
        for name, width, height in (("laptop", WIDTH, 6500), ("phone", PHONE, 12000)):
            for theme in ("light", "dark"):
                file = page.with_name(f"{page.stem}-{name}-{theme}.png")
                errors = screenshot(chromium, page.absolute().as_uri(), height, file, width, theme == "dark")
                print(file, *errors, sep="\n  ")


def picture_docs(chromium: str, out: Path) -> None:
    """Writes the pictures of docs/inspect.md, of up to 256 colours, which makes them small."""
    command, name = Path(sys.executable).with_name("fedlabel"), "fedlabel-digits"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        subprocess.run([command, "run", *DOCS_RUN, "--name", name], check=True, capture_output=True)
        run = Path("runs", name)
        pictures = read_pictures(run)
        for tag in DOCS_FIGURES:
            file = out / f"{tag.replace('/', '_')}.png"
            file.write_bytes(pictures[tag].png)
            _shrink(file)
        page = run / "report.html"
        write_report([run], page)
        screenshot(chromium, page.absolute().as_uri(), 1500, out / "report.png", 1280)
        _shrink(out / "report.png", 900)
        url, _ = open_tensorboard(Path("runs"), PORT)
        screenshot(chromium, f"{url}#custom_scalars", 1000, out / "tensorboard.png", 1280)
        _shrink(out / "tensorboard.png", 900)


def _shrink(file: Path, width: int | None = None) -> None:
    picture = Image.open(file).convert("RGB")
    if width is not None:
        picture = picture.resize((width, picture.height * width // picture.width), Image.Resampling.LANCZOS)
    few = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(file, optimize=True)
    print(file, file.stat().st_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--docs", action="store_true")
    asked = parser.parse_args()
    chromium = browser()
    if chromium is None:
        sys.exit(f"There is none of {', '.join(CHROMIUM)}: install one, on Debian with apt-get install chromium.")
    if asked.docs == (asked.out is not None):
        parser.error("give RUNS and OUT, or --docs alone")
    out = DOCS if asked.docs else asked.out
    out.mkdir(parents=True, exist_ok=True)
    if asked.docs:
        picture_docs(chromium, out)
    else:
        picture_all(chromium, asked.runs, out)


if __name__ == "__main__":
    main()
