"""Labelling functions: the usual analysis table of weak supervision, over all clients and per client."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedlabel.data.labels.labeling_functions import function_name, load_functions
from fedlabel.experiment import Experiment
from fedlabel.learning.metrics import COUNTED, OF_SAMPLES, RATES, Counts, add_counts, ratio
from fedlabel.record.names import FUNCTIONS_CSV
from server.observers.base import Observer, Report, Round
from server.state import ServerState

ALL = "all"
REPORTED = ("asked", "failed", "first_failure", "invalid", "first_invalid", "seconds_per_1000")
"""What of `FunctionReport` the table of written functions has, in the rows over all clients."""


class FunctionObserver(Observer):
    """Keeps each client's latest votes: table and metrics are over all clients that have voted, not over a cohort. The
    table is a file, and a text in TensorBoard once the method estimates accuracies, and at the end.
    """

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        modules = [part.module for part in experiment.config.supervision.parts if part.module is not None]
        self._names = [function_name(function) for module in modules for function in load_functions(module)]
        """Of written functions; grown ones have numbers."""
        self._clients: dict[int, Counts] = {}
        self._shown = False

    def dump(self) -> dict[int, Counts]:
        """Returns each client's latest votes."""
        return self._clients

    def load(self, remembered: Mapping[int, Counts]) -> None:
        """Restores the result of `dump`."""
        self._clients = dict(remembered)

    def after_round(self, seen: Round, state: ServerState) -> Report:
        """See `Observer`."""
        if COUNTED[0] not in seen.counts:
            return Report()
        estimated = self.experiment.recipe.inspect(state.shared).get("function_accuracy")
        self._clients |= {
            client: {key: counts[key] for key in COUNTED}
            for client, counts in seen.tally.client_counts.items()
            if COUNTED[0] in counts
        }
        total = add_counts([self._clients[client] for client in sorted(self._clients)])
        guess = np.full(self._size(total), np.nan) if estimated is None else estimated.cpu().double().numpy()
        tables = {ALL: total, **{str(client): self._clients[client] for client in sorted(self._clients)}}
        nothing = np.full_like(guess, np.nan)  # the estimate is the federation's, not a client's
        file = self._file(
            {
                name: self._rows(counts, guess if name == ALL else nothing, name == ALL)
                for name, counts in tables.items()
            }
        )
        report = Report(self._metrics(total, guess), files={FUNCTIONS_CSV: file})
        if not self.is_last(seen.number) and (self._shown or estimated is None):
            return report
        self._shown = True
        table = markdown(self._rows(total, guess, True))
        texts = {"functions": table, "functions/clients": markdown(self._client_rows())}
        figures = {}
        if self.experiment.config.draws_figures:
            from fedlabel.record.figures import functions_figure  # here: matplotlib takes a while to import

            rates = self._rates(total)
            figures["functions"] = functions_figure(rates["coverage"], rates["accuracy"], guess)
        return replace(report, texts=texts, figures=figures)

    def _size(self, counts: Counts) -> int:
        return len(counts["function_counts"]) // 4

    def _rates(self, counts: Counts) -> dict[str, np.ndarray]:
        """Returns each function's rates; accuracy is over its votes."""
        cast = np.reshape(counts["function_votes"], (self._size(counts), -1)).sum(1)
        overlaps, conflicts, right, with_truth = np.reshape(counts["function_counts"], (-1, 4)).T
        samples = np.full_like(cast, counts["function_samples"][0])
        top, bottom = (cast, overlaps, conflicts, right), (samples, samples, samples, with_truth)
        return {name: ratio(a, b) for name, a, b in zip(RATES, top, bottom, strict=True)}

    def _rows(self, counts: Counts, guess: np.ndarray, with_reports: bool = False) -> list[dict[str, object]]:
        names = self.experiment.federation.dataset.class_names
        reports = self.experiment.federation.functions
        functions = self._names or self.experiment.federation.function_names
        votes = np.reshape(counts["function_votes"], (self._size(counts), -1))
        rates = self._rates(counts)
        return [
            {
                "function": functions[place] if functions else place,
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

    def _file(self, tables: Mapping[str, list[dict[str, object]]]) -> str:
        text = io.StringIO()
        first = next(iter(tables.values()))[0]
        writer = csv.DictWriter(text, ["client", *first], lineterminator="\n")
        writer.writeheader()
        for client, rows in tables.items():
            for row in rows:
                shown = {key: _cell(value, 6) for key, value in row.items()}
                writer.writerow({"client": client, **shown})
        return text.getvalue()

    def _metrics(self, counts: Counts, guess: np.ndarray) -> dict[str, float]:
        samples, voted, with_truth, majority, normalized = counts["function_samples"]
        if not samples:
            return {}
        rates = self._rates(counts)
        found = {f"functions/{name}": values for name, values in rates.items()}
        compared = np.isfinite(rates["accuracy"])  # of none where no truth is at hand, as on real nodes
        found["functions/estimated_accuracy"] = np.where(compared, guess, np.nan) if compared.any() else guess
        found["functions/estimation_error"] = np.abs(guess - rates["accuracy"])
        found["functions/classes"] = (np.reshape(counts["function_votes"], (len(guess), -1)) > 0).sum(1).astype(float)
        metrics = {tag: float(np.nanmean(values)) for tag, values in found.items() if np.isfinite(values).any()}
        rates_of_samples = ratio([voted, majority, normalized], [samples, with_truth, with_truth])
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
