"""Figures of a run, as `matplotlib.figure.Figure` objects: never pyplot, so no global state and no display.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; what a colour says is also said in words.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from fedlabel.record.files import write_atomic

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#777777",
)
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, "#000000")
KIND_COLORS = (SKY, RED, GREEN, ORANGE, "#F0E442", PURPLE, GREY, BLUE, "#000000")
"""Of the kinds of label, in their order."""
LINES = ("-", "--", "-.", ":")
DPI = 100
MAX_SAMPLES = 32
MAX_PATCHES = 100
"""Bars that are drawn one by one, with gaps; more are one area, which takes a hundredth of the time."""
MAX_BARS = 1_000
"""Bars of the accuracy of clients: of more clients, those at evenly spaced ranks are drawn."""
NUMBERED_CLASSES = 20
"""A confusion matrix of more classes shows colours only."""


def partition_figure(
    counts: np.ndarray,
    kinds: Sequence[str],
    class_names: Sequence[str],
    numbers: np.ndarray | None = None,
    num_clients: int | None = None,
    client_labels: Sequence[str] = (),
) -> Figure:
    """Plots samples per client and class, with and without supervision, and kinds of label per client.

    Args:
        counts: (kinds, clients, classes) samples; the first kind is "no label".
        kinds: a name for each; the second one is that of an ordinary label.
        class_names: one per class.
        numbers: (clients,) which ones they are; None: 0, 1, ...
        num_clients: how many there are; None: no others than these.
        client_labels: one per client, on the axis; empty: their numbers.
    """
    clients, classes = counts.shape[1:]
    total = clients if num_clients is None else num_clients
    names = list(map(plain, client_labels)) or list(map(str, range(clients) if numbers is None else numbers.tolist()))
    labels_alone = not counts[2:].any()
    # The kinds that occur; samples without supervision come last.
    shown = [1, 0] if labels_alone else [kind for kind in [*range(1, len(kinds)), 0] if counts[kind].any()]
    height = 1.4 + float(np.clip(0.24 * clients, 1.8, 9.0)) + 0.25 * (len(shown) > 2)
    panel = float(np.clip(0.34 * classes, 3.2, 7.0))
    figure = new_figure(2 * panel + 3.2, height)
    axes = figure.subplots(1, 3, sharey=True, width_ratios=[panel, panel, 2.4])
    numbered = clients <= 40 and classes <= 12
    titles = ("Labelled", "Unlabelled") if labels_alone else ("With supervision", "Without supervision")
    for axis, held, title in zip(axes[:2], (counts[1:].sum(0), counts[0]), titles, strict=True):
        # Square root: client sizes are skewed, and one large cell would leave all others equally pale.
        shades = PowerNorm(0.5, vmin=0, vmax=max(1, held.max()))
        image = axis.imshow(np.where(held > 0, held, np.nan), cmap=sequential(), norm=shades, aspect="auto")
        axis.set_title(f"{title}: {held.sum():,} samples")
        axis.set_xlabel("true class")
        class_ticks(axis, "x", class_names, panel)
        if numbered:
            _write_cells(axis, held, np.asarray(shades(held)), [[str(n) for n in row] for row in held])
        else:
            bar = figure.colorbar(image, ax=axis, pad=0.02, fraction=0.04, aspect=40)
            bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            bar.set_label("samples")
    _grid_between(axes[:2], clients, classes)
    left = np.zeros(clients)
    for kind in shown:
        name = ("unlabelled", "labelled")[kind] if labels_alone else kinds[kind]
        sizes = counts[kind].sum(1)
        if clients <= MAX_PATCHES:
            axes[2].barh(np.arange(clients), sizes, 0.8, left=left, color=KIND_COLORS[kind], label=name)
        else:
            edges, style = np.arange(clients + 1) - 0.5, {"color": KIND_COLORS[kind], "label": name, "fill": True}
            axes[2].stairs(left + sizes, edges, baseline=left, orientation="horizontal", **style)
        left = left + sizes
    axes[2].set_title("Per client")
    axes[2].set_xlabel("samples")
    axes[2].xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes[2].spines[["top", "right"]].set_visible(False)
    axes[2].set_ylim(clients - 0.5, -0.5)
    for axis in axes[1:]:
        axis.tick_params(left=False)
    axes[0].set_ylabel("client")
    axes[0].yaxis.set_major_locator(MaxNLocator(min(clients, 40 if clients <= 40 else 20), integer=True))
    if total > clients or client_labels:
        label = FuncFormatter(lambda place, _: names[int(place)] if 0 <= place < clients else "")
        axes[0].yaxis.set_major_formatter(label)
    if len(shown) <= 2:
        figure.legend(loc="outside upper right", ncols=2, frameon=False)
    else:
        figure.legend(loc="outside lower center", ncols=5, frameon=False)
    legend = "" if numbered else " (white: none)"
    who = f"{clients} clients" if total == clients else f"{clients:,} of {total:,} clients, evenly spaced"
    figure.suptitle(f"Who holds what: {who}, {classes} classes{legend}", x=0.01, ha="left")
    return figure


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Plots how the samples of each class are classified, in percent of the class; white: never.

    Args:
        confusion: (classes, classes) counts, row = truth, column = prediction.
        class_names: one per class.
    """
    classes = len(confusion)
    totals = confusion.sum(1, keepdims=True)
    share = np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)
    side = float(np.clip(0.46 * classes, 3.6, 8.5))
    figure = new_figure(side + 2.4, side + 1.4)
    axis = figure.subplots()
    shown = np.where(confusion > 0, 100 * share, np.nan)
    image = axis.imshow(shown, cmap=sequential(), vmin=0, vmax=100, aspect="auto")
    for row in np.flatnonzero(totals == 0).tolist() if classes <= NUMBERED_CLASSES else ():
        axis.text((classes - 1) / 2, row, "no samples", ha="center", va="center", fontsize=8, color=GREY)
    if classes <= NUMBERED_CLASSES:
        _write_cells(axis, confusion, share, [[_percent(cell) for cell in row] for row in share])
    _grid_between([axis], classes, classes)
    class_ticks(axis, "x", class_names, side)
    class_ticks(axis, "y", class_names, side)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    accuracy = np.trace(confusion) / max(1, confusion.sum())
    axis.set_title(f"Confusion, % of each true class (accuracy {100 * accuracy:.1f} %)")
    figure.colorbar(image, ax=axis, pad=0.02, fraction=0.04, aspect=30).set_label("% of the true class")
    return figure


def transition_figure(transition: np.ndarray, truth: np.ndarray | None, class_names: Sequence[str]) -> Figure:
    """Plots a noise matrix, next to the true one if it exists, in percent of the true class.

    Args:
        transition: (classes, classes), rows sum to 1: row = true class, column = noisy label.
        truth: of the same shape, or None; rows of NaN are unknown.
        class_names: one per class.
    """
    classes = len(transition)
    panels = {"learnt": transition, **({"true": truth} if truth is not None else {})}
    side = float(np.clip(0.46 * classes, 3.6, 8.5))
    figure = new_figure(side * len(panels) + 2.6, side + 1.6)
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True)).tolist()
    for axis, (name, matrix) in zip(axes, panels.items(), strict=True):
        image = axis.imshow(100 * matrix, cmap=sequential(), vmin=0, vmax=100, aspect="auto")
        if classes <= NUMBERED_CLASSES:
            texts = [[_percent(cell) for cell in row] for row in matrix]
            shares = np.nan_to_num(matrix)  # of an unknown row nothing is written
            _write_cells(axis, np.rint(1000 * shares), shares, texts)
        class_ticks(axis, "x", class_names, side)
        axis.set_xlabel("noisy label")
        axis.set_title(f"Noise matrix, {name}, %")
    _grid_between(axes, classes, classes)
    class_ticks(axes[0], "y", class_names, side)
    axes[0].set_ylabel("true class")
    figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04, aspect=30).set_label("% of the true class")
    return figure


def reliability_figure(bins: np.ndarray, title: str) -> Figure:
    """Plots accuracy against confidence, and the distribution of confidence.

    Args:
        bins: (3, bins) samples, sum of confidence and correct ones per equal-width bin, see `calibration_bins`.
        title: over the axes; the expected calibration error is added.
    """
    count, confidence, correct = bins
    used = count > 0
    width = 100 / len(count)
    places = width * (np.arange(len(count)) + 0.5)
    figure = new_figure(4.6, 4.8)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    accuracy = np.divide(100 * correct, count, out=np.zeros(len(count)), where=used)
    expected = np.divide(100 * confidence, count, out=np.zeros(len(count)), where=used)
    upper.bar(places[used], accuracy[used], 0.92 * width, color=SKY, zorder=2, label="right")
    upper.plot(expected[used], accuracy[used], "o", color=BLUE, markersize=4, zorder=4, label="at mean confidence")
    upper.plot([0, 100], [0, 100], "--", color="black", linewidth=1, zorder=3, label="calibrated")
    upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="right (%)")
    upper.legend(loc="upper left", frameon=False, fontsize="small")
    total = count.sum()
    lower.bar(places, 100 * count / max(1, total), 0.92 * width, color=GREY, zorder=2)
    lower.set(ylim=(0, None if total else 1), xlabel="confidence (%)", ylabel="share (%)")
    for axis in (upper, lower):
        axis.grid(True, color="#E5E5E5", zorder=0)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    error = f"ECE {100 * np.abs(correct - confidence).sum() / total:.1f} %" if total else "no samples"
    upper.set_title(f"{plain(title)}: {error}")
    return figure


def functions_figure(coverage: np.ndarray, accuracy: np.ndarray, estimated: np.ndarray) -> Figure:
    """Plots the true and the estimated accuracy of each labelling function on its votes.

    Args:
        coverage: (functions,) share of the samples that it votes on.
        accuracy: (functions,) share of its votes that are right, NaN where not known.
        estimated: (functions,) the label model's estimate; NaN where there is none.
    """
    figure = new_figure(4.8, 4.4)
    axis = figure.subplots()
    axis.plot([0, 100], [0, 100], "--", color="black", linewidth=1, zorder=3)
    shown = np.isfinite(accuracy) & np.isfinite(estimated)
    points = axis.scatter(
        100 * estimated[shown], 100 * accuracy[shown], c=100 * coverage[shown], cmap=sequential(), zorder=4, s=28
    )
    points.set_clim(0, None)
    points.set_edgecolor("black")
    points.set_linewidth(0.5)
    figure.colorbar(points, ax=axis, label="coverage (%)")
    axis.set(xlim=(0, 100), ylim=(0, 100), xlabel="right where it votes, estimated (%)", ylabel="in truth (%)")
    axis.grid(True, color="#E5E5E5", zorder=0)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{len(coverage)} labelling functions")
    return figure


def pseudo_label_panel(
    images: Tensor | np.ndarray,
    true_names: Sequence[str | None],
    pseudo_names: Sequence[str],
    experts: Sequence[str],
    confidences: Sequence[float],
    kept: Sequence[bool],
    title: str = "Pseudo-labels",
    notes: Sequence[str] = (),
) -> Figure:
    """Shows unlabelled samples with pseudo-label, the expert it comes from, its confidence, and whether it is used.

    Args:
        images: (samples, channels, height, width) uint8; the first 32 are shown.
        true_names: the true class of each, None where nobody knows it.
        pseudo_names: the pseudo-label of each.
        experts: "local" or "global", the model each pseudo-label comes from.
        confidences: the expert's confidence in each, in [0, 1].
        kept: whether each passed the confidence threshold.
        title: over the pictures; how many are kept and right is added.
        notes: a further line below each; empty: none.
    """
    shown = min(len(images), MAX_SAMPLES)
    columns = max(1, min(8, shown))
    rows = max(1, -(-shown // columns))
    figure = new_figure(max(5.5, 1.5 * columns), (2.4 if notes else 2.15) * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[shown:]:
        axis.set_axis_off()
    for i, axis in enumerate(axes[:shown]):
        pixels = np.asarray(images[i])
        gray = len(pixels) != 3
        picture = pixels[0] if gray else pixels.transpose(1, 2, 0)
        axis.imshow(picture, cmap="gray" if gray else None, vmin=0, vmax=255, alpha=1.0 if kept[i] else 0.45)
        true = true_names[i]
        wrong = true is not None and true != pseudo_names[i]
        color = GREY if not kept[i] else "black" if true is None else RED if wrong else BLUE
        truth = "\ntrue: unknown" if true is None else f"\n✗ true: {_name(true)}" if wrong else "\n✓ right"
        axis.set_title(
            f"{_name(pseudo_names[i])}{truth}",
            fontsize=9,
            fontweight="bold" if kept[i] else "normal",
            color=RED if wrong else "black",
            pad=4,
        )
        note = f"\n{plain(notes[i])}" if notes else ""
        axis.set_xlabel(f"{experts[i]} {confidences[i]:.2f}\n{'kept' if kept[i] else 'dropped'}{note}", fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color=color, linewidth=2.5 if kept[i] else 1.0, linestyle="-" if kept[i] else ":")
    used = [i for i in range(shown) if kept[i]]
    title = f"{plain(title)} (expert, its confidence): {len(used)} of {shown} kept"
    compared = [i for i in used if true_names[i] is not None]
    if compared:
        right = sum(true_names[i] == pseudo_names[i] for i in compared)
        title += f", {right} of {'them' if len(compared) == len(used) else f'{len(compared)} of known class'} right"
    figure.suptitle(textwrap.fill(title, int(13.5 * figure.get_figwidth())), fontsize=11)
    return figure


def client_accuracy_figure(accuracy: np.ndarray, labels: Sequence[str] = ()) -> Figure:
    """Plots the global model's accuracy on every client's share of the evaluation split, lowest first.

    Of more than `MAX_BARS` clients only so many are drawn, the worst and the best among them; the mean is over all.

    Args:
        accuracy: (clients,) in [0, 1]; NaN for a client without samples to evaluate on.
        labels: one per client; empty: their numbers.
    """
    names = list(map(plain, labels)) or list(map(str, range(len(accuracy))))
    evaluated = np.flatnonzero(np.isfinite(accuracy))
    order = evaluated[np.argsort(accuracy[evaluated], kind="stable")]
    mean = 100 * float(accuracy[order].mean()) if len(order) else 0.0
    if len(order) > MAX_BARS:  # from the worst client to the best
        order = order[np.arange(MAX_BARS) * (len(order) - 1) // (MAX_BARS - 1)]
    values = 100 * accuracy[order]
    figure = new_figure(float(np.clip(0.22 * len(values), 5.5, 9.0)), 3.6)
    axis = figure.subplots()
    missing = len(accuracy) - len(evaluated)
    axis.set_title("Accuracy per client" + (f" (left out: {missing} without samples)" if missing else ""))
    axis.set_ylabel("accuracy (%)")
    axis.set_ylim(0, 100)
    axis.spines[["top", "right"]].set_visible(False)
    if len(values) == 0:
        axis.text(0.5, 0.5, "no client has samples to evaluate on", ha="center", transform=axis.transAxes)
        axis.set(xticks=[], xlabel="client")
        return figure
    places = np.arange(len(values))
    few = len(values) <= 40
    if few:
        axis.bar(places, values, 0.8, color=SKY, zorder=2)
    else:
        axis.stairs(values, np.arange(len(values) + 1) - 0.5, color=SKY, zorder=2, fill=True)
    worst = f"worst: client {names[order[0]]}, {values[0]:.1f} %"
    if few:
        axis.bar(places[:1], values[:1], 0.8, color=RED, zorder=2, label=worst)
    else:
        axis.plot(places[:1], values[:1], "o", color=RED, zorder=4, clip_on=False, label=worst)
    axis.axhline(mean, color="black", linestyle="--", zorder=3, label=f"mean: {mean:.1f} %")
    axis.set_xlim(-0.6, len(values) - 0.4)
    if few:
        upright = len(values) > 20 or bool(labels)
        axis.set_xticks(places, [names[client] for client in order], fontsize=8, rotation=90 if upright else 0)
        axis.set_xlabel("client, worst first")
    else:
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        whose = f"{len(values)} clients"
        if len(values) < len(evaluated):
            whose = f"{len(values):,} of {len(evaluated):,} clients, at evenly spaced ranks"
        axis.set_xlabel(f"{whose}, worst first")
    axis.yaxis.grid(True, color="#DDDDDD", zorder=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def curves_figure(
    runs: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    title: str = "",
    y_label: str = "accuracy",
    x_label: str = "communication round",
    band: str = "minmax",
) -> Figure:
    """Compares methods: a line for the mean over seeds, and a band around it.

    Args:
        runs: label -> one (rounds, values) per seed; only the rounds that all its seeds have are drawn.
        title: over the axes.
        y_label: what the values are.
        x_label: what the rounds are.
        band: "minmax" from the lowest to the highest seed, "sd" for mean ± standard deviation (n - 1); a single seed
            has none.

    Raises:
        ValueError: another band, or a label without seeds or without a common round.
    """
    if band not in ("minmax", "sd"):
        raise ValueError(f"`band` (={band}) must be one of minmax, sd.")
    below = len(runs) > 4  # a long legend would hide the lines
    figure = new_figure(6.8, 4.2 + 0.2 * -(-len(runs) // 2) * below)
    axis = figure.subplots()
    for place, (label, seeds) in enumerate(runs.items()):
        tables = [dict(zip(rounds, values, strict=True)) for rounds, values in seeds]
        common = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
        if not common:
            raise ValueError(f"`runs[{label!r}]` must hold at least one seed, and a round that all of its seeds have.")
        values = np.array([[table[x] for x in common] for table in tables], dtype=np.float64)
        mean = values.mean(0)
        color, line = CYCLE[place % len(CYCLE)], LINES[place // len(CYCLE) % len(LINES)]
        text = f"{plain(label)} (n={len(values)})"
        axis.plot(common, mean, line, color=color, linewidth=1.8, label=text, marker="o" if len(common) == 1 else None)
        if len(values) > 1:
            spread = values.std(0, ddof=1)
            low, high = (values.min(0), values.max(0)) if band == "minmax" else (mean - spread, mean + spread)
            axis.fill_between(common, low, high, color=color, alpha=0.18, linewidth=0)
    shown = "band: lowest to highest seed" if band == "minmax" else "band: mean ± sd over seeds"
    several = any(len(seeds) > 1 for seeds in runs.values())
    axis.set_title(plain(title))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel(plain(x_label))
    axis.set_ylabel(plain(y_label))
    axis.grid(True, color="#E5E5E5")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(loc="outside lower center", ncols=2) if below else axis.legend()
    legend.set(frame_on=False, title=shown if several else None)
    for written in (legend.get_title(), *legend.get_texts()):
        written.set_fontsize("small")
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    write_atomic(path, buffer.getvalue())


def svg_bytes(figure: Figure) -> bytes:
    """Returns a figure as SVG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "fedlabel"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of a size in inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def sequential() -> Colormap:
    """White to dark blue without the palest part, so that one sample is distinguishable from none (white)."""
    return LinearSegmentedColormap.from_list("blues", colormaps["Blues"](np.linspace(0.18, 1.0, 256)))


def _write_cells(axis: Axes, counts: np.ndarray, shade: np.ndarray, texts: list[list[str]]) -> None:
    for row, column in np.argwhere(counts > 0).tolist():
        color = "white" if shade[row, column] > 0.55 else "black"
        text = texts[row][column]
        axis.text(column, row, text, ha="center", va="center", fontsize=7.5, color=color)


def _grid_between(axes: Sequence[Axes], rows: int, columns: int) -> None:
    """Draws hairlines between cells that are large enough for it."""
    for axis in axes:
        axis.spines[:].set_color("#BBBBBB")
        if rows <= 40 and columns <= 40:
            axis.set_xticks(np.arange(0.5, columns - 1), minor=True)
            axis.set_yticks(np.arange(0.5, rows - 1), minor=True)
            axis.grid(True, which="minor", color="#E5E5E5", linewidth=0.6)
            axis.tick_params(which="minor", length=0)


def class_ticks(axis: Axes, side: str, class_names: Sequence[str], inches: float) -> None:
    """Labels the classes along an axis, every one of them if they fit, else every second, third, ..."""
    step = max(1, int(np.ceil(len(class_names) * 0.15 / inches)))
    places = range(0, len(class_names), step)
    names = [_name(class_names[i]) for i in places]
    if side == "y":
        axis.set_yticks(places, names, fontsize=8)
        return
    longest = max(map(len, names), default=0)
    upright = longest * 0.09 > step * inches / max(1, len(class_names))
    axis.set_xticks(places, names, fontsize=8, rotation=90 if upright else 0)


def _percent(share: float) -> str:
    return "<1" if 0 < share < 0.01 else f"{100 * share:.0f}"


def _name(text: str) -> str:
    """Shortens a class name to fit next to a picture or under a column; names often differ at their end."""
    return plain(text if len(text) <= 14 else f"{text[:8]}…{text[-5:]}")


def plain(text: str) -> str:
    """Escapes dollar signs, which matplotlib reads as mathematics."""
    return text.replace("$", r"\$")
