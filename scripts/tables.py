"""Regenerates the tables of docs/results.md: `python scripts/tables.py NAME [--root DATA] [--workers 2]`.

For each method: one learning-rate search on the validation split (every method the same grid, seed 100), then the
chosen rate on the test split with seeds 0, 1, 2. A run that is done is not repeated; one that was interrupted goes on.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

SEARCH_SEED = 100
SEEDS = (0, 1, 2)

METHODS: dict[str, list[str]] = {
    "labelled only": ["method.name=supervised"],
    "labelled only, FedProx .01": ["method.name=supervised", "training.prox_mu=0.01"],
    "fully labelled": ["method.name=supervised", "method.oracle_labels=true"],
    "FedLabel": [],
    "FedLabel, only local": ["method.teacher=local"],
    "FedLabel, only global": ["method.teacher=global"],
    "FedLabel, released code": [
        "method.merge=mean",
        "method.kl_target=local",
        "method.normalization=each",
        "method.teacher_view=weak",
        "method.prox_mu=10",
        "method.confidence_threshold=0.3",
        "method.lambda_0=0.05",
        "method.unlabeled_steps=3",  # tau' = tau / 3
    ],
    "FedLabel, merge mean": ["method.merge=mean"],
    "FedLabel, beta .9": ["method.confidence_threshold=0.9"],
    "FedLabel, burn-in": [],
    "FedLabel, lambda 0": ["method.lambda_0=0"],
}

# Table -> (configuration, learning rates, burn-in rounds of the rows that have one, rows)
TABLES: dict[str, tuple[str, tuple[float, ...], int, tuple[str, ...]]] = {
    "fashion_mnist_few": ("experiment/fashion_mnist_few.yaml", (0.05, 0.15, 0.45), 5, tuple(METHODS)[:7]),
    "cifar10_few": (
        "experiment/cifar10_few.yaml",
        (0.05, 0.15),
        5,
        ("labelled only", "fully labelled", "FedLabel", "FedLabel, only global"),
    ),
    "digits_many_rounds": (
        "experiment/digits_many_rounds.yaml",
        (0.02, 0.06),
        10,
        ("labelled only", "fully labelled", "FedLabel"),
    ),
    # What decides: one change at a time, at one rate, one seed, on the validation split.
    "digits_ablations": (
        "experiment/digits_many_rounds.yaml",
        (0.06,),
        10,
        (
            "labelled only",
            "FedLabel",
            "FedLabel, only local",
            "FedLabel, only global",
            "FedLabel, merge mean",
            "FedLabel, beta .9",
            "FedLabel, burn-in",
            "FedLabel, lambda 0",
        ),
    ),
}


def run_one(job: tuple[str, list[str], Path, str]) -> None:
    """Runs one experiment in this process, or what is left of it."""
    import fedlabel

    config, overrides, out, name = job
    folder = out / name
    if (folder / "summary.json").exists():
        return
    fedlabel.run([config], overrides, name=name, out=out, resume=folder.exists())


def read(out: Path, name: str) -> dict[str, dict[str, float]]:
    return json.loads((out / name / "summary.json").read_text())


def slug(method: str, lr: float, seed: int) -> str:
    return f"{method.replace(', ', '-').replace(' ', '_')}-lr{lr:g}-seed{seed}"


def main(
    table: Annotated[str, typer.Argument(help=f"One of {', '.join(TABLES)}.")],
    root: Annotated[str, typer.Option(help="Folder of the data sets.")] = "data",
    out: Annotated[Path, typer.Option(help="Where the runs are kept.")] = Path("runs/tables"),
    workers: Annotated[int, typer.Option(help="Runs at a time, one core each.")] = 2,
) -> None:
    if table not in TABLES:
        raise typer.BadParameter(f"{table} must be one of {', '.join(TABLES)}.")
    config, rates, burn_in, rows = TABLES[table]
    out = out / Path(config).stem  # tables of one configuration share their runs
    console = Console()

    def overrides(method: str, lr: float, seed: int, split: str) -> list[str]:
        burn = (
            [f"method.burn_in_rounds={burn_in}"] if method in ("FedLabel, released code", "FedLabel, burn-in") else []
        )
        common = [f"data.root={root}", f"training.lr={lr}", f"seed={seed}", f"evaluation.split={split}"]
        return [*METHODS[method], *burn, *common, "evaluation.panel_samples=0", "device=cpu"]

    def run_all(jobs: list[tuple[str, list[str], Path, str]]) -> None:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
            for job, _ in zip(jobs, pool.map(run_one, jobs), strict=True):
                console.print(f"done: {job[3]}")

    search = [(m, lr) for m in rows for lr in rates]
    chosen = dict.fromkeys(rows, rates[0])
    probe = len(rates) == 1  # nothing to search: one seed, validation split
    seeds, split = ((SEARCH_SEED,), "validation") if probe else (SEEDS, "test")
    if not probe:
        jobs = [
            (config, overrides(m, lr, SEARCH_SEED, "validation"), out, slug(m, lr, SEARCH_SEED)) for m, lr in search
        ]
        run_all(jobs)
    for method in () if probe else rows:
        scores = {lr: read(out, slug(method, lr, SEARCH_SEED))["eval/accuracy"]["mean_last_10"] for lr in rates}
        chosen[method] = max(scores, key=lambda lr: scores[lr])
        console.print(f"{method}: validation accuracy by learning rate {scores}")
    final = [(m, chosen[m], seed) for seed in seeds for m in rows]
    run_all([(config, overrides(m, lr, seed, split), out, slug(m, lr, seed)) for m, lr, seed in final])

    def cell(summaries: list[dict[str, dict[str, float]]], key: str, column: str = "mean_last_10") -> str:
        values = [100 * s[key][column] for s in summaries if key in s and math.isfinite(s[key][column])]
        if not values:
            return "–"
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    lines = [
        "| method | lr | last | mean of last 10 | best | worst 10 % of clients | coverage | pseudo-label accuracy "
        "(local / global expert) | from global | MB up | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in rows:
        found = [read(out, slug(method, chosen[method], seed)) for seed in seeds]
        accuracy = f"{cell(found, 'pseudo/accuracy')} ({cell(found, 'pseudo/accuracy_local')} / "
        accuracy += f"{cell(found, 'pseudo/accuracy_global')})"
        lines.append(
            f"| {method} | {chosen[method]:g} | {cell(found, 'eval/accuracy', 'last')} "
            f"| {cell(found, 'eval/accuracy')} "
            f"| {cell(found, 'eval/accuracy', 'best')} | {cell(found, 'eval/worst_10pct_client_accuracy')} "
            f"| {cell(found, 'pseudo/coverage')} | {accuracy if 'pseudo/accuracy' in found[0] else '–'} "
            f"| {cell(found, 'pseudo/from_global')} "
            f"| {statistics.mean(float(s['comm/bytes_up']) for s in found) / 1e6:.1f} "  # type: ignore[arg-type]
            f"| {statistics.mean(float(s['seconds']) for s in found):.0f} |"  # type: ignore[arg-type]
        )
    text = "\n".join(lines) + "\n"
    (out / f"{table}.md").write_text(text)
    draw(out / f"{table}.png", rows, chosen, seeds)
    console.print(text, soft_wrap=True)
    console.print(f"Written: {out / table}.md and .png. Commit: {found[0]['commit']}")


def draw(path: Path, rows: tuple[str, ...], chosen: dict[str, float], seeds: tuple[int, ...]) -> None:
    from fedlabel.figures import curves_figure, save_png
    from fedlabel.tracking import read_metrics

    curves: dict[str, list[tuple[list[float], list[float]]]] = {}
    for method in rows:
        for seed in seeds:
            found = [r for r in read_metrics(path.parent / slug(method, chosen[method], seed)) if "eval/accuracy" in r]
            curves.setdefault(method, []).append(([r["round"] for r in found], [r["eval/accuracy"] for r in found]))
    save_png(curves_figure(curves, title=path.stem, y_label="accuracy"), path)


if __name__ == "__main__":
    typer.run(main)
