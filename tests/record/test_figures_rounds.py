"""Figures over the rounds and of pseudo-labels: what they say, and inputs without anything to show."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from fedlabel.record.figures_pseudo import experts_figure, precision_coverage_figure
from fedlabel.record.figures_rounds import MAX_CLIENTS, classes_over_rounds_figure, clients_over_rounds_figure

NAN = np.nan


def drawn(figure: Figure) -> Figure:
    FigureCanvasAgg(figure).draw()
    return figure


def test_clients_stand_from_the_worst_to_the_best_by_their_last_number() -> None:
    accuracy = np.array([[0.9, 0.2, NAN], [0.5, NAN, NAN], [0.8, 0.3, NAN]])
    loss = np.array([[NAN, 4.0, NAN], [2.0, NAN, NAN], [NAN, 1.0, NAN]])
    values = {"accuracy": accuracy, "loss": loss}
    figure = drawn(clients_over_rounds_figure(np.array([1, 2, 5]), values, np.array([0, 7, 9]), 10))
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == ["7: 30 %", "0: 80 %"]
    assert "rounds 1–5, worst first: 2 clients (of 10)" in str(figure.get_suptitle())
    lines = [line for each in axis.collections if isinstance(each, LineCollection) for line in each.get_segments()]
    np.testing.assert_allclose(lines[0], [[0, 0.94 - 0.68 * 0.2], [0.9, 0.94 - 0.68 * 0.3]])
    np.testing.assert_allclose(lines[1][:, 0], [1, 1 + 0.9 / 4, 1.9])


def test_of_many_clients_those_at_even_ranks_are_shown() -> None:
    accuracy = np.arange(1000.0)[None, ::-1] / 1000
    figure = drawn(clients_over_rounds_figure(np.array([3]), {"accuracy": accuracy}, np.arange(1000), 5000))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert len(texts) == MAX_CLIENTS
    assert (texts[0], texts[-1]) == ("999: 0 %", "0: 100 %")
    assert "40 of 1,000 clients, evenly spaced (of 5,000)" in str(figure.get_suptitle())


def test_a_panel_of_classes_has_only_the_rounds_with_numbers() -> None:
    accuracy = np.array([[NAN, NAN], [0.5, 1.0], [NAN, NAN], [0.0, NAN]])
    nothing = np.full((4, 2), NAN)
    figure = drawn(classes_over_rounds_figure(np.arange(1, 5), {"Accuracy": accuracy, "x": nothing}, ["a", "b"]))
    shown = figure.axes[0].images[0].get_array()
    assert shown is not None
    np.testing.assert_array_equal(np.ma.filled(shown, NAN), [[50, 0], [100, NAN]])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["2", "4"]


def test_experts_add_up_to_what_was_drawn() -> None:
    """Of 10 of class 0: local 4, 3 of them right, global 2, 1 right, 4 dropped; of class 1 none."""
    kept, correct = np.array([[4.0, 2.0], [0.0, 0.0]]), np.array([[3.0, 1.0], [0.0, 0.0]])
    figure = drawn(experts_figure(np.array([10.0, 0.0]), kept, correct, ["a", "b"]))
    (axis,) = figure.axes
    widths = [bar.get_width() for container in axis.containers for bar in container[:1]]  # type: ignore[attr-defined]
    assert widths == pytest.approx([30, 10, 10, 10, 40])
    assert [text.get_text() for text in axis.texts] == ["none drawn"]
    assert "33 % of the used ones from the global model" in axis.get_title()


def test_precision_and_coverage_begin_with_the_most_confident() -> None:
    """Two bins: of 4 below one half 1 is right, of 6 above 5 are."""
    bins = np.array([[4.0, 6.0], [1.2, 5.0], [1.0, 5.0]])
    line, run = drawn(precision_coverage_figure(bins, 6, 5)).axes[0].lines
    np.testing.assert_allclose(line.get_xydata(), [[60, 100 * 5 / 6], [100, 60]])
    np.testing.assert_allclose(run.get_xydata(), [[60, 100 * 5 / 6]])
    empty = drawn(precision_coverage_figure(np.zeros((3, 2)), 0, 0))
    assert "no samples" in empty.axes[0].get_title()
