"""The page of `fedlabel report`: one or more runs side by side, as one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlabel.errors import make_folder
from fedlabel.metric_tags import CLIENTS, LEARNING, PAGES, PSEUDO_LABELS
from fedlabel.names import counted
from fedlabel.record.files import write_atomic
from fedlabel.study.page import asset, render
from fedlabel.study.report import POINTS, read_report

MAX_RUNS = 8
"""Side by side; each has a colour of its own."""
MAX_BYTES = 5_000_000
"""Of a page. Charts and their library take up to 2 MB of it."""
PICTURE_BYTES = 2_100_000
"""Of all pictures of a page; as text they take a third more."""
INTRODUCTIONS: Mapping[str, str] = {
    "Learning": "How well the common model does on the evaluation split, and what the clients' training loss says.",
    "Pseudo-labels": "Coverage: the share of the unlabelled samples drawn that is used. Right: compared with hidden "
    "labels, which only a simulation has.",
    "Clients": "Each client's accuracy is that of the common model on its share of the evaluation split.",
    "Supervision": "What the method makes of imprecise, noisy and grouped labels.",
    "System": "Where the time goes. Seconds are of the clock on the wall.",
    "Communication": "Encoded messages of all clients of a round.",
}
"""Page -> how to read it."""


def write_report(paths: Sequence[Path], out: Path) -> None:
    """Writes the report of some runs into one file, atomically.

    Args:
        paths: their folders.
        out: the file; its folder is made if needed.

    Raises:
        ValueError: there are too many runs, one is given twice, or a folder holds none or a damaged one.
    """
    if len(paths) > MAX_RUNS:
        raise ValueError(
            f"{counted(len(paths), 'run')} are too many: a report shows up to {MAX_RUNS} side by side; "
            "`fedlabel compare` makes tables of more."
        )
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ValueError("A run is given twice: name each once.")
    points, picture_bytes = min(POINTS, 1200 // len(paths)), PICTURE_BYTES // len(paths)
    text = report_html([read_report(path, points, picture_bytes) for path in paths])
    make_folder(out.parent)
    write_atomic(out, text)


def report_html(runs: Sequence[Mapping[str, Any]]) -> str:
    """Returns the page.

    Args:
        runs: as `read_report` returns them, at least one.
    """
    names = [run["name"] for run in runs]
    if len(set(names)) < len(names):
        names = [f"{place}: {name}" for place, name in enumerate(names, start=1)]
    sections = [_section(page, runs, names) for page in PAGES]
    holdings = [partition_chart(run["partition"], run["client_labels"]) if run["partition"] else None for run in runs]
    plots = [
        *(chart for chart in holdings if chart is not None),
        *(chart for section in sections for chart in section["charts"]),
        *(chart for section in sections for of_run in section["runs"] for chart in of_run["charts"]),
    ]
    for number, chart in enumerate(plots):
        chart["id"] = f"chart-{number}"
    return render(
        "run.html.jinja",
        runs=runs,
        names=names,
        holdings=holdings,
        sections=[section for section in sections if _has_any(section)],
        cost_rows=list(dict.fromkeys(label for run in runs for label, _ in run["costs"])),
        data={"runs": names, "charts": plots, "stages": runs[0]["stages"]},
        library=asset("vendor/echarts.common.min.js"),
        script=asset("report.js"),
    )


def _has_any(section: Mapping[str, Any]) -> bool:
    of_runs = any(of_run["charts"] or of_run["pictures"] for of_run in section["runs"])
    return bool(section["charts"] or section["zeros"] or of_runs)


def _section(page: str, runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Returns a page's charts of curves, which the runs share, the titles of those that are 0 in all rounds of all
    runs, and what each run has of its own.
    """
    titles = dict.fromkeys(chart["title"] for run in runs for chart in run["charts"].get(page, ()))
    charts, zeros = [], []
    for title in titles:
        of_runs = [
            (place, chart)
            for place, run in enumerate(runs)
            for chart in run["charts"].get(page, ())
            if chart["title"] == title
        ]
        if all(chart["zero"] for _, chart in of_runs):
            zeros.append(title)
        else:
            charts.append(curve_chart(title, of_runs, names))
    return {
        "name": page,
        "introduction": INTRODUCTIONS[page],
        "charts": charts,
        "zeros": zeros,
        "runs": [{"charts": own_charts(page, run), "pictures": run["pictures"].get(page, [])} for run in runs],
    }


def curve_chart(title: str, of_runs: Sequence[tuple[int, Mapping[str, Any]]], names: Sequence[str]) -> dict[str, Any]:
    """Returns a chart of curves over rounds.

    Args:
        title: over it.
        of_runs: place of a run, and its chart in `read_report`.
        names: of all runs.
    """
    several = len(names) > 1
    unit = of_runs[0][1]["unit"]
    series = [
        {
            "name": f"{names[place]}: {curve['name']}" if several else curve["name"],
            "run": place,
            "curve": number,
            "edge": chart["band"] and number > 0,
            "points": curve["points"],
        }
        for place, chart in of_runs
        for number, curve in enumerate(chart["curves"])
    ]
    last = "; ".join(f"{each['name']} {each['points'][-1][1]:g}" for each in series[:6] if each["points"])
    label = f"{title}{f' in {unit}' if unit else ''}, over rounds. Last: {last}"
    return {"kind": "curves", "title": title, "unit": unit, "series": series, "label": label, "height": 230}


def own_charts(page: str, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the charts of a page that each run has for itself."""
    classes, clients = run["classes"], run["clients"]
    if page == LEARNING and classes and "accuracy" in classes:
        return [class_chart(classes)]
    if page == PSEUDO_LABELS and classes and "coverage_local" in classes:
        return [expert_chart(classes)]
    if page == CLIENTS and clients:
        return [client_chart(clients, run["client_labels"])]
    return []


def class_chart(classes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns bars of the accuracy of each class."""
    values = [None if value is None else 100 * value for value in classes["accuracy"]]
    known = [(value, name) for value, name in zip(values, classes["names"], strict=True) if value is not None]
    worst = f" Lowest: {min(known)[1]}, {min(known)[0]:.1f} %." if known else ""
    return {
        "kind": "bars",
        "title": "Accuracy by class",
        "unit": "%",
        "label": f"Accuracy by class in %.{worst}",
        "names": classes["names"],
        "stacked": False,
        "series": [{"name": "accuracy", "color": "local", "values": values}],
        "height": _bars_height(len(values)),
    }


def expert_chart(classes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns stacked bars, of 100 % each: who labels the samples of each true class, and whether that is right."""
    number = len(classes["names"])
    series: list[dict[str, Any]] = []
    used = [0.0] * number
    for expert in ("local", "global"):
        coverage = [value or 0.0 for value in classes[f"coverage_{expert}"]]
        accuracy = [value or 0.0 for value in classes.get(f"accuracy_{expert}") or [0.0] * number]
        right = [100 * c * a for c, a in zip(coverage, accuracy, strict=True)]
        wrong = [100 * c * (1 - a) for c, a in zip(coverage, accuracy, strict=True)]
        used = [sum(each) for each in zip(used, right, wrong, strict=True)]
        series += [
            {"name": f"{expert} model, right", "color": expert, "values": right},
            {"name": f"{expert} model, wrong", "color": f"{expert}-wrong", "values": wrong},
        ]
    drawn = [value is not None for value in classes["coverage_local"]]
    dropped = [100 - share if was else 0.0 for share, was in zip(used, drawn, strict=True)]
    series = [each for each in series if any(each["values"])]
    series.append({"name": "not used", "color": "none", "values": dropped})
    means = "; ".join(f"{each['name']} {sum(each['values']) / max(1, sum(drawn)):.1f} %" for each in series)
    return {
        "kind": "bars",
        "title": "Pseudo-labels by true class: which model gives them, and are they right",
        "unit": "%",
        "label": f"Pseudo-labels by true class, in % of the unlabelled samples drawn. Mean over classes: {means}.",
        "names": classes["names"],
        "stacked": True,
        "series": series,
        "height": _bars_height(number),
    }


def client_chart(clients: Mapping[str, Any], labels: Mapping[int, str]) -> dict[str, Any]:
    """Returns bars of the accuracy of each client, the worst first; labels: of clients with a name."""
    names = _labelled(clients["clients"], labels)
    of, shown = clients["of"], len(clients["clients"])
    note = f" ({shown} of {of:,}, at evenly spaced ranks)" if shown < of else ""
    scales = [1 if column == "training loss" else 100 for column in clients["columns"]]
    percent = [
        [None if value is None else scale * value for scale, value in zip(scales, row, strict=True)]
        for row in clients["values"]
    ]
    worst, best = percent[0][0], percent[-1][0]
    return {
        "kind": "clients",
        "title": f"Clients by accuracy, the worst first{note}",
        "unit": "%",
        "label": f"Accuracy of clients in %, the worst first. Worst: client {names[0]}, {worst:.1f}; "
        f"best: client {names[-1]}, {best:.1f}; mean of all {100 * clients['mean']:.1f}.",
        "columns": clients["columns"],
        "names": names,
        "values": percent,
        "mean": 100 * clients["mean"],
        "height": 280,
    }


def partition_chart(partition: Mapping[str, Any], labels: Mapping[int, str]) -> dict[str, Any]:
    """Returns a bubble for each client and class: its area is the number of samples, the filled part has labels.

    Args:
        partition: see `holdings.partition`.
        labels: of clients with a name.
    """
    shown, of = len(partition["clients"]), partition["of"]
    note = f" ({shown} of {of:,} clients, evenly spaced)" if shown < of else ""
    held = sum(map(sum, partition["with_supervision"]))
    whole = held + sum(map(sum, partition["without"]))
    return {
        "kind": "bubbles",
        "title": f"Who holds what{note}",
        "unit": "",
        "label": f"Samples by client and true class{note}: {whole:,} samples, {held:,} with supervision.",
        **partition,
        "clients": _labelled(partition["clients"], labels),
        "series": [{"name": "all samples"}, {"name": "with supervision"}],
        "height": 60 + 22 * shown,
    }


def _labelled(clients: Sequence[int], labels: Mapping[int, str]) -> list[str]:
    return [labels.get(client, str(client)) for client in clients]


def _bars_height(number: int) -> int:
    return 40 + 22 * number
