"""The files of a comparison: compare.md, compare.csv, compare_runs.csv, curves (PNG, SVG) and report.html, one file."""

from __future__ import annotations

import base64
import bisect
import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedlabel.config import flatten, load_config
from fedlabel.errors import make_folder
from fedlabel.record.figures import curves_figure, save_png, svg_bytes
from fedlabel.record.files import write_atomic
from fedlabel.study.page import render
from fedlabel.study.provenance import command_text, machine_text, versions_text
from fedlabel.study.runs import ACCURACY, AXES, COLUMN, METRICS, VIRTUAL, Comparison, Run, differing_keys, plain
from fedlabel.study.statistics import (
    NOT_TESTED,
    Column,
    PairedTest,
    SectionTests,
    Stat,
    columns,
    compare_rows,
    over_seeds,
    show,
)
from fedlabel.study.sweep import slug

MEAN = "mean of last tenth"
"""Title of the column beside which the published numbers stand."""
PAIRS = "All pairs"
"""Title of the table of every row against every other one."""
RANKED_BY = {
    (ACCURACY, "last"): "accuracy_last",
    (ACCURACY, COLUMN): "accuracy_mean_last_tenth",
    (ACCURACY, "selected"): "accuracy_selected",
    ("eval/auc", COLUMN): "auc",
    ("eval/auc", "selected"): "auc_selected",
    ("eval/balanced_accuracy", COLUMN): "balanced_accuracy",
}
"""What rows are ranked by -> the table's column that holds it, where one does."""
TABLES = {
    "accuracy": (
        "Accuracy",
        "in %; selected: at the round that evaluation.select chose; AUC: area under the ROC curve (two classes); bag "
        "error: mean absolute error of the predicted share of a class in bags of the split; ECE: expected calibration "
        "error of the global model.",
    ),
    "pseudo": (
        "Pseudo-labels",
        "in %; coverage: share of the unlabelled draws that were kept; right: share of these; right / wrong: its "
        "ratio to the rest; right of all: share of the samples without a label, kept or not, whose likeliest class by "
        "their posterior is right; ECE: expected calibration error of the confidence.",
    ),
    "beliefs": (
        "Beliefs",
        "converged: % of the inferences that did within method.max_iterations; missed: how far the sum of a bag's "
        "beliefs is from its count, in samples, mean over bags; homophily: % of the graph's edges whose ends are of "
        "one class.",
    ),
    "functions": (
        "Labelling functions",
        "in %; classes: how many a function voted for (its polarity), a number; coverage, overlap, conflict: share of "
        "the samples that a function votes on, with another one, and against another one; right: of its votes; "
        "estimate: what the label model takes for it; its error: mean distance of the two; all are means over the "
        "functions, of the votes of all clients that took part until then. Right by "
        "majority, and by votes per class divided by the number of functions that may vote for it: of all samples; "
        "what the label model gets right is under Pseudo-labels.",
    ),
    "clients": ("Clients", "the global model on each client's share of the split, in %; Jain index: 1 = all equal."),
    "cost": (
        "Cost",
        "MB: 10⁶ bytes over all clients; up to an accuracy: until the first evaluated round that reaches it, mean over "
        "the seeds that do (how many); slow half: % of the replies that count which the slower half of the clients "
        "gave; simulated s: on the clock of their devices; forward, backward: thousand "
        "samples through the networks; failed: clients, summed over seeds.",
    ),
}
"""Kind -> title and how to read it."""


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the rows."""

    title: str
    header: list[str]
    rows: list[list[str]]
    best: tuple[int, int] | None = None
    """Row and column of the cell in bold."""


@dataclass(frozen=True, eq=False)
class Part:
    """The tables and curves of a section."""

    name: str
    tables: list[Table]
    curves: Figure
    file: str
    """Name of the curves' files, without ending."""


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Writes all files into `out`, each atomically, in place of an earlier comparison, and returns their paths.

    Args:
        comparison: what is compared.
        out: folder, made if needed.
    """
    tests = {
        name: compare_rows(section, comparison.baseline(name), comparison.metric, comparison.column)
        for name, section in comparison.sections.items()
    }
    shown = columns(comparison.targets)
    names = _file_names(list(comparison.sections))
    parts = [
        Part(name, tables(comparison, name, tests[name], shown), curves(comparison, name), names[name])
        for name in comparison.sections
    ]
    make_folder(out)
    written = []
    for part in parts:
        save_png(part.curves, out / f"{part.file}.png")
        write_atomic(out / f"{part.file}.svg", svg_bytes(part.curves))
        written += [out / f"{part.file}.png", out / f"{part.file}.svg"]
    texts = {
        "compare.csv": to_csv(row_table(comparison, tests, shown)),
        "compare_runs.csv": to_csv(run_table(comparison, shown)),
        "compare.md": markdown(comparison, parts),
        "report.html": html(comparison, parts),
    }
    for name, text in texts.items():
        write_atomic(out / name, text)
    for old in {*out.glob("curves-*.png"), *out.glob("curves-*.svg")} - {*written}:  # of sections that are no more
        old.unlink()
    return [out / "report.html", out / "compare.md", out / "compare.csv", out / "compare_runs.csv", *written]


def overview(comparison: Comparison, name: str) -> tuple[list[str], list[list[str]]]:
    """Returns heads and rows of the table of a section that fits a terminal: score, worst client, and the paired test
    against the section's baseline, or, where there is none, the best other row.
    """
    section, baseline = comparison.sections[name], comparison.baseline(name)
    tests = compare_rows(section, baseline, comparison.metric, comparison.column)
    against = f"difference to {baseline}" if baseline else "difference to the best other"
    rows = []
    for row, runs in section.items():
        scores = over_seeds([comparison.score(run) for run in runs])
        worst = over_seeds([run.value("eval/worst_client_accuracy") for run in runs])
        test = tests.rows[row]
        difference = "–" if math.isnan(test.difference) else f"{100 * test.difference:+.1f}"
        rows.append([row, str(len(runs)), _percent(scores), _percent(worst), difference, _p(test.p_holm)])
    return ["method", "seeds", comparison.ranked_in(name), "worst client", against, "p"], rows


def _percent(stat: Stat) -> str:
    if math.isnan(stat.mean):
        return "–"
    return f"{100 * stat.mean:.1f}" + (f" ± {100 * stat.sd:.1f}" if stat.count > 1 else "")


def tables(comparison: Comparison, name: str, tests: SectionTests, shown: Sequence[Column]) -> list[Table]:
    """Returns the tables of a section; columns and tables without any value are omitted."""
    section, published = comparison.sections[name], comparison.published.get(name, {})
    found = []
    for kind, (title, _) in TABLES.items():
        used = [
            c for c in shown if c.table == kind and any(math.isfinite(c.read(r)) for rs in section.values() for r in rs)
        ]
        if not used:
            continue
        header = ["method", *(["seeds", "lr"] if kind == "accuracy" else []), *(column.title for column in used)]
        rows = []
        for row, runs in section.items():
            rates = ", ".join(dict.fromkeys(plain(run.config.training.lr) for run in runs))
            lead = [str(len(runs)), rates] if kind == "accuracy" else []
            rows.append([row, *lead, *(show(column, [column.read(run) for run in runs]) for column in used)])
        best = None
        if kind == "accuracy":
            header += ["difference", "p"]
            for cells, test in zip(rows, tests.rows.values(), strict=True):
                cells += [_difference(test), _p(test.p_holm)]
            if published:
                place = header.index(MEAN) + 1
                for cells in [header, *rows]:
                    cells.insert(place, "published" if cells is header else published.get(cells[0], "–"))
            ranked = [place for place, runs in enumerate(section.values()) if not _is_bound(runs)]
            scores = [over_seeds([comparison.score(run) for run in runs]).mean for runs in section.values()]
            key = RANKED_BY.get((comparison.metric, comparison.column))
            places = [header.index(column.title) for column in used if column.key == key]
            best = (max(ranked, key=scores.__getitem__), places[0]) if ranked and places else None
        found.append(Table(title, header, rows, best))
        if kind == "accuracy" and comparison.against == VIRTUAL:
            found.append(time_table(comparison, name))
        if kind == "accuracy" and not tests.baseline and len(tests.pairs) > 2:
            found.append(_pairs_table(tests))
    return found


def _pairs_table(tests: SectionTests) -> Table:
    names = _distinct(row for row, _ in tests.pairs)
    rows = []
    for name in names:
        cells = [tests.pairs.get((name, other), NOT_TESTED) for other in names]
        rows.append([name, *("–" if not t.against else f"{100 * t.difference:+.1f} ({_p(t.p_holm)})" for t in cells)])
    return Table(PAIRS, ["method", *names], rows)


def curves(comparison: Comparison, name: str) -> Figure:
    """Returns the ranking metric over rounds, by default accuracy, mean and standard deviation over the seeds."""
    against = comparison.against
    runs = {
        row: [run.curve(comparison.metric, against) for run in members]
        for row, members in comparison.sections[name].items()
    }
    if against != "round":
        runs = {row: on_one_axis(seeds) for row, seeds in runs.items()}
    unit = 1e-6 if against == "bytes_up" else 1
    percent = {
        row: [([unit * place for place in places], [100 * a for a in values]) for places, values in seeds]
        for row, seeds in runs.items()
    }
    split = _distinct(run.config.evaluation.split for run in comparison.runs)
    return curves_figure(
        percent,
        title=_heading(comparison, name),
        y_label=f"{split[0]} {METRICS[comparison.metric]} (%)",
        x_label=AXES[against],
        band="sd",
    )


Curve = tuple[list[float], list[float]]
POINTS = 100
"""Of a curve over an axis on which the seeds' evaluations do not lie at the same places."""


def on_one_axis(seeds: Sequence[Curve]) -> list[Curve]:
    """Returns the curves of some seeds at common places: at each the value of the last evaluation until there.

    They begin where the last seed has its first evaluation, and end where the first one has its last.
    """
    first, last = max(places[0] for places, _ in seeds), min(places[-1] for places, _ in seeds)
    common = np.linspace(first, max(first, last), POINTS).tolist() if last > first else [first]
    return [(common, [value_at(curve, place) for place in common]) for curve in seeds]


def value_at(curve: Curve, place: float) -> float:
    """Returns the last value of a curve until a place on its axis; NaN before the first."""
    places, values = curve
    found = bisect.bisect_right(places, place)
    return values[found - 1] if found else math.nan


def time_table(comparison: Comparison, name: str) -> Table:
    """Returns the ranking metric of a section's rows at quarters of the simulated time that all its runs have."""
    section = comparison.sections[name]
    end = min(run.simulated_seconds for runs in section.values() for run in runs)
    times = [end * quarter / 4 for quarter in range(1, 5)]
    rows = []
    for row, runs in section.items():
        curves = [run.curve(comparison.metric, VIRTUAL) for run in runs]
        stats = [over_seeds([100 * value_at(curve, time) for curve in curves]) for time in times]
        rows.append(
            [row, *(f"{stat.mean:.1f} ± {stat.sd:.1f}" if stat.count > 1 else f"{stat.mean:.1f}" for stat in stats)]
        )
    metric = METRICS[comparison.metric]
    return Table("By simulated time", ["method", *(f"{metric} after {time:,.0f} s" for time in times)], rows)


def row_table(
    comparison: Comparison, tests: Mapping[str, SectionTests], shown: Sequence[Column]
) -> list[dict[str, Any]]:
    """Returns compare.csv: a row per section and method; accuracies are shares of 1, traffic is in bytes."""
    found = []
    for name, section in comparison.sections.items():
        for row, runs in section.items():
            cells: dict[str, Any] = {"setting": name, "method": row, "seeds": len(runs)}
            cells["lr"] = " ".join(dict.fromkeys(plain(run.config.training.lr) for run in runs))
            for column in shown:
                stat = over_seeds([column.read(run) for run in runs])
                cells |= {f"{column.key}_mean": stat.mean, f"{column.key}_sd": stat.sd}
                cells |= {f"{column.key}_count": stat.count} if column.key.startswith("rounds_to_") else {}
            test = tests[name].rows[row]
            cells |= {"against": test.against, "difference": test.difference, "p": test.p, "p_holm": test.p_holm}
            cells["published"] = comparison.published.get(name, {}).get(row, "")
            found.append(cells)
    return found


def run_table(comparison: Comparison, shown: Sequence[Column]) -> list[dict[str, Any]]:
    """Returns compare_runs.csv: a row per run."""
    return [
        {
            "setting": name,
            "method": row,
            "seed": run.config.seed,
            "lr": run.config.training.lr,
            **{column.key: column.read(run) for column in shown},
            "commit": run.summary.get("commit", "unknown"),
            "path": run.path,
        }
        for name, section in comparison.sections.items()
        for row, runs in section.items()
        for run in runs
    ]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows of equal keys as CSV; NaN is empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()})
    return buffer.getvalue()


def facts(comparison: Comparison) -> dict[str, list[str]]:
    """Returns the provenance of the results: hardware, versions, commits, seeds, commands, common keys."""
    runs = comparison.runs
    defaults = flatten(load_config())
    changed = [f"{k}={plain(v)}" for k, v in common_keys(comparison).items() if k != "seed" and defaults.get(k) != v]
    rows = [runs for section in comparison.sections.values() for runs in section.values()]
    commands = _distinct(command_text(run.summary.get("command", [])) for run in runs)
    found = {
        "hardware": _distinct(machine_text(run.summary.get("hardware", {})) for run in runs),
        "versions": _distinct(versions_text(run.summary.get("versions", {})) for run in runs),
        "commit": _distinct(str(run.summary.get("commit", "unknown")) for run in runs),
        "seeds": _distinct(", ".join(str(run.config.seed) for run in members) for members in rows),
        "means": _distinct(run.averaged for run in runs),
        "evaluated on": _distinct(f"the {run.config.evaluation.split} split of {run.config.data.name}" for run in runs),
        "commands": commands[:10] + [f"and {len(commands) - 10} more"] * (len(commands) > 10),
        "common to all": [" ".join(changed) or "the defaults"],
    }
    return found | ({"protocol": [comparison.protocol]} if comparison.protocol else {})


def common_keys(comparison: Comparison) -> dict[str, str | int | float | bool]:
    """Returns the configuration keys that all runs have, with the same value."""
    runs = comparison.runs
    differing = set(differing_keys(runs))
    return {key: value for key, value in runs[0].flat.items() if key not in differing}


def remarks(comparison: Comparison, parts: Sequence[Part]) -> list[str]:
    """Returns notes on reading the tables that are present."""
    there = {table.title for part in parts for table in part.tables}
    bounds = _distinct(row for section in comparison.sections.values() for row, rs in section.items() if _is_bound(rs))
    texts = [
        "Mean ± sample standard deviation over seeds. Of each run the mean over the last tenth of the rounds (at least "
        "5), where not said otherwise.",
        *_about_tests(comparison),
        *(f"{title}: {note}" for title, note in TABLES.values() if title in there),
    ]
    if comparison.against != "round":
        texts.append(
            f"Curves are drawn over {AXES[comparison.against]}: at each place the last evaluation until there, of each "
            "seed; they end where the first seed does."
        )
    if bounds:
        texts.append(f"Upper bounds, which see every label and are neither ranked nor tested: {', '.join(bounds)}.")
    if comparison.published:
        texts.append(
            f"Published: the paper's numbers. What differs from its setting: {comparison.deviations or 'not said'}"
        )
    return texts


def _about_tests(comparison: Comparison) -> list[str]:
    """Returns the baseline of the tests, who chose it, and the correction of p."""
    baselines = {name: comparison.baseline(name) for name in comparison.sections}
    named = _distinct(filter(None, baselines.values()))
    of = f"in {comparison.ranked_by}, in points, over common seeds"
    test = "paired two-sided t test of it; – with fewer than two seeds or without a variance"
    texts = []
    if named:
        chosen = {
            "": "the first row that trains on the labels alone, as no other was asked for",
            "--baseline": "named with --baseline: p holds only if that was done without a look at these results",
        }.get(comparison.asked_by, f"named in the sweep's file ({comparison.asked_by})")
        texts.append(
            f"Difference: to the baseline {' or '.join(named)} ({chosen}), {of}. p: {test}. It is corrected by Holm's "
            "procedure for the number of rows that are tested against the baseline in the section."
        )
    if not all(baselines.values()):
        where = "; ".join(name for name, row in baselines.items() if not row)
        texts.append(
            f"{f'Without a baseline ({where}), difference' if named else 'Difference'}: to the best of the other rows, "
            f"{of}. p: {test}. It is corrected by Holm's procedure for all pairs of rows of the section, so that the "
            f"best may be looked for afterwards. {PAIRS}: the row's difference to the column, and p, likewise."
        )
    return texts


def markdown(comparison: Comparison, parts: Sequence[Part]) -> str:
    """Returns compare.md."""
    lines = [f"# {_escape(comparison.title)}", ""]
    for label, values in facts(comparison).items():
        code = label in ("commands", "common to all", "commit")
        lines.append(f"- {label}: " + "; ".join(f"`{value}`" if code else _escape(value) for value in values))
    lines += [f"- **warning:** {_escape(warning)}" for warning in comparison.warnings]
    lines += ["", *(f"{_escape(remark)}\n" for remark in remarks(comparison, parts))]
    over = "rounds" if comparison.against == "round" else AXES[comparison.against]
    for part in parts:
        lines += [
            f"## {_escape(_heading(comparison, part.name))}",
            "",
            f"![{METRICS[comparison.metric]} over {over}]({part.file}.png)",
            "",
        ]
        for table in part.tables:
            lines += [f"### {table.title}", "", *_markdown_table(table), ""]
    if comparison.rows:
        lines += ["## Rows", "", *(f"- {_escape(row)}: `{text}`" for row, text in comparison.rows.items()), ""]
    common = [f"{key}={plain(value)}" for key, value in common_keys(comparison).items()]
    lines += ["## Configuration common to all runs", "", "```", *common, "```", ""]
    return "\n".join(lines)


def _markdown_table(table: Table) -> list[str]:
    rows = [[_escape(cell) for cell in row] for row in table.rows]
    if table.best is not None:
        row, column = table.best
        rows[row][column] = f"**{rows[row][column]}**"
    dashes = ["---", *["---:"] * (len(table.header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in [table.header, dashes, *rows]]


def html(comparison: Comparison, parts: Sequence[Part]) -> str:
    """Returns report.html: one self-contained file, which loads nothing from elsewhere."""
    pictures = {part.name: base64.b64encode(svg_bytes(part.curves)).decode() for part in parts}
    headings = {part.name: _heading(comparison, part.name) for part in parts}
    common = [f"{key}={plain(value)}" for key, value in common_keys(comparison).items()]
    return render(
        "comparison.html.jinja",
        comparison=comparison,
        parts=parts,
        headings=headings,
        pictures=pictures,
        facts=facts(comparison),
        remarks=remarks(comparison, parts),
        common="\n".join(common),
    )


def _heading(comparison: Comparison, name: str) -> str:
    return comparison.title if name == "all" and len(comparison.sections) == 1 else name


def _file_names(sections: Sequence[str]) -> dict[str, str]:
    """Returns section -> unique name for its files."""
    names: dict[str, str] = {}
    for number, name in enumerate(sections, start=1):
        text = f"curves-{slug(name)}"
        names[name] = f"{text}-{number}" if text in names.values() else text
    return names


def _difference(test: PairedTest) -> str:
    if math.isnan(test.difference):
        return "–"
    return f"{100 * test.difference:+.1f} ({test.against})"


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"


def _is_bound(runs: Sequence[Run]) -> bool:
    return bool(runs[0].config.method.oracle_labels)


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _escape(text: str) -> str:
    """Escapes Markdown's special characters in a name."""
    for sign in "\\|*_`<":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")
