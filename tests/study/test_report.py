"""`fedlabel report`: what it reads of a run's folder, and that its page is one file in which texts stay texts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from matplotlib.figure import Figure
from typer.testing import CliRunner

from fedlabel.cli.main import app
from fedlabel.config import load_config, to_yaml
from fedlabel.record.layout import CHARTS
from fedlabel.record.run_folder import RunFolder
from fedlabel.study.holdings import evenly, label_card, partition
from fedlabel.study.report import commands, read_report
from fedlabel.study.report_metrics import BY_EXPERT, charts
from fedlabel.study.report_page import MAX_BYTES, MAX_RUNS, report_html, write_report

HOSTILE = "</script><script>console.log(1)</script><img src=x onerror=console.log(2)>"
AUDIT = {
    "classes": ["cat", HOSTILE],
    "kinds": {"names": ["nothing", "label", "noisy label", "bag"], "clients": [[4, 2, 0, 0], [0, 1, 3, 0]]},
    "class_counts": {
        "classes": ["cat", HOSTILE],
        "clients": [0, 1],
        "with_supervision": [[2, 0], [1, 3]],
        "without": [[1, 3], [0, 0]],
    },
    "candidate_sets": {"sizes": [0, 0, 2], "hold_the_truth": 1},
    "bags": {"sizes": [0, 0, 1, 3], "true_counts_known": 4, "wrong_counts": 2},
    "noisy_labels": {"counts": [[1, 1], [0, 2]], "wrong": 1},
    "labeling_functions": [],
}
"""Of two clients with six and four samples."""


def make_run(path: Path, *overrides: str, rounds: int = 3, audit: dict[str, Any] | None = AUDIT) -> RunFolder:
    """A run of two clients, open as one that still runs; the first client trains in each round."""
    config = load_config([], ["num_clients=2", "num_rounds=3", *overrides])
    folder = RunFolder.create(path, to_yaml(config), {}, events=config.tracking.level != "off")
    if audit is not None:
        folder.supervision_json.write_text(json.dumps(audit))
    for number in range(1, rounds + 1):
        numbers = {"eval/accuracy": number / 10, "train/loss": 1 / number, "comm/bytes_up": 2e6, "comm/bytes_down": 1e6}
        folder.log_round(
            number,
            {**numbers, "system/round_seconds": 0.5, "pseudo/coverage": 0.5},
            lists={
                "eval/client_accuracy": np.array([0.9, 0.2]),
                "eval/class_accuracy": np.array([0.75, np.nan]),
                "train/client_loss": np.array([1 / number, np.nan]),
                "pseudo/class_coverage_local": np.array([0.5, 0.2]),
                "pseudo/class_accuracy_local": np.array([0.8, 0.5]),
                "pseudo/class_coverage_global": np.array([0.25, 0.0]),
                "pseudo/class_accuracy_global": np.array([1.0, np.nan]),
            },
            figures={"eval/confusion": Figure(figsize=(2, 2), dpi=20), "transition/0": Figure(figsize=(1, 1), dpi=20)},
        )
    return folder


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "runs" / "a & <b>b")
    summary = {
        "commit": "0123abc",
        "versions": {"python": "3.11"},
        "command": ["/bin/fedlabel", "run", "data.name=my set"],
    }
    folder.write_summary({**summary, "hardware": {"cpu": "Some CPU"}})
    folder.close()
    return folder.path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": "300"})


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_what_a_report_says_of_a_finished_run(finished: Path) -> None:
    found = read_report(finished)
    json.dumps(found, allow_nan=False)  # it is of JSON's types
    facts = dict(found["facts"])
    assert facts["state"] == "finished, 3 of 3 rounds done"
    assert facts["accuracy"] == "30.0 % last, 30.0 % best, 20.0 % mean of rounds 1–3"
    assert (facts["commit"], facts["command"]) == ("0123abc", "fedlabel run 'data.name=my set'")
    assert found["again"] == [f"fedlabel run '{finished}/config.yaml' --name 'a & <b>b-again' --out {finished.parent}"]
    assert load_config([finished / "config.yaml"]).num_clients == 2
    assert found["charts"]["Learning"][0] == {
        "title": "accuracy",
        "unit": "%",
        "band": False,
        "zero": False,
        "curves": [{"name": "accuracy", "points": [(1, 10.0), (2, 20.0), (3, 30.0)]}],
    }
    bytes_up = found["charts"]["Communication"][0]
    assert (bytes_up["unit"], bytes_up["curves"][0]["points"][0]) == ("MB", (1, 2.0))
    assert found["clients"] == {
        "columns": ["accuracy", "training loss"],
        "clients": [1, 0],
        "values": [[0.2, None], [0.9, 0.33333]],
        "of": 2,
        "mean": 0.55,
    }
    assert found["classes"]["names"] == ["cat", HOSTILE]
    assert found["classes"]["accuracy"] == [0.75, None]
    assert dict(found["costs"])["bytes up, all clients"] == "6.00 MB"
    assert [finding["title"] for finding in found["findings"]] == ["Clients that never trained"]
    assert {page: [p["title"] for p in of_page] for page, of_page in found["pictures"].items()} == {
        "Learning": ["confusion matrix"],
        "Supervision": ["noise matrix of an annotator 0"],
    }
    assert found["pictures"]["Learning"][0]["round"] == 3


def test_the_label_card_and_who_holds_what() -> None:
    """Ten samples; of the first class four, of the other six."""
    card = label_card(AUDIT, 2)
    assert card is not None
    assert [(row["kind"], row["samples"], row["share"], row["clients"]) for row in card["rows"]] == [
        ("no label", 4, 0.4, 1),
        ("label", 3, 0.3, 2),
        ("noisy label", 3, 0.3, 1),
    ]
    facts = dict(card["facts"])
    assert facts["samples per client"] == "4 to 6, median 5"
    assert facts["classes per client"] == "2 each"
    assert facts["smallest class"] == "cat: 40.0 %"
    assert facts["with supervision per client"] == "2 to 4, median 3"
    assert facts["noisy labels that are wrong"] == "25.0 % of 4"
    assert (facts["candidates of a set"], facts["sets that hold the truth"]) == ("2.0 in the mean", "50.0 %")
    assert (facts["bags"], facts["bags with wrong counts"]) == ("4 of 2 to 3 samples, 2.8 in the mean", "2")
    assert partition(AUDIT, 2)["with_supervision"] == [[2, 0], [1, 3]]
    assert label_card({}, 2) is None
    assert partition({}, 2) is None
    of_nodes = {"kinds": AUDIT["kinds"], "label_card": {"noisy": 3, "bags": 0}}
    assert dict(label_card(of_nodes, 2)["facts"])["noisy labels"] == "3"


def test_of_many_clients_some_are_shown() -> None:
    assert list(evenly(3, 5)) == [0, 1, 2]
    assert list(evenly(101, 5)) == [0, 25, 50, 75, 100]
    kinds = {"names": ["nothing", "label"], "clients": [[1, 1]] * 2, "shown_clients": [0, 50], "total": [100, 100]}
    card = label_card({"kinds": kinds}, 100)
    assert card["samples"] == 200
    assert card["facts"][0] == ("clients counted", "2 of 100, evenly spaced")
    counts = {
        "classes": ["cat"],
        "clients": list(range(1000)),
        "with_supervision": [[1]] * 1000,
        "without": [[2]] * 1000,
    }
    audit = {"kinds": {"names": ["label"], "clients": [[3]] * 2000}, "class_counts": counts}
    assert ("classes counted at", "1,000 of 2,000 clients, evenly spaced") in label_card(audit, 2000)["facts"]
    found = partition(audit, 2000)
    assert (found["clients"][0], found["clients"][-1], len(found["clients"]), found["of"]) == (0, 999, 40, 2000)


def test_runs_that_still_run_or_were_killed_say_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", rounds=2)
    running = read_report(folder.path)
    assert dict(running["facts"])["state"] == "still running, 2 of 3 rounds done"
    assert "all numbers are of the 2 rounds so far" in running["missing"][0]
    folder.close()
    stopped = read_report(folder.path)
    assert dict(stopped["facts"])["state"] == "stopped before its end (killed, or failed), 2 of 3 rounds done"
    assert stopped["again"][0] == f"fedlabel run --resume --name a --out {tmp_path}"
    assert "commit" not in dict(stopped["facts"])


def test_a_run_before_its_first_round_and_one_without_tracking(tmp_path: Path) -> None:
    make_run(tmp_path / "begun", rounds=0, audit=None).close()
    make_run(tmp_path / "off", "tracking.level=off").close()
    begun, off = read_report(tmp_path / "begun"), read_report(tmp_path / "off")
    assert any("No round is done yet" in note for note in begun["missing"])
    assert any("supervision.json does not say who holds which class" in note for note in begun["missing"])
    assert (begun["card"], begun["partition"], begun["clients"], begun["classes"]) == (None, None, None, None)
    assert any("tracking.level=off: no figures were recorded" in note for note in off["missing"])
    assert off["pictures"] == {}
    text = report_html([begun, off])
    assert "Not recorded." in text
    assert "No round is done yet" in text


def test_a_run_of_real_nodes_says_what_nobody_knows(tmp_path: Path) -> None:
    audit = {"classes": ["cat", "dog"], "kinds": AUDIT["kinds"], "label_card": {"noisy": 3, "bags": 0}}
    folder = make_run(tmp_path / "a", "data.name=nodes", "data.schema=/there/schema.yaml", audit=audit)
    folder.close()
    found = read_report(folder.path)
    assert found["again"] == [f"flwr run . SUPERLINK --stream --run-config 'configs=\"{folder.path}/config.yaml\"'"]
    assert any("On real nodes nothing is compared with true labels" in note for note in found["missing"])
    assert dict(found["card"]["facts"])["noisy labels"] == "3"
    assert "Who holds what" not in report_html([found])


def test_hostile_names_stay_texts(finished: Path) -> None:
    """In a run's name, in a class's, in a failure."""
    (finished / "failures.log").write_text(f"Round 1, client 0: ValueError: {HOSTILE}\n    Traceback\n")
    assert call(finished).exit_code == 0
    page = Page((finished / "report.html").read_text())
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 4
    assert "b" not in names
    assert all(
        tag != "img" or str(attributes["src"]).startswith("data:image/png;base64,") for tag, attributes in page.tags
    )
    assert "a & <b>b" in page.texts
    assert any(HOSTILE in text for text in page.texts), "the failure's message"
    data = next(text for text in page.texts if text.startswith('{"charts"'))
    assert HOSTILE in json.loads(data)["charts"][0]["classes"]


def test_the_page_needs_nothing_but_itself(finished: Path) -> None:
    assert call(finished).exit_code == 0
    text = (finished / "report.html").read_text()
    page = Page(text)
    addresses = [value or "" for _, a in page.tags for name, value in a.items() if name in ("src", "href", "srcset")]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(['\"]?http", text)
    plots = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(plots) > 7
    assert all(plot["aria-label"] for plot in plots)
    assert (
        "Accuracy of clients in %, the worst first. Worst: client 1, 20.0; best: client 0, 90.0; mean of all 55.0."
        in [plot["aria-label"] for plot in plots]
    )


def test_who_labels_each_class(finished: Path) -> None:
    """Of the first class the local model labels 50 %, 80 % of it right, the global one 25 %, all right."""
    html = report_html([read_report(finished)])
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    chart = next(chart for chart in data["charts"] if chart["title"].startswith("Pseudo-labels by true class"))
    first = {each["name"]: each["values"][0] for each in chart["series"]}
    assert first == pytest.approx(
        {"local model, right": 40, "local model, wrong": 10, "global model, right": 25, "not used": 25}
    )


def test_several_runs_stand_side_by_side(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "other").close()
    monkeypatch.chdir(tmp_path)
    result = call(finished, "other")
    assert result.exit_code == 0, result.output
    assert "Written: report.html" in result.output
    html = (tmp_path / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert data["runs"] == ["a & <b>b", "other"]
    accuracy = next(chart for chart in data["charts"] if chart["title"] == "accuracy")
    assert [(each["run"], each["name"]) for each in accuracy["series"]] == [
        (0, "a & <b>b: accuracy"),
        (1, "other: accuracy"),
    ]
    assert len([chart for chart in data["charts"] if chart["kind"] == "clients"]) == 2


def test_a_page_stays_below_five_megabytes(tmp_path: Path) -> None:
    """The most runs that it takes, with more rounds than are drawn and more pictures than fit."""
    noise = np.random.default_rng(0).integers(0, 255, (300, 1500, 3))
    paths = []
    for number in range(MAX_RUNS):
        folder = make_run(tmp_path / str(number), "num_rounds=2000", rounds=1)
        row = json.loads(folder.metrics_jsonl.read_text())
        row |= {f"train/loss_{name}": 1 / 3 for name in ("supervised", "unsupervised", "em", "mix", "vat", "forward")}
        folder.metrics_jsonl.write_text("".join(json.dumps(row | {"round": i}) + "\n" for i in range(1, 2001)))
        for tag in ("pseudo/samples", "pseudo/samples_wrong"):
            figure = Figure(figsize=(15, 3), dpi=100)
            figure.figimage(noise)
            folder.log_figure(tag, figure)
        folder.close()
        paths.append(folder.path)
    write_report(paths, tmp_path / "out" / "x.html")
    size = (tmp_path / "out" / "x.html").stat().st_size
    assert 1_000_000 < size < MAX_BYTES
    found = read_report(paths[0], points=150, picture_bytes=10_000)
    assert len(found["charts"]["Learning"][0]["curves"][0]["points"]) == 150
    assert any(
        "Left out, as the page would be too large: pseudo-labelled samples;" in note for note in found["missing"]
    )


def test_what_is_no_run_or_damaged_is_refused(finished: Path, tmp_path: Path) -> None:
    nothing = call(tmp_path / "no")
    assert nothing.exit_code == 2
    assert f"{tmp_path}/no holds no run (no config.yaml)" in nothing.stderr
    twice = call(finished, finished, "--out", tmp_path / "x.html")
    assert (twice.exit_code, "given twice" in twice.stderr) == (2, True)
    many = call(*[finished] * (MAX_RUNS + 1), "--out", tmp_path / "x.html")
    assert "9 runs are too many: a report shows up to 8" in many.stderr
    (finished / "supervision.json").write_text("[1]")
    damaged = call(finished, "--out", tmp_path / "x.html")
    assert damaged.exit_code == 2
    assert "supervision.json is damaged (it holds no dict)" in damaged.stderr
    (finished / "supervision.json").write_text("{")
    assert "supervision.json is damaged (" in call(finished).stderr
    assert not (tmp_path / "x.html").exists()


def test_clients_are_called_by_the_names_that_a_column_gives_them(finished: Path) -> None:
    clients = [{"name": "Aachen"}, {"name": HOSTILE}]
    (finished / "partition.json").write_text(json.dumps({"clients": clients}))
    run = read_report(finished)
    assert run["client_labels"][0] == "0: Aachen"
    text = report_html([run])
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])
    (bars,) = [chart for chart in data["charts"] if chart["kind"] == "clients"]
    assert bars["names"] == [f"1: {HOSTILE[:24]}…", "0: Aachen"]
    assert "best: client 0: Aachen, 90.0" in bars["label"]
    (bubbles,) = [chart for chart in data["charts"] if chart["kind"] == "bubbles"]
    assert bubbles["clients"] == ["0: Aachen", f"1: {HOSTILE[:24]}…"]
    assert HOSTILE[:24] not in text
    (finished / "partition.json").write_text("[]")
    assert "partition.json is damaged" in call(finished).stderr


def test_a_method_and_a_model_that_cannot_be_imported_are_called_by_their_names(finished: Path) -> None:
    config = (finished / "config.yaml").read_text()
    method = "method:\n  name: absent:Smooth\n  width: 3.0\n"
    own = re.sub(r"^method:\n( .*\n)+", method, config, flags=re.MULTILINE).replace("name: cnn", "name: absent:net")
    (finished / "config.yaml").write_text(own)
    run = read_report(finished)
    assert {("method", "absent:Smooth"), ("model", "absent:net")} <= set(run["facts"])
    assert run["config"] == own
    assert any("absent:Smooth could not be loaded here" in note and "PYTHONPATH" in note for note in run["missing"])


def row_of(number: int, **values: float) -> dict[str, float]:
    return {"round": number} | {f"pseudo/{name}": value for name, value in values.items()}


def titles(rows: list[dict[str, float]]) -> dict[str, bool]:
    """Title -> whether it is 0 in all rounds."""
    return {each["title"]: each["zero"] for page in charts(rows, (), 2).values() for each in page}


def test_charts_by_expert_need_two_experts() -> None:
    """As of a method with one teacher, and of one whose local model labels in the second round alone."""
    alone = {"coverage": 0.5, "coverage_local": 0.0, "coverage_global": 0.5, "from_global": 1.0}
    assert not {*BY_EXPERT} & titles([row_of(1, **alone), row_of(2, **alone)]).keys()
    both = titles([row_of(1, **alone), row_of(2, **alone | {"coverage_local": 0.1}), row_of(3, **alone)])
    assert {"coverage by expert", "who labels, and do the experts agree"} <= both.keys()
    assert {*BY_EXPERT} <= CHARTS["Pseudo-labels"].keys()


def test_charts_of_nothing_but_0_are_one_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", rounds=0)
    for number in range(1, 12):
        late = 1.0 if number == 5 else 0.0  # neither first nor last: not among two points
        numbers = {"system/failed_clients": 0.0, "train/forward_samples": late, "eval/accuracy": 0.5}
        folder.log_round(number, numbers)
    folder.close()
    run = read_report(folder.path, points=2)
    assert ("accuracy", "50.0 % last, 50.0 % best, 50.0 % mean of rounds 7–11") in run["facts"]
    text = report_html([run])
    assert '<p class="intro">0 in all rounds: clients that gave no result.</p>' in text
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])
    drawn = {chart["title"] for chart in data["charts"]}
    assert "samples sent through a model" in drawn
    assert "clients that gave no result" not in drawn


def test_a_network_from_python_is_given_again_there(tmp_path: Path) -> None:
    """No shell command could: the process would not have it."""
    config = load_config()
    passed = replace(config, model=replace(config.model, name="python:Net#0123abcd"))
    (line,) = commands(tmp_path, passed, "finished")
    assert line.startswith("# in Python, with the network")
    assert "fedlabel run " not in line
    assert commands(tmp_path, config, "finished")[0].startswith("fedlabel run ")
