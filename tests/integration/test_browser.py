"""TensorBoard in a real browser: the pages are served, drawn, and without an error in the console."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedlabel.cli.tensorboard import open_tensorboard
from fedlabel.metric_tags import PAGES
from scripts.screenshots import TABS, browser, screenshot
from tests.integration.tiny import run_tiny

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
