"""A view of a run in a terminal, made of nothing but the run's folder: while it runs, and after its end."""

from __future__ import annotations

import json
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedlabel.cli.progress import duration, say
from fedlabel.config_text import Plain, read_mapping
from fedlabel.errors import naming
from fedlabel.names import client_label, counted
from fedlabel.record.files import is_locked
from fedlabel.record.json_files import MetricsFollower, read_client_names
from fedlabel.record.names import CONFIG_YAML, FAILURES_LOG, PARTITION_JSON, SECONDS, STAGES_JSON, SUMMARY_JSON
from fedlabel.shown import shown

REFRESH = 1.0
"""Seconds between two looks at the folder."""
CURVES = {
    "eval/accuracy": "accuracy",
    "interim/accuracy": "interim accuracy",
    "train/loss": "training loss",
    "pseudo/coverage": "coverage of pseudo-labels",
    "pseudo/accuracy": "accuracy of pseudo-labels",
}
"""What is drawn, in this order, as far as there is room: metric -> title."""
COLUMNS = {
    "eval/client_accuracy": "accuracy",
    "pseudo/client_coverage": "coverage",
    "pseudo/client_accuracy": "labels right",
    "pseudo/client_from_global": "from global",
    "train/client_loss": "loss",
}
"""Of the table of clients: list in metrics.jsonl -> heading."""
RUNNING, STOPPED, FINISHED = "running", "STOPPED", "finished"
RECENT = 10
"""Rounds from whose seconds the time left is estimated."""


@dataclass
class Watched:
    """What a run's folder says.

    Args:
        path: the folder.

    Raises:
        ValueError: it holds no run, or a file of it is damaged.
    """

    path: Path
    config: Mapping[str, str] = field(init=False)
    """Of config.yaml what is shown, by dotted key."""
    metrics: MetricsFollower = field(init=False)
    state: str = field(init=False, default="")
    stages: Sequence[Mapping[str, Any]] = field(init=False, default=())
    failures: Sequence[str] = field(init=False, default=())
    """First lines of the failures."""
    names: Mapping[int, str] | None = field(init=False, default=None)
    """Client -> its name, of those that have one; None: not read yet."""
    age: float = field(init=False, default=0.0)
    """Seconds since the last round."""

    def __post_init__(self) -> None:
        with naming(self.path):
            if not (self.path / CONFIG_YAML).is_file():
                raise ValueError(
                    f"{self.path} holds no run (no {CONFIG_YAML}): give the folder of one, e.g. runs/NAME."
                )
        self.metrics = MetricsFollower(self.path)
        self.look()

    def look(self) -> None:
        """Reads what is new."""
        self.config = self._read_config()
        locked = is_locked(self.path)  # before the files: a run that ends meanwhile has written all when we read them
        self.metrics.read()
        with naming(self.path):
            done = (self.path / SUMMARY_JSON).is_file()
            self.age = time.time() - self.metrics.written
            log, stages = self.path / FAILURES_LOG, self.path / STAGES_JSON
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
            self.failures = [line for line in lines if line[:1].strip()]
            if self.names is None and (self.path / PARTITION_JSON).is_file():
                self.names = read_client_names(self.path)
            self.stages = json.loads(stages.read_text()) if stages.is_file() else ()
        self.state = FINISHED if done else STOPPED if locked is False else RUNNING

    def _read_config(self) -> dict[str, str]:
        saved, found = read_mapping(self.path / CONFIG_YAML), {}
        for key in ("method.name", "data.name", "num_clients", "num_rounds", "seed"):
            value: Any = saved
            for name in key.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            found[key] = str(value.text if isinstance(value, Plain) else value)
        for key in ("num_clients", "num_rounds"):
            if not found[key].isdecimal() or int(found[key]) < 1:
                raise ValueError(
                    f"`{key}` (={shown(found[key])}) in {self.path / CONFIG_YAML} must be a number above 0."
                )
        return found

    @property
    def num_clients(self) -> int:
        """Clients of the federation."""
        return int(self.config["num_clients"])

    @property
    def num_rounds(self) -> int:
        """Rounds that the run is to have."""
        return int(self.config["num_rounds"])

    @property
    def done(self) -> int:
        """Rounds that are done."""
        return int(self.metrics.rows[-1]["round"]) if self.metrics.rows else 0

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the last rounds; None if nothing is known, or nothing left."""
        recent = [row["system/round_seconds"] for row in self.metrics.rows[-RECENT:] if "system/round_seconds" in row]
        left = self.num_rounds - self.done
        return left * statistics.mean(recent) if recent and left and self.state == RUNNING else None

    @property
    def stage(self) -> str:
        """Name of the stage of the next round (of a finished run: the last); empty if there is only one."""
        number = min(self.done + 1, self.num_rounds)
        return next((str(each["name"]) for each in self.stages if each["first"] <= number <= each["last"]), "")

    def series(self, tag: str) -> tuple[list[int], list[float]]:
        """Returns the rounds with a number for a metric, and these."""
        found = [(row["round"], row[tag]) for row in self.metrics.rows if row.get(tag) is not None]
        return [number for number, _ in found], [value for _, value in found]

    def clients(self) -> list[tuple[int, dict[str, float | None]]]:
        """Returns the clients that have been evaluated, the worst first, with their numbers of `COLUMNS`."""
        lists, number = self.metrics.lists, self.num_clients
        accuracy = lists.get("eval/client_accuracy", [])
        # Of more clients than are shown, those in lists of training differ from round to round.
        aligned = [tag for tag in COLUMNS if len(lists.get(tag, [])) == len(accuracy) and len(accuracy) == number]
        tags = aligned or ["eval/client_accuracy"]
        places = sorted((value, place) for place, value in enumerate(accuracy) if value is not None)
        return [(place * number // len(accuracy), {tag: lists[tag][place] for tag in tags}) for _, place in places]


def frame(seen: Watched, width: int, height: int, plain: bool = False) -> Group:
    """Returns one picture of a run.

    Args:
        seen: the run.
        width: columns of the terminal.
        height: its lines.
        plain: whether to draw with ASCII characters only.
    """
    lines: list[Text | Table] = [_head(seen, width, plain), _progress(seen, width, plain)]
    notes = _notes(seen, width, plain)
    curves = [(title, seen.series(tag)) for tag, title in CURVES.items()]
    curves = [each for each in curves if each[1][1]][: max(1, width // 75)]
    clients = seen.clients()
    room = height - len(lines) - sum(note.plain.count("\n") + 1 for note in notes) - 1
    rows = min(len(clients), max(3, room // 2 - 2)) if clients else 0
    tall = max(4, min(16, room - (rows + 2 if rows else 0) - 2))
    if curves:
        lines.append(_side_by_side(curves, width, tall, plain))
    if rows:
        lines.append(_client_table(clients, seen.names or {}, rows, width, plain))
    return Group(*lines, *notes)


def watch(path: Path, console: Console, once: bool = False) -> None:
    """Shows a run until it ends or Ctrl-C; where the output is no terminal, or with `once`, prints one picture.

    Args:
        path: the run's folder.
        console: where to.
        once: whether to print one picture.

    Raises:
        ValueError: see `Watched`.
    """
    seen = Watched(path)
    plain = not (console.encoding or "").lower().startswith("utf")

    def picture(height: int) -> Group:
        return frame(seen, console.width, height, plain)

    if once or not console.is_terminal or seen.state != RUNNING:
        console.print(picture(console.height))
        return
    try:
        with Live(picture(console.height - 1), console=console, screen=True, auto_refresh=False) as live:
            while seen.state == RUNNING:
                time.sleep(REFRESH)
                seen.look()
                live.update(picture(console.height - 1), refresh=True)
    except KeyboardInterrupt:
        say(console, "The run goes on; this was only the view of it.")
    console.print(picture(console.height))


def _head(seen: Watched, width: int, plain: bool) -> Text:
    config = seen.config
    method, data = shown(config["method.name"]), shown(config["data.name"])
    style = {RUNNING: "green", STOPPED: "bold red", FINISHED: "bold"}[seen.state]
    what = f"  {method} on {data}, {counted(seen.num_clients, 'client')}, seed {shown(config['seed'])}"
    text = Text.assemble((shown(seen.path.name, 60), "bold"), what, "  ", (seen.state, style))
    text.truncate(width, overflow="crop" if plain else "ellipsis")
    return text


def _progress(seen: Watched, width: int, plain: bool) -> Text:
    done, total = seen.done, seen.num_rounds
    parts = [f"round {done}/{total}"]
    if seen.stage:
        parts.append(f"stage: {shown(seen.stage, 30)}")
    spent = sum(row.get("system/round_seconds") or 0.0 for row in seen.metrics.rows)
    parts.append(f"{duration(spent)} in rounds")
    if seen.seconds_left is not None:
        parts.append(f"about {duration(seen.seconds_left)} left")
        if seen.age > 60:
            parts.append(f"last round {duration(seen.age)} ago")
    simulated = seen.series(SECONDS)[1]
    if simulated:
        parts.append(f"simulated time {duration(simulated[-1])}")
    text = "  ".join(parts)
    room = min(30, width - len(text) - 4)
    if room >= 8:
        full = round(room * done / max(1, total))
        text = f"[{('#' if plain else '█') * full}{('.' if plain else '░') * (room - full)}]  {text}"
    result = Text(text)
    result.truncate(width, overflow="crop" if plain else "ellipsis")
    return result


def _notes(seen: Watched, width: int, plain: bool) -> list[Text]:
    notes = []
    failed = int(sum(row.get("system/failed_clients") or 0 for row in seen.metrics.rows))
    if failed or seen.failures:
        last = f", the last: {shown(seen.failures[-1], 300)}" if seen.failures else ""
        note = Text(f"{max(failed, len(seen.failures))} failures of clients ({FAILURES_LOG}){last}", style="red")
        note.truncate(width, overflow="crop" if plain else "ellipsis")
        notes.append(note)
    if seen.state == STOPPED:
        out = "" if seen.path.parent == Path("runs") else f" --out {shlex.quote(str(seen.path.parent))}"
        again = f"fedlabel run --resume --name {shlex.quote(seen.path.name)}{out}"
        notes.append(
            Text(f"No process writes here and there is no {SUMMARY_JSON}: the run was killed, or failed.\n{again}")
        )
    if seen.state == FINISHED:
        accuracy = seen.series("eval/accuracy")[1]
        if accuracy:
            notes.append(Text(f"accuracy: last {accuracy[-1]:.4f}, best {max(accuracy):.4f}"))
    return notes


def _side_by_side(
    curves: Sequence[tuple[str, tuple[list[int], list[float]]]], width: int, height: int, plain: bool
) -> Table:
    grid = Table.grid(padding=(0, 1))
    each = width // len(curves) - 2
    grid.add_row(*("\n".join(plot(title, *series, each, height, plain)) for title, series in curves))
    return grid


def _client_table(
    clients: Sequence[tuple[int, Mapping[str, float | None]]],
    names: Mapping[int, str],
    rows: int,
    width: int,
    plain: bool,
) -> Table:
    """Returns the worst and the best clients, with their names if they have any."""
    labels = {client: client_label(client, names.get(client)) for client, _ in clients}
    tags = list(clients[0][1])
    table = Table(box=None, padding=(0, 2, 0, 0), title=None, show_edge=False)
    table.add_column("client", justify="left" if names else "right", no_wrap=True)
    for tag in tags:
        table.add_column(COLUMNS[tag], justify="right")
    table.add_column("")
    longest = max(map(len, labels.values()))
    bar = max(0, min(40, width - 14 * (len(tags) + 1) - max(0, longest - 6)))
    every = len(clients) <= rows
    best = 0 if every else max(1, (rows - 1) // 3)
    worst = len(clients) if every else rows - 1 - best

    def add(client: int, numbers: Mapping[str, float | None]) -> None:
        texts = ["" if value is None else f"{value:.3f}" for value in numbers.values()]
        table.add_row(
            Text(labels[client]),
            *texts,
            ("=" if plain else "▪") * round(bar * (numbers["eval/client_accuracy"] or 0.0)),
        )

    for each in clients[:worst]:
        add(*each)
    if not every:
        table.add_row("...", *[""] * len(tags), f"{len(clients) - worst - best} more")
        for each in clients[len(clients) - best :]:
            add(*each)
    return table


def plot(title: str, xs: Sequence[int], ys: Sequence[float], width: int, height: int, plain: bool) -> list[str]:
    """Returns a curve as `height` + 2 lines of text of at most `width` characters: a title, and rounds below.

    Args:
        title: over it.
        xs: rising.
        ys: as many; at least one.
        width: in characters.
        height: in lines, of the curve alone.
        plain: ASCII characters in place of Braille's, of which each has 2 x 4 dots.
    """
    low, high = min(ys), max(ys)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    labels = f"{high:.3g}", f"{low:.3g}"
    margin = max(map(len, labels)) + 1
    columns = max(4, width - margin - 1)
    wide, tall = (1, 1) if plain else (2, 4)
    cells = [[0] * columns for _ in range(height)]
    across, up = columns * wide - 1, height * tall - 1
    dots = [
        (round(across * (x - xs[0]) / max(1, xs[-1] - xs[0])), round(up * (high - y) / (high - low)))
        for x, y in zip(xs, ys, strict=True)
    ]
    for (x0, y0), (x1, y1) in zip(dots, [*dots[1:], dots[-1]], strict=True):
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for step in range(steps + 1):
            x, y = round(x0 + (x1 - x0) * step / steps), round(y0 + (y1 - y0) * step / steps)
            cells[y // tall][x // wide] |= _DOTS[y % tall][x % wide]
    edge = "|" if plain else "│"
    lines = [f"{title}: {ys[-1]:.4g}"[:width]]
    for number, row in enumerate(cells):
        label = labels[0] if number == 0 else labels[1] if number == height - 1 else ""
        text = "".join(("*" if cell else " ") if plain else chr(0x2800 + cell) if cell else " " for cell in row)
        lines.append(f"{label:>{margin - 1}} {edge}{text.rstrip()}")
    first, last = f"round {xs[0]}", str(xs[-1])
    gap = " " * max(1, columns - len(first) - len(last))
    lines.append(f"{'':{margin}} {first}{gap}{last}" if len(xs) > 1 else f"{'':{margin}} {first}")
    return lines


_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Line and column in a Braille character -> the bit of its dot."""
