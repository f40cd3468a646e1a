"""What is shown of labelling functions: the table that weak supervision looks at, over all clients and of each."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping

import numpy as np

from fedlabel.data.labeling_functions import function_name, load_functions
from fedlabel.experiment import Experiment
from fedlabel.figures import functions_figure
from fedlabel.methods.steps import State
from fedlabel.metrics import Counts, add_counts, ratio
from fedlabel.tracking import RunFolder, write_atomic

ALL = "all"
RATES = ("coverage", "overlap", "conflict", "accuracy")
OF_SAMPLES = ("voted", "majority_accuracy", "normalized_vote_accuracy")
REPORTED = ("asked", "failed", "first_failure", "invalid", "first_invalid", "seconds_per_1000")
"""What of `FunctionReport` the table of written functions has, in the rows over all clients."""
COUNTED = ("function_votes", "function_counts", "function_samples")
"""See `metrics.function_counts`."""


class FunctionWatch:
    """Keeps each client's latest votes: table and metrics are over all clients that have voted, not over a cohort."""

    def __init__(self, experiment: Experiment, folder: RunFolder, kept: Mapping[int, Counts] | None = None) -> None:
        """Args:
        experiment: has the method and the names of functions and classes.
        folder: the run's.
        kept: what `dump` gave; None: no client has voted.
        """
        self._experiment = experiment
        self._folder = folder
        parts = experiment.config.supervision.parts
        modules = [part.module for part in parts if part.module is not None]
        self._names = [function_name(function) for module in modules for function in load_functions(module)]
        """Of written functions; grown ones have numbers."""
        self._clients: dict[int, Counts] = dict(kept or {})
        self._shown = False

    def dump(self) -> dict[int, Counts]:
        """Returns each client's latest votes, for a checkpoint."""
        return self._clients

    def watch(self, round_number: int, client_counts: Mapping[int, Counts], shared: State) -> dict[str, float]:
        """Writes the table (CSV; TensorBoard's at the first and at the last round) and returns `functions/...`.

        Args:
            round_number: of the votes.
            client_counts: the round's counts per client.
            shared: what the server shares after the round.
        """
        estimated = self._experiment.config.method.function_accuracy(shared)
        self._clients |= {
            client: {key: counts[key] for key in COUNTED}
            for client, counts in client_counts.items()
            if COUNTED[0] in counts
        }
        known = add_counts([self._clients[client] for client in sorted(self._clients)])
        guess = np.full(self._size(known), np.nan) if estimated is None else estimated.cpu().double().numpy()
        tables = {ALL: known, **{str(client): self._clients[client] for client in sorted(self._clients)}}
        nothing = np.full_like(guess, np.nan)  # the estimate is the federation's, not a client's
        self._write(
            {
                name: self._rows(counts, guess if name == ALL else nothing, name == ALL)
                for name, counts in tables.items()
            }
        )
        last = round_number == self._experiment.config.num_rounds
        if last or (not self._shown and estimated is not None):
            self._shown = True
            self._folder.log_text("functions", markdown(self._rows(known, guess, True)), round_number)
            self._folder.log_text("functions/clients", markdown(self._client_rows()), round_number)
            if self._experiment.config.evaluation.figures:
                rates = self._rates(known)
                figure = functions_figure(rates["coverage"], rates["accuracy"], guess)
                self._folder.log_figure("functions", figure, round_number)
        return self._metrics(known, guess)

    def _size(self, counts: Counts) -> int:
        return len(counts["function_counts"]) // 4

    def _rates(self, counts: Counts) -> dict[str, np.ndarray]:
        """Returns each function's rates; accuracy is of its votes."""
        cast = np.reshape(counts["function_votes"], (self._size(counts), -1)).sum(1)
        overlaps, conflicts, right, known = np.reshape(counts["function_counts"], (-1, 4)).T
        samples = np.full_like(cast, counts["function_samples"][0])
        top, bottom = (cast, overlaps, conflicts, right), (samples, samples, samples, known)
        return {name: ratio(a, b) for name, a, b in zip(RATES, top, bottom, strict=True)}

    def _rows(self, counts: Counts, guess: np.ndarray, with_reports: bool = False) -> list[dict[str, object]]:
        names = self._experiment.federation.dataset.class_names
        reports = self._experiment.federation.functions
        votes = np.reshape(counts["function_votes"], (self._size(counts), -1))
        rates = self._rates(counts)
        return [
            {
                "function": self._names[place] if self._names else place,
                "polarity": ", ".join(name for name, number in zip(names, row, strict=True) if number),
                **{name: values[place] for name, values in rates.items()},
                "estimated_accuracy": guess[place],
                "votes": int(row.sum()),
                "abstentions": int(counts["function_samples"][0] - row.sum()),
                "samples": int(counts["function_samples"][0]),
                **(
                    {name: getattr(reports[place], name) if with_reports else "" for name in REPORTED}
                    if reports
                    else {}
                ),
            }
            for place, row in enumerate(votes)
        ]

    def _client_rows(self) -> list[dict[str, object]]:
        """Returns a row per client, of means over the functions."""
        rows: list[dict[str, object]] = []
        for client in sorted(self._clients):
            found = self._metrics(self._clients[client], np.full(self._size(self._clients[client]), np.nan))
            means = {name: found.get(f"functions/{name}", np.nan) for name in (*RATES, *OF_SAMPLES)}
            rows.append({"client": client, "samples": int(self._clients[client]["function_samples"][0]), **means})
        return rows

    def _write(self, tables: Mapping[str, list[dict[str, object]]]) -> None:
        text = io.StringIO()
        first = next(iter(tables.values()))[0]
        writer = csv.DictWriter(text, ["client", *first], lineterminator="\n")
        writer.writeheader()
        for client, rows in tables.items():
            for row in rows:
                shown = {key: _cell(value, 6) for key, value in row.items()}
                writer.writerow({"client": client, **shown})
        write_atomic(self._folder.functions_csv, text.getvalue())

    def _metrics(self, counts: Counts, guess: np.ndarray) -> dict[str, float]:
        samples, voted, known, majority, normalized = counts["function_samples"]
        if not samples:
            return {}
        rates = self._rates(counts)
        found = {f"functions/{name}": values for name, values in rates.items()}
        found["functions/estimated_accuracy"] = np.where(np.isfinite(rates["accuracy"]), guess, np.nan)
        found["functions/estimation_error"] = np.abs(guess - rates["accuracy"])
        found["functions/classes"] = (np.reshape(counts["function_votes"], (len(guess), -1)) > 0).sum(1).astype(float)
        metrics = {tag: float(np.nanmean(values)) for tag, values in found.items() if np.isfinite(values).any()}
        rates_of_samples = ratio([voted, majority, normalized], [samples, known, known])
        pairs = zip(OF_SAMPLES, rates_of_samples, strict=True)
        return metrics | {f"functions/{name}": float(value) for name, value in pairs if np.isfinite(value)}


def markdown(rows: list[dict[str, object]]) -> str:
    """Returns rows of equal keys as a table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(_cell(value, 3) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object, digits: int) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}f}" if np.isfinite(value) else ""
    return str(value)
