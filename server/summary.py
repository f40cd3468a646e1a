"""The summary of a run, from its metrics: it covers resumed runs as a whole."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fedlabel.experiment import Experiment
from fedlabel.hardware import describe_hardware, source_hash, versions
from fedlabel.learning.metrics import add_counts
from fedlabel.privacy import PrivacyConfig
from fedlabel.record.names import SECONDS
from fedlabel.record.results import averaged_rounds, best_row, summarize
from server.selection import select_key


def summary(rows: Sequence[Mapping[str, Any]], experiment: Experiment, commit: str) -> dict[str, object]:
    """Returns the content of `summary.json`, from `metrics.jsonl` (so it covers resumed runs as a whole).

    Args:
        rows: the run's rounds, as `read_metrics` returns them.
        experiment: the run's.
        commit: of the code that this process began with.
    """
    config = experiment.config
    keys = ("system/round_seconds", *_COUNTED, *_CLAIMED)
    total = add_counts({key: [row.get(key) or 0.0] for key in keys} for row in rows)
    own = config.method.metrics
    declared = {tag.name for tag in own}
    measured = sorted({key for row in rows for key in row if key.startswith(_SUMMARIZED) or key in declared})
    scalars = [key for key in measured if not any(isinstance(row.get(key), list) for row in rows)]
    results = {key: summarize(rows, key, own) for key in scalars}
    tag = select_key(experiment)
    chosen = best_row(rows, tag) if tag is not None else None
    if chosen is not None:
        results |= {k: {**v, "selected": chosen[k]} for k, v in results.items() if chosen.get(k) is not None}
    return {
        **results,
        **({"selected_round": chosen["round"]} if chosen is not None else {}),
        **({"privacy": _privacy(rows, config.privacy)} if config.privacy.is_on else {}),
        "rounds": len(rows),
        "last_tenth": averaged_rounds(rows),
        "seed": config.seed,
        "seconds": total["system/round_seconds"][0],
        "method": config.method.name,
        "dataset": config.data.name,
        "evaluation_split": config.evaluation.split,
        **{key: int(total[key][0]) for key in _COUNTED},
        **_simulated(rows, experiment),
        **{key: int(total[key][0]) for key in _CLAIMED if any(key in row for row in rows)},
        "commit": commit,
        "source_hash": source_hash(),
        "versions": versions(),
        "hardware": describe_hardware(experiment.device),
        "command": sys.argv,
    }


def _privacy(rows: Sequence[Mapping[str, Any]], config: PrivacyConfig) -> dict[str, object]:
    """Returns the guarantee of a run, see docs/privacy.md."""
    return {
        "epsilon": rows[-1]["privacy/epsilon"] if rows else 0.0,
        "delta": config.spent_at,
        "neighbours": "all data of one client replaced",
        "noise_at": config.kind,
        "clipping_norm": config.clipping_norm,
        "noise_multiplier": config.noise_multiplier,
    }


def _simulated(rows: Sequence[Mapping[str, Any]], experiment: Experiment) -> dict[str, object]:
    """Returns what a run says of its simulated devices; empty without any."""
    if experiment.devices is None:
        return {}
    sums = {key: int(sum(row.get(f"system/{key}") or 0 for row in rows)) for key in ("late_clients", "dropped_clients")}
    seconds = max((row[SECONDS] for row in rows), default=0.0)
    return {"simulated": {"seconds": seconds, **sums, "devices": experiment.devices.summary()}}


OF_THE_PROCESS = ("commit", "source_hash", "versions", "hardware", "command")
"""Keys of `summary` that tell of the process which ended the run."""
_SUMMARIZED = ("eval/", "pseudo/", "posterior/", "transition/", "belief/", "graph/", "functions/", "train/loss")
_COUNTED = (
    "comm/bytes_up",
    "comm/bytes_down",
    "train/forward_samples",
    "train/backward_samples",
    "system/failed_clients",
    "system/refused_replies",
)
_CLAIMED = ("comm/claimed_bytes_up", "comm/claimed_bytes_down")
