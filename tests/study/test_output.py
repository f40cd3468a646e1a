"""What `fedlabel compare` writes, and that the report needs nothing but itself."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import Result
from matplotlib.image import imread
from typer.testing import CliRunner

from fedlabel.cli.main import app
from fedlabel.study.output import curves, on_one_axis, value_at, write_comparison
from fedlabel.study.runs import read_comparison
from tests.study.runs import make_run, make_sweep

FILES = {"compare.md", "compare.csv", "compare_runs.csv", "report.html"}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's folder after `fedlabel compare`."""
    folder = make_sweep(tmp_path_factory.mktemp("comparison") / "few labels")
    result = call(folder)
    assert result.exit_code == 0, result.output
    assert "alpha 0.1 / labelled only: not finished and left out: seed 2." in result.output
    return folder


def test_files(out: Path) -> None:
    curves = {f"curves-{name}.{ending}" for name in ("alpha-0.1", "alpha-1-mild") for ending in ("png", "svg")}
    assert {path.name for path in out.iterdir() if path.is_file()} == {*FILES, *curves, "sweep.json"}
    assert imread(out / "curves-alpha-0.1.png").std() > 0.01


def test_the_terminal_has_spread_and_test(out: Path, tmp_path: Path) -> None:
    """The numbers of `test_markdown_has_every_number`; these runs have no worst client."""
    output = call(out, "--out", tmp_path).output
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]
    assert rows[:3] == [
        ["labelled only", "2", "30.0 ± 0.0", "–", "–", "–"],
        ["FedLabel", "3", "45.0 ± 7.5", "–", "+11.2", "0.205"],
        ["fully <b>labelled</b>", "3", "67.5 ± 0.0", "–", "–", "–"],
    ], rows
    assert "difference to labelled only" in output


def test_markdown_has_every_number(out: Path) -> None:
    """FedLabel: seeds 0.5, 0.6, 0.7 in round 4, half of it in round 2. The mean of both: 0.375, 0.45, 0.525 (sd 0.075).

    Labelled only, the baseline, has seeds 0 and 1 with 0.3: the difference over these is (0.075 + 0.15) / 2 = 0.1125.
    Its t is 0.1125 / (0.053 / sqrt(2)) = 3 with one degree of freedom, p = 1 - 2 / pi * arctan(3) = 0.205. 60 % is
    reached by seeds 1 and 2 in round 4, after 4 MB.
    """
    text = (out / "compare.md").read_text()
    ours = "| FedLabel | 3 | 0.1 | 60.0 ± 10.0 | **45.0 ± 7.5** | 46.05 ± 1.09 | 60.0 ± 10.0 |"
    assert "| method | seeds | lr | last | mean of last tenth | published | best | difference | p |" in text
    assert f"{ours} +11.2 (labelled only) | 0.205 |" in text
    assert "| labelled only | 2 | 0.1 | 40.0 ± 0.0 | 30.0 ± 0.0 | – | 40.0 ± 0.0 | – | – |" in text
    assert r"| fully \<b>labelled\</b> | 3 | 0.1 | 90.0 ± 0.0 | 67.5 ± 0.0 | – | 90.0 ± 0.0 | – | – |" in text
    assert "| method | rounds to 60 % | MB up to 60 % | MB up | seconds | failed |" in text
    assert "| FedLabel | 4 (2/3) | 4.0 (2/3) | 4.0 | 12 ± 0 | 3 |" in text
    assert "| labelled only | – | – | 4.0 | 12 ± 0 | 2 |" in text
    assert "## alpha 1 \\| mild" in text
    assert "### Pseudo-labels" not in text  # no run has any
    for fact in (
        "- hardware: Some CPU, 2 of 4 cores, 8.0 GiB, no GPU used",
        "- commit: `0123abc`",
        "- commands: `fedlabel run 'data.name=my set'`",
        "- common to all: `the defaults`",
        "- evaluated on: the test split of digits",
        "- means: mean of 2 of rounds 1–4\n",
        "Difference: to the baseline labelled only (the first row that trains on the labels alone, as no other was ",
        "in accuracy, mean of last tenth, in points",
        "corrected by Holm's procedure for the number of rows that are tested against the baseline",
        "- **warning:** alpha 0.1 / FedLabel: training.lr=0.1 lies at the edge",
        "What differs from its setting: a smaller net",
        "- FedLabel: `the configuration as it is`",
        "\nnum_clients=20\n",
        "![accuracy over rounds](curves-alpha-0.1.png)",
    ):
        assert fact in text, fact
    assert "All pairs" not in text
    assert "partition.dirichlet_alpha" not in text.partition("## Configuration common")[2]


def test_curves_are_in_percent_of_the_evaluated_rounds(out: Path) -> None:
    """FedLabel in rounds 2 and 4: means 0.3 and 0.6 over three seeds, sd 0.05 and 0.1."""
    axis = curves(read_comparison([out]), "alpha 0.1").axes[0]
    assert [line.get_label() for line in axis.lines] == [
        "labelled only (n=2)",
        "FedLabel (n=3)",
        "fully <b>labelled</b> (n=3)",
    ]
    assert axis.lines[1].get_xydata().tolist() == [pytest.approx([2, 30]), pytest.approx([4, 60])]
    band = axis.collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((25, 70))
    assert (axis.get_title(), axis.get_ylabel()) == ("alpha 0.1", "test accuracy (%)")


def test_csv_has_plain_numbers(out: Path) -> None:
    with open(out / "compare.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 6
    ours = table[1]
    assert (ours["setting"], ours["method"], ours["seeds"], ours["lr"]) == ("alpha 0.1", "FedLabel", "3", "0.1")
    assert float(ours["accuracy_last_mean"]) == pytest.approx(0.6)
    assert float(ours["accuracy_last_sd"]) == pytest.approx(0.1)
    assert (ours["rounds_to_0.6_mean"], ours["rounds_to_0.6_count"]) == ("4.0", "2")
    assert (ours["pseudo_accuracy_mean"], ours["against"]) == ("", "labelled only")
    assert float(ours["p_holm"]) == float(ours["p"]) == pytest.approx(0.2048, abs=1e-4)
    assert ours["published"] == "46.05 ± 1.09"
    with open(out / "compare_runs.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 16
    assert [(row["seed"], row["accuracy_last"], row["rounds_to_0.6"]) for row in table[2:5]] == [
        ("0", "0.5", ""),
        ("1", "0.6", "4.0"),
        ("2", "0.7", "4.0"),
    ]
    assert table[0]["path"].endswith("lr0.1-seed0")


class Links(HTMLParser):
    """Collects what a page would load or link to, and its texts."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_report_needs_nothing_but_itself(out: Path) -> None:
    page = (out / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert links.tags.count("img") == 2
    assert all(address.startswith(("data:", "#")) for address in links.addresses), links.addresses
    assert not re.search(r"@import|url\(|<script[^>]", page)
    assert "Content-Security-Policy\" content=\"default-src 'none'" in page
    assert "b" not in links.tags, "a row's name is text, not markup"
    assert {"fully <b>labelled</b>", "45.0 ± 7.5", "4 (2/3)", "46.05 ± 1.09", "alpha 1 | mild"} <= set(links.texts)
    assert any("lies at the edge" in text for text in links.texts)
    assert 'name="viewport"' in page
    assert "@media print" in page
    best = re.findall(r'class="best">([^<]*)<', page)
    assert best == ["45.0 ± 7.5", "48.7 ± 5.3"]  # never the upper bound's 67.5; of 0.6 and 0.7 alone 0.4875


def test_the_same_runs_give_the_same_files(out: Path, tmp_path: Path) -> None:
    assert call(out, "--out", tmp_path / "again").exit_code == 0
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_run_folders_go_to_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One section: it is called as the folder; a single seed has no spread and no test."""
    make_run(tmp_path / "mine" / "a")
    make_run(tmp_path / "mine" / "b", "method.name=supervised", accuracy=[0.25])
    monkeypatch.chdir(tmp_path)
    result = call("mine", "--target", "0.3")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "comparison").iterdir()} >= FILES
    text = (tmp_path / "comparison" / "compare.md").read_text()
    assert "## mine\n" in text
    assert "| fedlabel | 1 | 0.1 | 50.0 | **50.0** | 50.0 | +25.0 (supervised) | – |" in text
    assert "| supervised | – | – | 1.0 | 12 | 1 |" in text


def test_sections_whose_names_look_alike_keep_their_files(tmp_path: Path) -> None:
    for number, alpha in enumerate(("0.5", "0.50001")):
        make_run(tmp_path / "runs" / str(number), f"data.root=/{alpha}", f"partition.dirichlet_alpha={alpha}")
    comparison = read_comparison([tmp_path / "runs"], ["data.root", "partition.dirichlet_alpha"])
    first, second = comparison.sections.values()
    comparison.sections.clear()
    comparison.sections.update({"a b": first, "A-b": second})
    write_comparison(comparison, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.svg")} == {"curves-a-b.svg", "curves-a-b-2.svg"}
    (tmp_path / "out" / "mine.svg").touch()
    del comparison.sections["A-b"]
    write_comparison(comparison, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.svg")} == {"curves-a-b.svg", "mine.svg"}


def test_baseline_must_exist(out: Path, tmp_path: Path) -> None:
    result = call(out, "--baseline", "labeled only", "--out", tmp_path / "x")
    assert result.exit_code == 2
    assert "`--baseline` (=labeled only) must be one of the rows" in result.stderr
    assert "Did you mean labelled only?" in result.stderr
    assert not (tmp_path / "x").exists()
    assert call(out, "--baseline", "fully <b>labelled</b>", "--out", tmp_path / "x").exit_code == 0
    assert "-22.5 (fully" in (tmp_path / "x" / "compare.md").read_text()


def test_all_pairs_may_be_tested(out: Path, tmp_path: Path) -> None:
    """Of two rows that are tested there is one pair, which needs no table of its own."""
    result = call(out, "--all-pairs", "--out", tmp_path / "x")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "x" / "compare.md").read_text()
    assert "40.0 ± 0.0 | -11.2 (FedLabel) | 0.205 |" in text
    assert "Difference: to the best of the other rows, in accuracy" in text
    assert "corrected by Holm's procedure for all pairs of rows" in text
    assert "### All pairs" not in text
    assert "no row trains on the labels alone" not in result.output
    both = call(out, "--all-pairs", "--baseline", "FedLabel", "--out", tmp_path / "y")
    assert both.exit_code == 2
    assert "`--baseline` (=FedLabel) has no meaning with --all-pairs: give one of them." in both.stderr
    assert not (tmp_path / "y").exists()


def test_without_a_row_of_labels_alone_all_pairs_are_tested(tmp_path: Path) -> None:
    """Three rows of two seeds: .5 and .6, .4 and .4, .3 and .2; a - b is .1 and .2, t = 3, p = .205, times 3."""
    for name, scores in {"fedlabel": (0.5, 0.6), "fixmatch": (0.4, 0.4), "uda": (0.3, 0.2)}.items():
        for seed, score in enumerate(scores):
            make_run(tmp_path / "mine" / f"{name}{seed}", f"method.name={name}", f"seed={seed}", accuracy=[score])
    result = call(tmp_path / "mine", "--out", tmp_path / "x")
    assert result.exit_code == 0, result.output
    warning = "warning: all: no row trains on the labels alone (method supervised), so all pairs of rows are tested."
    assert warning in result.output
    text = (tmp_path / "x" / "compare.md").read_text()
    lines = text[text.index("### All pairs") :].splitlines()
    assert lines[2:7] == [
        "| method | fedlabel | fixmatch | uda |",
        "| --- | ---: | ---: | ---: |",
        "| fedlabel | – | +15.0 (0.614) | +30.0 (0.614) |",
        "| fixmatch | -15.0 (0.614) | – | +15.0 (0.614) |",
        "| uda | -30.0 (0.614) | -15.0 (0.614) | – |",
    ]
    assert "**warning:** all: no row trains on the labels alone" in text
    named = call(tmp_path / "mine", "--out", tmp_path / "x", "--baseline", "uda")
    assert "no row trains" not in named.output
    text = (tmp_path / "x" / "compare.md").read_text()
    assert (
        "Difference: to the baseline uda (named with --baseline: p holds only if that was done without a look" in text
    )
    assert "| fixmatch | 2 | 0.1 | 40.0 ± 0.0 | 40.0 ± 0.0 | 40.0 ± 0.0 | +15.0 (uda) | 0.410 |" in text


def test_the_sweeps_file_names_the_baseline(tmp_path: Path) -> None:
    out = make_sweep(tmp_path / "sweep")
    content = json.loads((out / "sweep.json").read_text())
    content["sweep"]["compare"] = {"baseline": "FedLabel"}
    (out / "sweep.json").write_text(json.dumps(content))
    assert call(out).exit_code == 0
    text = (out / "compare.md").read_text()
    assert "to the baseline FedLabel (named in the sweep's file (compare.baseline))" in text
    assert "| labelled only | 2 | 0.1 | 40.0 ± 0.0 | 30.0 ± 0.0 | – | 40.0 ± 0.0 | -11.2 (FedLabel) | 0.205 |" in text
    assert call(out, "--baseline", "labelled only").exit_code == 0
    assert "to the baseline labelled only (named with --baseline" in (out / "compare.md").read_text()
    content["sweep"]["compare"] = {"all_pairs": True}
    (out / "sweep.json").write_text(json.dumps(content))
    assert call(out).exit_code == 0
    assert "Difference: to the best of the other rows" in (out / "compare.md").read_text()


def test_runs_of_an_earlier_version_are_named(tmp_path: Path) -> None:
    """Their mean was another one: one sentence, without a traceback."""
    old = make_run(tmp_path / "runs" / "old")
    make_run(tmp_path / "runs" / "new", "seed=1")
    summary = json.loads((old / "summary.json").read_text())
    summary["eval/accuracy"]["mean_last_10"] = summary["eval/accuracy"].pop("mean_last_tenth")
    (old / "summary.json").write_text(json.dumps(summary))
    result = call(tmp_path / "runs", "--out", tmp_path / "x")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert f"{old / 'summary.json'} is of an earlier version, whose mean was that of the last ten evaluations" in line
    assert f"move {old} away and run it again, or leave it out." in line
    assert not (tmp_path / "x").exists()


def test_rows_may_be_ranked_and_tested_by_another_metric(tmp_path: Path) -> None:
    """By accuracy `supervised` leads by .1, by AUC (means .5 and .7 of two rounds) the other one by .2."""
    make_run(tmp_path / "runs" / "a", "method.name=supervised", accuracy=(0.6, 0.6), auc=(0.4, 0.6))
    make_run(tmp_path / "runs" / "b", "method.name=fixmatch", accuracy=(0.5, 0.5), auc=(0.8, 0.6))
    result = call(tmp_path / "runs", "--out", tmp_path / "by", "--metric", "eval/auc")
    assert result.exit_code == 0, result.output
    assert "AUC, mean of rounds 1–2" in result.output
    text = (tmp_path / "by" / "compare.md").read_text()
    assert "| fixmatch | 1 | 0.1 | 50.0 | 50.0 | 50.0 | **70.0** | 80.0 | +20.0 (supervised) | – |" in text
    assert "in AUC, mean of last tenth, in points" in text
    comparison = read_comparison([tmp_path / "runs"], metric="eval/auc")
    axis = curves(comparison, "all").axes[0]
    assert axis.get_ylabel() == "test AUC (%)"
    assert [list(line.get_ydata()) for line in axis.lines][:2] == [[40, 60], [80, 60]]
    selected = call(tmp_path / "runs", "--out", tmp_path / "by", "--metric", "eval/auc", "--column", "selected")
    assert selected.exit_code == 0, selected.output
    text = (tmp_path / "by" / "compare.md").read_text()
    assert "| fixmatch | 1 | 0.1 | 50.0 | 50.0 | 50.0 | 70.0 | **80.0** | +40.0 (supervised) | – |" in text
    by_accuracy = call(tmp_path / "runs", "--out", tmp_path / "by")
    assert by_accuracy.exit_code == 0
    assert "| supervised | 1 | 0.1 | 60.0 | **60.0** |" in (tmp_path / "by" / "compare.md").read_text()


def test_a_metric_that_runs_lack_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a", auc=(0.5,))
    make_run(tmp_path / "runs" / "b", "seed=1")
    result = call(tmp_path / "runs", "--metric", "eval/auc")
    assert result.exit_code == 2
    assert "`--metric` (=eval/auc) with `--column` (=mean_last_tenth) is not in the summary of 1 run, e.g." in " ".join(
        result.output.split()
    )
    other = call(tmp_path / "runs", "--metric", "eval/loss")
    assert other.exit_code == 2
    assert "`--metric` (=eval/loss) must be one of eval/accuracy, eval/auc" in " ".join(other.output.split())
    column = call(tmp_path / "runs", "--column", "first")
    assert column.exit_code == 2
    assert "`--column` (=first) must be one of last, mean_last_tenth, selected" in " ".join(column.output.split())


def test_curves_and_accuracy_by_simulated_time(tmp_path: Path) -> None:
    """A slow row takes 10 s a round, a fast one 4: 16 s is all that both have. By then the slow one has its first
    evaluation (after 10 s), the fast one its fourth.
    """
    for seed in (0, 1):
        common = (f"seed={seed}", "devices.kind=preset", "devices.population=[{profile: laptop}]")
        slow = (*common, "pacing.kind=synchronous")
        fast = (*common, "pacing.kind=fedbuff")
        make_run(tmp_path / f"slow{seed}", *slow, accuracy=[0.5, 0.6, 0.7, 0.8], round_takes=10)
        make_run(tmp_path / f"fast{seed}", *fast, accuracy=[0.2, 0.3, 0.4, 0.5], round_takes=4)
    result = call(tmp_path, "--out", tmp_path / "out", "--against", "virtual_seconds")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| method | accuracy after 4 s | accuracy after 8 s | accuracy after 12 s | accuracy after 16 s |" in text
    cells = {line.split(" | ")[1] + line.split(" | ")[-1] for line in text.splitlines() if "± 0.0 |" in line}
    assert any("20.0 ± 0.0" in cell and "50.0 ± 0.0" in cell for cell in cells)
    assert "Curves are drawn over simulated seconds" in text
    assert "simulated s" in text
    (axis,) = curves(read_comparison([tmp_path], against="virtual_seconds"), "all").axes
    assert axis.get_xlabel() == "simulated seconds"
    assert max(line.get_xdata().max() for line in axis.lines) == 40


def test_simulated_time_needs_a_clock(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    result = call(tmp_path, "--out", tmp_path / "out", "--against", "virtual_seconds")
    assert result.exit_code != 0
    assert "needs runs with a simulated clock" in " ".join(result.output.split())
    assert "must be one of round, virtual_seconds, bytes_up" in " ".join(
        call(tmp_path, "--against", "x").output.split()
    )


def test_value_of_a_curve_is_that_of_the_last_evaluation() -> None:
    curve = ([2.0, 5.0], [0.1, 0.2])
    assert [value_at(curve, place) for place in (2, 4.9, 5, 9)] == [0.1, 0.1, 0.2, 0.2]
    assert math.isnan(value_at(curve, 1.9))
    both = on_one_axis([curve, ([3.0, 7.0], [0.5, 0.6])])
    assert both[0][0] == both[1][0]
    assert (both[0][0][0], both[0][0][-1]) == (3.0, 5.0)
    assert (both[0][1][0], both[0][1][-1], both[1][1][-1]) == (0.1, 0.2, 0.5)
