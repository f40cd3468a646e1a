"""Figures of pseudo-labels: which model they come from, and what a threshold on confidence costs; see `figures`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fedlabel.record.figures import BLUE, GREY, ORANGE, RED, class_ticks, new_figure


def experts_figure(drawn: np.ndarray, kept: np.ndarray, correct: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Plots for each true class which model its pseudo-labels come from, and whether they are right.

    Args:
        drawn: (classes,) unlabelled samples that were drawn.
        kept: (classes, 2) of these with a pseudo-label of the local and of the global model that is used.
        correct: (classes, 2) of these the right ones.
        class_names: one per class.
    """
    classes = len(drawn)
    share = 100 / np.maximum(drawn, 1)
    height = float(np.clip(0.3 * classes, 2.2, 9.0))
    figure = new_figure(7.6, height + 1.5)
    axis = figure.subplots()
    left = np.zeros(classes)
    places = np.arange(classes)
    for expert, color in ((0, BLUE), (1, ORANGE)):
        name = ("local", "global")[expert]
        for count, hatch, what in ((correct[:, expert], None, "right"), ((kept - correct)[:, expert], "////", "wrong")):
            bars = axis.barh(places, share * count, 0.8, left=left, label=f"{name} model, {what}", linewidth=0.8)
            for bar in bars:
                bar.set(facecolor="white" if hatch else color, edgecolor=color, hatch=hatch)
            left = left + share * count
    axis.barh(places, np.where(drawn > 0, 100 - left, 0), 0.8, left=left, color="#E5E5E5", label="dropped")
    for place in np.flatnonzero(drawn == 0).tolist():
        axis.text(1, place, "none drawn", va="center", fontsize=8, color=GREY)
    axis.set(xlim=(0, 100), ylim=(classes - 0.5, -0.5), xlabel="unlabelled samples drawn (%)", ylabel="true class")
    class_ticks(axis, "y", class_names, height)
    axis.spines[["top", "right"]].set_visible(False)
    total = kept.sum()
    whole = (
        f"{100 * kept[:, 1].sum() / total:.0f} % of the used ones from the global model" if total else "none is used"
    )
    axis.set_title(f"Which model labels which class: {whole}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def precision_coverage_figure(bins: np.ndarray, kept: float, correct: float) -> Figure:
    """Plots what share of the pseudo-labels would be right, and what share used, for thresholds on confidence.

    Args:
        bins: (3, bins), see `calibration_bins`, over all draws.
        kept: how many of them are used.
        correct: how many of these are right.
    """
    count, _, right = bins[:, ::-1]
    total = count.sum()
    figure = new_figure(4.8, 4.0)
    axis = figure.subplots()
    used = count.cumsum() > 0
    coverage = 100 * count.cumsum()[used] / max(1, total)
    precision = 100 * right.cumsum()[used] / np.maximum(1, count.cumsum()[used])
    thresholds = (1 - np.arange(1, len(count) + 1) / len(count))[used]
    axis.plot(coverage, precision, "o-", color=BLUE, markersize=4, label="used above a confidence")
    named: list[int] = []
    for place in sorted({0, len(coverage) // 2, len(coverage) - 1}) if len(coverage) else ():
        if named and coverage[place] - coverage[named[-1]] < 10:  # one text would lie over the other
            continue
        named.append(place)
        side = {"xytext": (-6, -10), "ha": "right"} if coverage[place] > 85 else {"xytext": (4, 6)}
        text, point = f"≥ {thresholds[place]:.2f}", (coverage[place], precision[place])
        axis.annotate(text, point, textcoords="offset points", fontsize=8, **side)
    if kept:
        label = f"this run: {100 * kept / total:.0f} % used, {100 * correct / kept:.1f} % of these right"
        axis.plot(100 * kept / total, 100 * correct / kept, "D", color=RED, markersize=7, label=label)
    axis.set(
        xlim=(0, 101),
        ylim=(min(80.0, *precision, 100 * correct / max(1, kept)) - 1 if len(precision) else 0, 101),
        xlabel="coverage: used (%)",
        ylabel="precision: right of these (%)",
    )
    axis.set_title("Precision and coverage of pseudo-labels" if total else "Precision and coverage: no samples")
    axis.grid(True, color="#E5E5E5")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, fontsize="small")
    return figure
