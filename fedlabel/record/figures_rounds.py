"""Figures of clients and classes over the rounds, see `figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from fedlabel.record.figures import BLUE, GREEN, GREY, ORANGE, class_ticks, new_figure, sequential

MAX_CLIENTS = 40
"""Clients with a small chart each; of more, those at evenly spaced ranks."""
STYLES: Mapping[str, tuple[str, Literal["-", "--", ":", "-."], float]] = {
    "accuracy": (BLUE, "-", 1.8),
    "coverage": (ORANGE, "--", 1.4),
    "from global": (GREEN, ":", 1.6),
    "loss": (GREY, "-.", 1.2),
}
"""Of a curve: colour, dashes, width."""


def clients_over_rounds_figure(
    rounds: np.ndarray, values: Mapping[str, np.ndarray], numbers: np.ndarray, num_clients: int
) -> Figure:
    """Plots a small chart for each client, the one of the lowest last accuracy first.

    Args:
        rounds: (n,) rising.
        values: name (see `STYLES`) -> (n, clients), NaN where there is no number: the rounds in which a client did not
            train. Shares in [0, 1], but "loss", which is drawn up to its 95th percentile. "accuracy" must be there.
        numbers: (clients,) which ones they are.
        num_clients: how many there are in the federation.
    """
    last = _last(values["accuracy"])
    order = np.flatnonzero(np.isfinite(last))
    order = order[np.argsort(last[order], kind="stable")]
    evaluated = len(order)
    if evaluated > MAX_CLIENTS:
        order = order[np.arange(MAX_CLIENTS) * (evaluated - 1) // (MAX_CLIENTS - 1)]
    columns = int(np.clip(np.ceil(np.sqrt(1.4 * len(order))), 1, 8))
    rows = max(1, -(-len(order) // columns))
    figure = new_figure(max(5.5, 1.18 * columns + 0.3), 0.98 * rows + 1.0)
    axis = figure.subplots()
    axis.set(xlim=(-0.02, columns), ylim=(rows, 0))
    axis.set_axis_off()
    span = max(1, rounds[-1] - rounds[0]) if len(rounds) else 1
    across = (rounds - rounds[0]) / span if len(rounds) else np.zeros(0)
    scales, handles = _scales(values), []
    for name, (color, dashes, width) in STYLES.items():
        if name not in values or not np.isfinite(values[name]).any():
            continue
        lines = []
        for place, client in enumerate(order.tolist()):
            known = np.isfinite(values[name][:, client])
            height = np.clip(values[name][known, client] / scales[name], 0, 1)
            left, top = place % columns, place // columns
            lines.append(np.column_stack([left + 0.9 * across[known], top + 0.94 - 0.68 * height]))
        axis.add_collection(LineCollection(lines, colors=color, linestyles=dashes, linewidths=width, zorder=3))
        # One number is no line.
        dots = np.concatenate([line for line in lines if len(line) == 1] or [np.empty((0, 2))])
        axis.plot(dots[:, 0], dots[:, 1], "o", color=color, markersize=3, zorder=4)
        label = f"{name} (top: {scales[name]:.2g})" if name == "loss" else name
        handles.append(Line2D([], [], color=color, linestyle=dashes, linewidth=width, label=label))
    for place, client in enumerate(order.tolist()):
        left, top = place % columns, place // columns
        axis.add_patch(Rectangle((left, top + 0.26), 0.9, 0.68, fill=False, edgecolor="#BBBBBB", linewidth=0.7))
        text = f"{numbers[client]}: {100 * last[client]:.0f} %"
        axis.text(left, top + 0.21, text, fontsize=8, color="black" if last[client] > 0 else GREY)
    whose = (
        f"{evaluated} clients" if evaluated == len(order) else f"{len(order)} of {evaluated:,} clients, evenly spaced"
    )
    whose += f" (of {num_clients:,})" if num_clients > evaluated else ""
    first, final = (rounds[0], rounds[-1]) if len(rounds) else (0, 0)
    title = (
        f"Clients over rounds {first}–{final}, worst first: {whose}\nclient: last accuracy; each box from 0 to 100 %"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    else:
        axis.text(columns / 2, rows / 2, "no client has been evaluated", ha="center")
    return figure


def classes_over_rounds_figure(
    rounds: np.ndarray, values: Mapping[str, np.ndarray], class_names: Sequence[str]
) -> Figure:
    """Plots shares per class over the rounds as colours, a panel for each kind; white: no number.

    Args:
        rounds: (n,) rising.
        values: title -> (n, classes) in [0, 1], NaN where there is no number.
        class_names: one per class.
    """
    classes = len(class_names)
    side = float(np.clip(0.26 * classes, 2.2, 8.0))
    figure = new_figure(3.4 * len(values) + 1.6, side + 1.3)
    axes = np.atleast_1d(figure.subplots(1, len(values), sharey=True)).tolist()
    image = None
    for axis, (title, matrix) in zip(axes, values.items(), strict=True):
        known = np.isfinite(matrix).any(1)
        shown = 100 * matrix[known].T if known.any() else np.full((classes, 1), np.nan)
        image = axis.imshow(shown, cmap=sequential(), vmin=0, vmax=100, aspect="auto", interpolation="nearest")
        places = np.unique(np.linspace(0, max(0, known.sum() - 1), 5).round().astype(int))
        axis.set_xticks(places, [str(number) for number in rounds[known][places]] if known.any() else [""])
        axis.set(title=title, xlabel="round")
        axis.spines[:].set_color("#BBBBBB")
    class_ticks(axes[0], "y", class_names, side)
    axes[0].set_ylabel("true class")
    assert image is not None, "no panel"
    figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04, aspect=30).set_label("%")
    return figure


def _last(values: np.ndarray) -> np.ndarray:
    """Returns the last finite number of each column of (n, m) values, NaN of a column without any."""
    result = np.full(values.shape[1], np.nan)
    for row in values:
        known = np.isfinite(row)
        result[known] = row[known]
    return result


def _scales(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    scales = dict.fromkeys(values, 1.0)
    if "loss" in values and np.isfinite(values["loss"]).any():
        scales["loss"] = max(1e-9, float(np.nanpercentile(values["loss"], 95)))
    return scales
