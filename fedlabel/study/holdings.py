"""Who holds how many samples, of which classes, with which labels: from a run's supervision.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Facts = list[tuple[str, str]]
"""What is said, and the text."""
BUBBLE_CLIENTS = 40
"""Clients in the chart of the partition: of more, evenly spaced ones."""


def label_card(audit: Mapping[str, Any], num_clients: int) -> dict[str, Any] | None:
    """Returns which labels the federation holds; None where that was not recorded.

    Args:
        audit: the content of supervision.json.
        num_clients: of the federation.
    """
    if "kinds" not in audit:
        return None
    kinds = audit["kinds"]
    held: list[list[int]] = kinds["clients"]
    totals = kinds.get("total") or [sum(column) for column in zip(*held, strict=True)]
    samples = sum(totals)
    rows = [
        {
            "kind": "no label" if name == "nothing" else name,
            "samples": total,
            "share": total / max(1, samples),
            "clients": sum(client[place] > 0 for client in held),
        }
        for place, (name, total) in enumerate(zip(kinds["names"], totals, strict=True))
        if total
    ]
    sizes = [sum(client) for client in held]
    facts: Facts = [("samples per client", _spread(sizes)), ("classes", f"{len(audit.get('classes', ()))}")]
    if len(held) < num_clients:
        facts.insert(0, ("clients counted", f"{len(held):,} of {num_clients:,}, evenly spaced"))
    facts += [*_balance(audit, num_clients), *_quality(audit)]
    rows.sort(key=lambda row: -row["samples"])
    return {"samples": samples, "clients": num_clients, "counted": len(held), "rows": rows, "facts": facts}


def _balance(audit: Mapping[str, Any], num_clients: int) -> Facts:
    """Returns how evenly classes occur, in the federation and at its clients."""
    counts = audit.get("class_counts")
    if not counts:
        return []
    pairs = zip(counts["with_supervision"], counts["without"], strict=True)
    held = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
    totals = [sum(column) for column in zip(*held, strict=True)]
    whole = max(1, sum(totals))
    largest, smallest = max(totals), min(totals)
    names = counts["classes"]
    shown = len(counts["clients"])
    some = [("classes counted at", f"{shown:,} of {num_clients:,} clients, evenly spaced")]
    return [
        *(some if shown < num_clients else []),
        ("classes per client", _spread([sum(cell > 0 for cell in client) for client in held])),
        ("largest class", f"{names[totals.index(largest)]}: {100 * largest / whole:.1f} % of the samples"),
        ("smallest class", f"{names[totals.index(smallest)]}: {100 * smallest / whole:.1f} %"),
        ("with supervision per client", _spread([sum(client) for client in counts["with_supervision"]])),
    ]


def _quality(audit: Mapping[str, Any]) -> Facts:
    """Returns noise, sets, bags and labelling functions, as far as there are any; wrong means: unlike hidden labels."""
    facts: Facts = []
    noisy, sets = audit.get("noisy_labels", {}), audit.get("candidate_sets", {})
    number = sum(map(sum, noisy.get("counts", [])))
    if number:
        facts.append(("noisy labels that are wrong", f"{100 * noisy['wrong'] / number:.1f} % of {number:,}"))
    sizes = sets.get("sizes", [])
    if sum(sizes):
        mean = sum(size * count for size, count in enumerate(sizes)) / sum(sizes)
        share = 100 * sets["hold_the_truth"] / sum(sizes)
        facts += [("candidates of a set", f"{mean:.1f} in the mean"), ("sets that hold the truth", f"{share:.1f} %")]
    bags = audit.get("bags", {}).get("sizes", [])
    if sum(bags):
        of_size = [size for size, count in enumerate(bags) if count]
        mean = sum(size * count for size, count in enumerate(bags)) / sum(bags)
        span = f"{of_size[0]} to {of_size[-1]} samples, {mean:.1f} in the mean"
        wrong = audit["bags"]["wrong_counts"]
        facts += [("bags", f"{sum(bags):,} of {span}"), ("bags with wrong counts", f"{wrong:,}")]
    functions = audit.get("labeling_functions", [])
    if functions:
        facts.append(("labelling functions", ", ".join(str(each["name"]) for each in functions)))
    of_nodes = audit.get("label_card", {})
    names = {"noisy": "noisy labels", "sets": "candidate sets", "noisy_sets": "noisy candidate sets", "bags": "bags"}
    return [*facts, *((name, f"{of_nodes[key]:,}") for key, name in names.items() if of_nodes.get(key))]


def partition(audit: Mapping[str, Any], num_clients: int) -> dict[str, Any] | None:
    """Returns samples by client and class, with and without supervision; None where that was not recorded.

    Args:
        audit: see `label_card`.
        num_clients: of the federation.
    """
    counts = audit.get("class_counts")
    if not counts:
        return None
    places = evenly(len(counts["clients"]), BUBBLE_CLIENTS)
    return {
        "classes": counts["classes"],
        "clients": [counts["clients"][place] for place in places],
        "with_supervision": [counts["with_supervision"][place] for place in places],
        "without": [counts["without"][place] for place in places],
        "of": num_clients,
    }


def evenly(number: int, most: int) -> Sequence[int]:
    """Returns up to `most` evenly spaced places of `number`, the first and the last among them."""
    if number <= most:
        return range(number)
    return [place * (number - 1) // (most - 1) for place in range(most)]


def _spread(values: Sequence[int]) -> str:
    if not values:
        return "–"
    if min(values) == max(values):
        return f"{values[0]:,} each"
    return f"{min(values):,} to {max(values):,}, median {statistics.median(values):,g}"
