"""TensorBoard and reports in a real browser: drawn, without an error in the console; reports pass axe-core's checks.

tests/vendor/axe.min.js is axe-core 4.14.1 (npm), by Deque, under the Mozilla Public License 2.0.
"""

from __future__ import annotations

import html
import json
import re
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fedlabel
from fedlabel.cli.tensorboard import open_tensorboard
from fedlabel.metric_tags import PAGES
from fedlabel.study.report_page import write_report
from scripts.screenshots import DARK, PHONE, TABS, browse, browser, screenshot
from tests.integration.tiny import TINY, run_tiny
from tests.study.test_report import HOSTILE, make_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser() is None, reason="no Chromium (Debian: apt-get install chromium)"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return bytes(answer.read())


def test_every_tab_is_drawn(tmp_path: Path) -> None:
    run = run_tiny(tmp_path / "runs", "a", "tracking.level=full", "evaluation.panel_samples=4")
    url, _ = open_tensorboard(run.path.parent, 6206)
    for _ in range(60):  # it reads the events in a thread of its own
        layout = json.loads(fetch(f"{url}data/plugin/custom_scalars/layout"))
        if layout:
            break
        time.sleep(1)
    assert [page["title"] for page in layout["category"]] == list(PAGES)
    assert json.loads(fetch(f"{url}data/plugin/projector/runs")) == ["a"]
    assert fetch(f"{url}data/plugin/projector/sprite_image?run=a&name=embeddings%20of%20round%203")[1:4] == b"PNG"
    chromium = browser()
    assert chromium is not None
    for tab, height in TABS.items():
        file = tmp_path / f"{tab}.png"
        assert screenshot(chromium, f"{url}#{tab}", height, file) == [], tab
        pixels = np.asarray(Image.open(file).convert("L"))[150:, 400:]  # beside TensorBoard's own bars
        assert (pixels < 200).mean() > 0.002, f"{tab} is empty"


METHODS = {
    "fedlabel": (),
    "ill": ("method.name=ill", "supervision.kind=noisy", "supervision.noise_rate=0.3", "supervision.label_rate=1.0"),
    "llp_bp": (
        *("method.name=llp_bp", "method.stage_rounds=2", "num_rounds=4", "data.name=breast_cancer"),
        *("supervision.kind=bags", "supervision.bag_size=8", "supervision.label_rate=null"),
    ),
    "dp_ssl": (
        *("method.name=dp_ssl", "method.functions_rounds=2", "method.assignment_rounds=1", "num_rounds=4"),
        *("method.label_model_rounds=1", "training.unlabeled_includes_labeled=true"),
    ),
    "supervised": ("method.name=supervised", "tracking.level=off"),
}
"""Run -> its overrides."""
AXE = (Path(__file__).resolve().parents[1] / "vendor" / "axe.min.js").read_text()
CHECK = """
axe.run(document, {resultTypes: ["violations"]}).then((found) => {
  const bad = found.violations.filter((each) => ["serious", "critical"].includes(each.impact));
  const said = bad.map((each) => [each.id, ...each.nodes.slice(0, 3).map((node) => node.html.slice(0, 200))]);
  document.body.dataset.axe = JSON.stringify(said);
  document.body.dataset.passed = found.passes.length;
});
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small run of each method."""
    out = tmp_path_factory.mktemp("runs")
    made = {}
    for name, overrides in METHODS.items():
        kept = [each for each in TINY if name == "fedlabel" or not each.startswith("method.")]
        mine = [*kept, "tracking.level=full", "evaluation.panel_samples=4", *overrides]
        made[name] = fedlabel.run(overrides=mine, name=name, out=out).path
    return made


def opened(page: Path, scripts: Sequence[str], *options: str) -> tuple[str, list[str]]:
    """Returns the page after its scripts and further ones have run, and all lines of its console."""
    changed = page.with_name(f"{page.stem}-changed.html")
    before, end, after = page.read_text().rpartition("</body>")
    changed.write_text(before + "".join(f"<script>{script}</script>" for script in scripts) + end + after)
    chromium = browser()
    assert chromium is not None
    return browse(chromium, changed.as_uri(), "--dump-dom", *options)


def check_report(page: Path, *options: str) -> str:
    """Asserts that a page is whole, and returns it."""
    dom, console = opened(page, [AXE, CHECK], *options)
    assert console == []
    passed = re.search(r'data-passed="(\d+)"', dom)
    assert passed is not None
    assert int(passed[1]) > 10, "axe-core did not look at the page"
    assert json.loads(html.unescape(re.search(r'data-axe="([^"]*)"', dom)[1])) == []
    plots = re.findall(r'<div class="plot"[^>]*>(.*?)(?=<div class="plot"|<h2)', dom, re.DOTALL)
    assert len(plots) >= 8
    assert all(plot.count("<path") > 2 for plot in plots), "a chart has not been drawn"
    return dom


@pytest.mark.parametrize("name", METHODS)
def test_a_report_is_drawn_and_can_be_read_by_all(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report([runs[name]], page)
    light = check_report(page, "--window-size=1280,900")
    check_report(page, f"--window-size={PHONE},800", DARK)
    headings = re.findall(r"<h2>([^<]*)</h2>", light)
    assert headings[:4] == [
        "Warnings",
        "What was run, and how to run it again",
        "Labels, and who holds them",
        "Learning",
    ]
    expected = {"Clients", "System", "Communication", "Time and bytes"} | (
        {"Pseudo-labels"} if name != "supervised" else set()
    )
    assert expected <= set(headings)
    assert ("tracking.level=off: no figures were recorded" in light) == (name == "supervised")
    assert ("noise matrix, round" in light) == (name == "ill")
    assert ("labelling functions, round" in light) == (name == "dp_ssl")
    assert (">bag<" in light) == (name == "llp_bp")
    assert ("shares of classes in bags, predicted and counted, round" in light) == (name == "llp_bp")


def test_runs_side_by_side(runs: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report(list(runs.values()), page)
    dom = check_report(page, "--window-size=1280,900", DARK)
    assert dom.count("Label facts") == len(runs)


def test_paper_is_light_whatever_the_screen_is(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    folder.close()
    page = tmp_path / "report.html"
    write_report([folder.path], page)
    before, after = (f'dispatchEvent(new Event("{name}"));' for name in ("beforeprint", "afterprint"))
    printing, console = opened(page, [before], DARK)
    assert '<html lang="en" data-theme="light">' in printing
    back, again = opened(page, [before, after], DARK)
    assert '<html lang="en">' in back
    assert console == again == []


HOVER = """
const seen = [];
for (const place of document.querySelectorAll(".plot")) {
  echarts.getInstanceByDom(place).dispatchAction({type: "showTip", seriesIndex: 0, dataIndex: 1});
  seen.push(place.parentElement.textContent);
}
document.body.dataset.seen = JSON.stringify(seen);
document.body.dataset.images = document.querySelectorAll("img[onerror]").length;
"""


def test_hovering_shows_numbers_and_a_hostile_name_as_text(tmp_path: Path) -> None:
    """The second class has it, and the run."""
    folder = make_run(tmp_path / HOSTILE.replace("/", " "))
    folder.close()
    page = tmp_path / "report.html"
    write_report([folder.path], page)
    dom, console = opened(page, [HOVER], "--window-size=1280,900")
    assert console == []
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', dom)[1]))
    of_title = {text.partition("\n")[0].split(" %")[0].strip(): text for text in seen}
    assert "round 2" in of_title["accuracy"]
    assert "20 %" in of_title["accuracy"]
    assert any(f"client 0, class {HOSTILE}" in text and "3 samples, 0 with supervision" in text for text in seen)
    assert any("client 0" in text and "training loss: 0.3333 nats" in text for text in seen)
    assert 'data-images="0"' in dom
