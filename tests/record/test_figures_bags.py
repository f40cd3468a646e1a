"""The figure of bags: predicted against counted shares."""

from __future__ import annotations

import numpy as np

from fedlabel.record.figures_bags import MAX_BAGS, bags_figure
from tests.record.test_figures_rounds import drawn


def test_two_classes_show_the_second() -> None:
    """Errors of 25 and 10 points, of both classes alike."""
    predicted, counted = np.array([[0.5, 0.5], [0.6, 0.4]]), np.array([[0.25, 0.75], [0.5, 0.5]])
    axis = drawn(bags_figure(predicted, counted, ["no", "yes"])).axes[0]
    (points,) = axis.collections
    np.testing.assert_allclose(points.get_offsets(), [[75, 50], [50, 40]])
    assert points.get_label() == "yes"
    assert axis.get_title() == "2 bags of the evaluation split: error 17.5 points"


def test_several_classes_have_a_colour_each_and_many_have_one() -> None:
    few = drawn(bags_figure(np.full((2, 3), 1 / 3), np.full((2, 3), 1 / 3), ["a", "b", "c"])).axes[0]
    assert [points.get_label() for points in few.collections] == ["a", "b", "c"]
    (many,) = drawn(bags_figure(np.full((2, 10), 0.1), np.full((2, 10), 0.1), list("abcdefghij"))).axes[0].collections
    assert len(many.get_offsets()) == 20


def test_of_many_bags_some_are_drawn() -> None:
    counted = np.tile([0.0, 1.0], (3 * MAX_BAGS, 1))
    axis = drawn(bags_figure(counted, counted, ["no", "yes"])).axes[0]
    assert len(axis.collections[0].get_offsets()) == MAX_BAGS
    assert axis.get_title().startswith("2,000 of 6,000 bags")
