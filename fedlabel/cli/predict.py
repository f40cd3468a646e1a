"""`fedlabel export` and `fedlabel predict`: a trained model as files, and its predictions as a CSV file."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

from rich.console import Console

from fedlabel.cli.progress import make_table, say
from fedlabel.config_text import ConfigError
from fedlabel.names import counted
from fedlabel.prediction.export import Loaded, export_model, load_exported
from fedlabel.prediction.inputs import as_inputs
from fedlabel.prediction.module import Predictions, predict
from fedlabel.record.files import write_atomic
from fedlabel.record.names import CARD_JSON, CONFIG_YAML
from fedlabel.shown import shown
from server.results import load_run

SAMPLE, PREDICTED, PROBABILITY = "sample", "predicted", "p:"


def export_run(console: Console, run: Path, out: Path) -> None:
    """Writes the model of a run into a folder."""
    result = load_run(run)
    rows = {row["round"]: row for row in result.metrics}  # the last one may be newer than the newest checkpoint
    found = {name: value for name, value in rows.get(result.round, {}).items() if name.startswith("eval/")}
    metrics = {name: value for name, value in found.items() if not isinstance(value, list)}
    about = {"run": run.name, "round": result.round, "metrics": metrics}
    written = export_model(result.model, result.config, result.card, out, about)
    if written.problem:
        say(console, f"note: no program was written: {written.problem}", "yellow")
    say(console, f"Written to {out}: {', '.join(written.files)}")


def predict_inputs(console: Console, source: Path, inputs: Path, out: Path, program: bool) -> None:
    """Writes the predictions of a run, or of an exported folder, for inputs in files."""
    if (source / CONFIG_YAML).is_file():
        result = load_run(source)
        loaded: Loaded = (result.model, result.card, result.config.data)
    elif (source / CARD_JSON).is_file():
        loaded = load_exported(source, program)
    else:
        raise ConfigError(
            f"{source} is neither the folder of a run nor one that `fedlabel export` wrote: check the path."
        )
    model, card, data = loaded
    schema, found = card.schema, as_inputs(inputs, card, data)
    for note in found.notes:
        say(console, f"note: {note}", "yellow")
    predictions = predict(model, found.tensor, schema.classes)
    write_atomic(out, as_csv(predictions, found.names))
    counts = Counter(predictions.labels)
    table = make_table("class", "predicted", title=f"{counted(len(predictions), 'input')}, {out}")
    for name in schema.classes[:20]:
        table.add_row(shown(name), str(counts[name]))
    if len(schema.classes) > 20:
        rest = sum(counts[name] for name in schema.classes[20:])
        table.add_row(f"{len(schema.classes) - 20} more", str(rest))
    console.print(table)


def as_csv(predictions: Predictions, names: tuple[str, ...]) -> str:
    """Returns predictions as CSV: sample, predicted class, and the probability of each class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([SAMPLE, PREDICTED, *(f"{PROBABILITY}{name}" for name in predictions.classes)])
    for name, label, row in zip(names, predictions.labels, predictions.probabilities.tolist(), strict=True):
        writer.writerow([name, label, *(f"{value:.6g}" for value in row)])
    return text.getvalue()
