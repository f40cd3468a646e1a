"""The tables that say where the time went."""

from __future__ import annotations

import io

from rich.console import Console

from fedlabel.cli.profile import profile_tables


def shown(rounds: list[dict[str, float]], clients: int = 5) -> list[list[str]]:
    """Returns the words of each table's lines, without frames."""
    found = []
    for table in profile_tables(rounds, clients):
        console = Console(file=io.StringIO(), width=120)
        console.print(table)
        found.append([" ".join(line.replace("│", " ").split()) for line in console.file.getvalue().splitlines()])  # type: ignore[attr-defined]
    return found


def test_the_mean_round_without_the_first() -> None:
    first = {"round": 3, "system/seconds_steps": 99.0}
    rounds = [first, *({"round": n, "system/seconds_steps": n, "system/seconds_write": 1.0} for n in (4, 5))]
    (table,) = shown(rounds)
    assert table[0] == "server: mean of rounds 4 to 5"
    assert "steps forward and backward 4.5000 81.8% 900.00" in table
    assert "write files 1.0000 18.2% 200.00" in table
    assert "together 5.5000 100.0% 1100.00" in table


def test_workers_have_a_table_of_their_own() -> None:
    server, workers = shown([{"round": 1, "system/seconds_wait": 2.0, "system/worker_seconds_steps": 3.0}])
    assert server[0] == "server: round 1"
    assert "wait waiting for clients 2.0000 100.0% 400.00" in server
    assert workers[0] == "workers, added up: round 1"
    assert "steps forward and backward 3.0000 100.0% 600.00" in workers


def test_nothing_is_shown_of_rounds_that_were_not_measured() -> None:
    assert shown([{"round": 1, "system/round_seconds": 2.0}]) == []
    assert shown([]) == []
    (table,) = shown([{"round": 1}, {"round": 2}, {"round": 3, "system/seconds_plan": 1.0}])
    assert table[0] == "server: round 3"
