"""Tables that say where a run's time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fedlabel.cli.progress import make_table
from fedlabel.spans import PARTS

WHERE = {"server": "seconds", "workers, added up": "worker_seconds"}
"""Process -> what the tags of its parts are called."""


def profile_tables(rounds: Sequence[Mapping[str, Any]], clients: int) -> list[Table]:
    """Returns a table of the mean round for the server's process, and one for the workers if there are any; none if
    nothing was measured.

    Args:
        rounds: metrics of the rounds that ran in one go. The first, in which processes start and kernels are compiled,
            is left out if there are others.
        clients: how many train in a round.
    """
    measured = [row for row in rounds if any(f"system/seconds_{part}" in row for part in PARTS)]
    rows = measured[1:] or measured
    tables = []
    for where, called in WHERE.items():
        found = {
            part: sum(row.get(f"system/{called}_{part}", 0.0) for row in rows) / len(rows) for part in PARTS if rows
        }
        spent = sorted(((seconds, part) for part, seconds in found.items() if seconds), reverse=True)
        total = sum(found.values())
        if not spent:
            continue
        first, last = rows[0]["round"], rows[-1]["round"]
        when = f"round {first}" if first == last else f"mean of rounds {first} to {last}"
        table = make_table("part", "", "s per round", "share", "ms per client", title=f"{where}: {when}")
        for column in table.columns[2:]:
            column.justify = "right"
        for seconds, part in spent:
            table.add_row(part, PARTS[part], *_numbers(seconds, total, clients))
        table.add_section()
        table.add_row("together", "", *_numbers(total, total, clients))
        tables.append(table)
    return tables


def _numbers(seconds: float, total: float, clients: int) -> tuple[str, str, str]:
    return f"{seconds:.4f}", f"{seconds / total:.1%}", f"{1000 * seconds / clients:.2f}"
