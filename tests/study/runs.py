"""Run folders made by hand: what `fedlabel compare` reads of a run, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedlabel.config import load_config, to_yaml
from fedlabel.record.results import summarize


def make_run(
    path: Path,
    *overrides: str,
    accuracy: Sequence[float | None] = (0.5,),
    finished: bool = True,
    auc: Sequence[float] = (),
    round_takes: float | None = None,
) -> Path:
    """Makes a run of one round per entry of `accuracy`; None: not evaluated. Every round uploads 1,000,000 bytes, and
    takes `round_takes` simulated seconds; None: there is no clock.
    """
    config = load_config([], overrides)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    rows = [
        {"round": number, "comm/bytes_up": 1e6} | ({} if value is None else {"eval/accuracy": value})
        for number, value in enumerate(accuracy, start=1)
    ]
    for row in rows if round_takes is not None else ():
        row["system/virtual_seconds"] = row["round"] * round_takes
    for row, value in zip(rows, auc, strict=False):
        row["eval/auc"] = value
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "eval/accuracy": summarize(rows),
        **({"eval/auc": summarize(rows, "eval/auc") | {"selected": auc[0]}} if auc else {}),
        "comm/bytes_up": int(1e6 * len(rows)),
        "seconds": 12.0,
        "system/failed_clients": 1,
        "commit": "0123abc",
        "versions": {"python": "3.11.7"},
        "hardware": {"cpu": "Some CPU", "usable_cores": 2, "logical_cores": 4, "memory_gib": 8.0},
        "command": ["/somewhere/bin/fedlabel", "run", "data.name=my set"],
    }
    if finished:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def make_sweep(out: Path) -> Path:
    """Makes a sweep of three rows, two settings and three seeds, of which one run failed and one was not reached.

    Accuracies of seeds 0, 1, 2: labelled only 0.4 throughout, FedLabel 0.5, 0.6, 0.7, fully labelled 0.9.
    """
    methods = {
        "labelled only": ["method.name=supervised"],
        "FedLabel": [],
        "fully <b>labelled</b>": ["method.name=supervised", "method.oracle_labels=true"],
    }
    accuracies = {"labelled only": [0.4] * 3, "FedLabel": [0.5, 0.6, 0.7], "fully <b>labelled</b>": [0.9] * 3}
    settings = {"alpha 0.1": ["partition.dirichlet_alpha=0.1"], "alpha 1 | mild": ["partition.dirichlet_alpha=1"]}
    runs = []
    for setting, section in settings.items():
        for number, (method, row) in enumerate(methods.items()):
            for seed, accuracy in enumerate(accuracies[method]):
                path = f"{section[0][-3:].strip('=')}/{number}/lr0.1-seed{seed}"
                cell = {"setting": setting, "method": method, "seed": seed, "value": 0.1, "role": "final", "path": path}
                if (setting, method, seed) == ("alpha 0.1", "labelled only", 2):
                    continue
                if (setting, method, seed) == ("alpha 1 | mild", "FedLabel", 0):
                    runs.append({**cell, "status": "failed", "error": "Traceback\n\nKeyError: 'lost'"})
                    continue
                rounds = [None, accuracy / 2, None, accuracy]
                make_run(out / path, *section, *row, f"seed={seed}", accuracy=rounds)
                runs.append({**cell, "status": "done", "error": ""})
    make_run(out / "search", "evaluation.split=validation", "seed=100")
    chosen = {"setting": "alpha 0.1", "method": "FedLabel", "key": "training.lr", "value": 0.1, "scores": []}
    content = {
        "sweep": {
            "methods": methods,
            "settings": settings,
            "seeds": [0, 1, 2],
            "search": {"values": [0.1, 0.2], "per_method_values": {"FedLabel": [0.01, 0.1]}},
            "targets": [0.6],
            "published": {"alpha 0.1": {"FedLabel": "46.05 ± 1.09"}},
            "deviations": "a smaller net",
        },
        "runs": [*runs, {"role": "search", "path": "search"}],
        "chosen": [{**chosen, "warning": "training.lr=0.1 lies at the edge"}],
    }
    (out / "sweep.json").write_text(json.dumps(content))
    return out
