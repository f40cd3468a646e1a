"""Figures of bags, of which only the counts of the classes are known; see `figures`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedlabel.record.figures import BLUE, CYCLE, new_figure, plain

MAX_BAGS = 2_000
"""Bags that are drawn: of more, evenly spaced ones; the error is over all."""
NAMED_CLASSES = 6
"""With more classes all have one colour."""


def bags_figure(predicted: np.ndarray, counted: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Plots the share of a class that the model predicts in a bag against the share that was counted.

    Of two classes only the second is drawn, as the shares of the first are the rest.

    Args:
        predicted: (bags, classes) mean probability of each class over a bag's samples.
        counted: (bags, classes) shares from the bags' counts.
        class_names: one per class.
    """
    bags, classes = counted.shape
    error = 100 * float(np.abs(predicted - counted).mean())
    drawn = np.arange(min(bags, MAX_BAGS)) * bags // min(bags, MAX_BAGS)
    figure = new_figure(4.8, 4.9)
    axis = figure.subplots()
    axis.plot([0, 100], [0, 100], "--", color="black", linewidth=1, zorder=3, label="as counted")
    style: dict[str, Any] = {"alpha": 0.5, "s": 18, "edgecolors": "none", "zorder": 2}
    if classes == 2:
        axis.scatter(
            100 * counted[drawn, 1], 100 * predicted[drawn, 1], color=BLUE, label=plain(class_names[1]), **style
        )
    elif classes <= NAMED_CLASSES:
        for place, name in enumerate(class_names):
            shares = 100 * counted[drawn, place], 100 * predicted[drawn, place]
            axis.scatter(*shares, color=CYCLE[place], label=plain(name), **style)
    else:
        axis.scatter(100 * counted[drawn].ravel(), 100 * predicted[drawn].ravel(), color=BLUE, label="a class", **style)
    axis.set(xlim=(-2, 102), ylim=(-2, 102), xlabel="share in a bag, counted (%)", ylabel="predicted (%)")
    axis.grid(True, color="#E5E5E5", zorder=0)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    shown = f"{len(drawn):,} of {bags:,} bags" if len(drawn) < bags else f"{bags:,} bags"
    axis.set_title(f"{shown} of the evaluation split: error {error:.1f} points")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure
