from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from fedlabel.record.figures import (
    client_accuracy_figure,
    confusion_figure,
    curves_figure,
    partition_figure,
    pseudo_label_panel,
    reliability_figure,
    save_png,
    svg_bytes,
    transition_figure,
)

NAMES = ["cat", "dog", "horse"]


def texts(figure: Figure) -> set[str]:
    """All texts that are drawn: titles, labels, ticks, legends, cells."""
    figure.canvas.draw()
    return {text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text") and a.get_visible())}


def png_shape(figure: Figure) -> tuple[int, ...]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    pixels = imread(buffer)
    assert pixels.std() > 0.01, "a blank picture"
    return pixels.shape


KINDS = ("nothing", "label", "candidates", "bag")


def held(*kinds):
    """Returns (kinds, clients, classes) counts: the first kinds are given, nobody has the others."""
    return np.stack([*kinds, *[np.zeros_like(kinds[0])] * (len(KINDS) - len(kinds))])


def test_partition_shows_labelled_and_unlabelled_apart():
    labeled, unlabeled = np.array([[2, 0, 1], [0, 4, 0]]), np.array([[30, 0, 0], [0, 77, 9]])
    figure = partition_figure(held(unlabeled, labeled), KINDS, NAMES)
    shown = texts(figure)
    assert {"Labelled: 7 samples", "Unlabelled: 116 samples", "Per client"} <= shown
    assert {"Who holds what: 2 clients, 3 classes", "client", "true class", "samples"} <= shown
    assert {"labelled", "unlabelled"} <= shown
    assert not {*KINDS} & shown
    assert {*NAMES, "2", "1", "4", "30", "77", "9"} <= shown
    left, right, bars = figure.axes
    for axis, counts in ((left, labeled), (right, unlabeled)):
        assert {t.get_text(): t.get_position()[::-1] for t in axis.texts} == {
            str(counts[place]): place for place in zip(*np.nonzero(counts), strict=True)
        }
    assert [bar.get_width() for bar in bars.patches] == [3, 4, 30, 86]


def test_partition_shows_kinds_of_label_per_client():
    """Bags count as known; a kind that nobody has is not in the legend."""
    nothing, label, bag = np.array([[30, 0], [0, 7]]), np.array([[2, 1], [0, 0]]), np.array([[0, 0], [40, 5]])
    figure = partition_figure(np.stack([nothing, label, 0 * bag, bag]), KINDS, NAMES[:2])
    shown = texts(figure)
    assert {"With supervision: 48 samples", "Without supervision: 37 samples", "label", "bag", "nothing"} <= shown
    assert not {"candidates", "labelled"} & shown
    known, unknown, bars = figure.axes
    assert {t.get_text() for t in known.texts} == {"2", "1", "40", "5"}
    assert {t.get_text() for t in unknown.texts} == {"30", "7"}
    assert [bar.get_width() for bar in bars.patches] == [3, 0, 0, 45, 30, 7]
    assert [bar.get_x() for bar in bars.patches] == [0, 0, 3, 0, 3, 45]
    png_shape(figure)


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (5, 62), (100, 10), (100, 62), (1000, 10)])
@pytest.mark.parametrize("kinds", [2, 4])
def test_partition_stays_of_bounded_size(clients, classes, kinds):
    counts = np.random.default_rng(0).integers(0, 50, (kinds, clients, classes))
    figure = partition_figure(held(*counts), KINDS, [f"class {i}" for i in range(classes)])
    height, width, _ = png_shape(figure)
    assert 250 <= height <= 1100
    assert 600 <= width <= 1800
    assert len(figure.axes[0].get_yticks()) <= 45


def test_partition_without_unlabelled_samples():
    counts = np.ones((4, 3), dtype=int)
    figure = partition_figure(held(0 * counts, counts), KINDS, NAMES)
    assert {"Unlabelled: 0 samples", "unlabelled"} <= texts(figure)
    png_shape(figure)


def test_partition_of_some_clients_says_which_and_of_how_many():
    counts = np.ones((200, 3), dtype=int)
    figure = partition_figure(held(counts, counts), KINDS, NAMES, np.arange(200) * 50, 10_000)
    figure.canvas.draw()
    assert "Who holds what: 200 of 10,000 clients, evenly spaced, 3 classes (white: none)" in texts(figure)
    ticks = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert {"0", "1000", "5000"} <= set(ticks), "their numbers, not their places"
    assert "Who holds what: 200 clients, 3 classes (white: none)" in texts(partition_figure(held(counts), KINDS, NAMES))


def test_partition_of_many_clients_has_an_area_per_kind_and_not_a_bar_per_client():
    labeled = np.arange(300).reshape(100, 3)
    labeled = np.concatenate([labeled, labeled[:1]])
    bars = partition_figure(held(labeled, 2 * labeled), KINDS, NAMES).axes[2]
    first, second = (patch.get_data() for patch in bars.patches)
    assert first.values.tolist() == (2 * labeled).sum(1).tolist()
    assert (second.values - second.baseline).tolist() == labeled.sum(1).tolist()
    assert second.baseline.tolist() == first.values.tolist()


def test_confusion_is_in_percent_of_the_true_class():
    """Of 4 cats 3 are found: 75 and 25 %. Of 1,000 dogs 1 is taken for a cat: <1 %. There is no horse."""
    figure = confusion_figure(np.array([[3, 1, 0], [1, 999, 0], [0, 0, 0]]), NAMES)
    axis = figure.axes[0]
    cells = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axis.texts}
    assert cells == {(2, 1.0): "no samples", (0, 0): "75", (0, 1): "25", (1, 0): "<1", (1, 1): "100"}
    assert {*NAMES, "true class", "predicted class"} <= texts(figure)
    assert "accuracy 99.8 %" in axis.get_title()  # 1002 of 1004
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "first class on top"


@pytest.mark.parametrize(("classes", "numbered"), [(2, True), (20, True), (21, False), (100, False)])
def test_confusion_has_numbers_where_they_fit(classes, numbered):
    figure = confusion_figure(np.eye(classes, dtype=int), [f"class {i}" for i in range(classes)])
    assert len(figure.axes[0].texts) == (classes if numbered else 0)
    height, width, _ = png_shape(figure)
    assert max(height, width) <= 1200


def panel(count: int, true_names: list[str | None], channels: int = 1) -> Figure:
    images = torch.randint(0, 256, (count, channels, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    return pseudo_label_panel(
        images,
        true_names,
        [NAMES[i % 3] for i in range(count)],
        ["local" if i % 2 else "global" for i in range(count)],
        [0.5 + i / 100 for i in range(count)],
        [i != 1 for i in range(count)],
    )


def test_panel_captions():
    figure = panel(3, ["cat", "dog", "dog"])
    assert [axis.get_title() for axis in figure.axes] == ["cat\n✓ right", "dog\n✓ right", "horse\n✗ true: dog"]
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "global 0.50\nkept",
        "local 0.51\ndropped",
        "global 0.52\nkept",
    ]
    assert figure.get_suptitle().endswith("2 of 3 kept, 1 of them right")
    right, dropped, wrong = (axis.spines["left"].get_edgecolor() for axis in figure.axes)
    assert len({right, dropped, wrong}) == 3
    png_shape(figure)


def test_panel_without_truth_judges_nothing():
    figure = panel(3, [None] * 3, channels=3)
    assert [axis.get_title() for axis in figure.axes] == [f"{name}\ntrue: unknown" for name in NAMES]
    assert figure.get_suptitle().endswith("2 of 3 kept")
    png_shape(figure)


def test_panel_counts_only_what_somebody_knows():
    figure = panel(4, ["cat", None, None, "dog"])
    assert figure.get_suptitle().endswith("3 of 4 kept, 1 of 2 of known class right")
    unknown, wrong = (figure.axes[place].spines["left"].get_edgecolor() for place in (2, 3))
    assert unknown != wrong


def test_panel_shows_the_picture_itself():
    images = np.zeros((1, 3, 2, 2), dtype=np.uint8)
    images[0, :, 0, 1] = (10, 20, 30)  # row 0, column 1
    figure = pseudo_label_panel(images, [None], ["cat"], ["local"], [1.0], [True])
    assert figure.axes[0].images[0].get_array()[0, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize("count", [0, 1, 9, 32, 50])
def test_panel_of_any_size(count):
    figure = panel(count, ["cat"] * count)
    assert sum(bool(axis.get_title()) for axis in figure.axes) == min(count, 32)
    figure.canvas.draw()


def test_client_accuracy_is_sorted_with_mean_and_worst():
    figure = client_accuracy_figure(np.array([0.9, np.nan, 0.3, 0.6]))
    axis = figure.axes[0]
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([30, 60, 90, 30])  # the worst once more, in red
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["2", "3", "0"]
    assert {"mean: 60.0 %", "worst: client 2, 30.0 %", "Accuracy per client (left out: 1 without samples)"} <= texts(
        figure
    )
    png_shape(figure)


def test_reliability_shows_accuracy_over_confidence():
    """Four bins; two samples of mean confidence 0.6 that are right, two of 0.9 of which one is: |2 - 1.2| + |1 - 1.8|
    = 1.6 over four samples, 40 %."""
    figure = reliability_figure(np.array([[0, 0, 2, 2], [0, 0, 1.2, 1.8], [0, 0, 2, 1]]), "Round 3")
    upper, lower = figure.axes
    assert [bar.get_x() + bar.get_width() / 2 for bar in upper.patches] == pytest.approx([62.5, 87.5])
    assert [bar.get_height() for bar in upper.patches] == [100, 50]
    assert upper.lines[0].get_xydata().tolist() == [[60, 100], [90, 50]]
    assert [bar.get_height() for bar in lower.patches] == [0, 0, 50, 50]
    assert {"Round 3: ECE 40.0 %", "calibrated", "confidence (%)", "right (%)", "share (%)"} <= texts(figure)
    png_shape(figure)


def test_reliability_without_samples():
    figure = reliability_figure(np.zeros((3, 15)), "Round 1")
    assert "Round 1: no samples" in texts(figure)
    png_shape(figure)


@pytest.mark.parametrize("clients", [1, 41, 1000])
def test_client_accuracy_of_any_size(clients):
    figure = client_accuracy_figure(np.linspace(1, 0, clients))
    assert any(text.startswith(f"worst: client {clients - 1}") for text in texts(figure))
    assert png_shape(figure)[1] <= 1000


def test_client_accuracy_of_very_many_shows_the_worst_the_best_and_the_mean_of_all():
    accuracy = np.linspace(0.2, 0.9, 5_001) ** 2
    accuracy[17], accuracy[3_000] = 0.01, np.nan
    figure = client_accuracy_figure(accuracy)
    shown = texts(figure)
    assert "worst: client 17, 1.0 %" in shown
    assert f"mean: {100 * np.nanmean(accuracy):.1f} %" in shown
    assert "1,000 of 5,000 clients, at evenly spaced ranks, worst first" in shown
    assert "Accuracy per client (left out: 1 without samples)" in shown
    drawn = figure.axes[0].patches[0].get_data().values
    assert (len(drawn), drawn[0], drawn[-1]) == pytest.approx((1_000, 1, 81))


def test_client_accuracy_without_samples():
    assert "no client has samples to evaluate on" in texts(client_accuracy_figure(np.full(2, np.nan)))


def test_curves_are_the_mean_over_common_rounds_with_a_band():
    runs = {"A": [([1, 2, 3], [0.1, 0.2, 0.9]), ([2, 1], [0.6, 0.3])], "B": [([1, 2], [0.5, 0.5])]}
    figure = curves_figure(runs, "Digits", "accuracy")
    axis = figure.axes[0]
    assert np.allclose(axis.lines[0].get_xydata(), [[1, 0.2], [2, 0.4]])
    assert len(axis.collections) == 1, "no band for a single seed"
    corners = {tuple(point) for point in axis.collections[0].get_paths()[0].vertices.round(6)}
    assert {(1, 0.1), (1, 0.3), (2, 0.2), (2, 0.6)} <= corners
    assert {"A (n=2)", "B (n=1)", "Digits", "accuracy", "communication round"} <= texts(figure)
    png_shape(figure)


def test_curves_band_of_one_standard_deviation():
    """Values 0 and 2: mean 1, sd (n - 1) = sqrt(2)."""
    figure = curves_figure({"A": [([1, 2], [0, 0]), ([1, 2], [2, 2])]}, band="sd")
    heights = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((1 - 2**0.5, 1 + 2**0.5))
    assert "band: mean ± sd over seeds" in texts(figure)


def test_ten_curves_are_told_apart():
    figure = curves_figure({str(i): [([1, 2], [i, i])] for i in range(10)})
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == 10


@pytest.mark.parametrize(("count", "below"), [(4, False), (5, True), (20, True)])
def test_a_long_legend_stands_below_the_lines(count, below):
    figure = curves_figure({f"a method's name {i}": [([1, 2], [i, i])] for i in range(count)})
    png_shape(figure)
    (legend,) = figure.legends if below else [figure.axes[0].get_legend()]
    assert len(legend.get_texts()) == count
    assert (legend.get_window_extent().y1 <= figure.axes[0].get_tightbbox().y0) == below
    assert figure.axes[0].get_window_extent().height > 250


def test_curves_refuse_what_they_cannot_draw():
    with pytest.raises(ValueError, match=r"`band` \(=iqr\)"):
        curves_figure({}, band="iqr")
    for seeds in ([], [([1], [0.1]), ([2], [0.2])]):
        with pytest.raises(ValueError, match="round that all of its seeds have"):
            curves_figure({"A": seeds})


def test_long_and_odd_class_names():
    names = ["a$_{$c", "a very long class name 1", "a very long class name 2"]
    figure = confusion_figure(np.eye(3, dtype=int), names)
    png_shape(figure)  # dollar signs are no mathematics
    assert {"a very l…ame 1", "a very l…ame 2"} <= texts(figure)


def test_save_png(tmp_path):
    path = tmp_path / "figure.png"
    save_png(client_accuracy_figure(np.array([0.5, 1.0])), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
    assert imread(path).shape[2] == 4


def test_svg_is_the_same_for_the_same_figure():
    first, second = (svg_bytes(curves_figure({"A": [([1, 2], [0.1, 0.2]), ([1, 2], [0.2, 0.4])]})) for _ in range(2))
    assert first == second
    assert b"<svg" in first
    assert b"<dc:date>" not in first


def test_pyplot_is_never_loaded():
    figure = client_accuracy_figure(np.array([0.5]))
    png_shape(figure)
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(("classes", "numbered"), [(2, True), (3, True), (20, True), (21, False)])
@pytest.mark.parametrize("truth", ["none", "all", "some"])
def test_noise_matrices_of_any_size_beside_the_truth_as_far_as_it_is_known(classes, numbered, truth):
    learnt = np.full((classes, classes), 0.2 / (classes - 1))
    np.fill_diagonal(learnt, 0.8)
    true = None if truth == "none" else np.eye(classes)
    if truth == "some":
        true[::2] = np.nan
    figure = transition_figure(learnt, true, [f"class {i}" for i in range(classes)])
    height, width, _ = png_shape(figure)
    assert max(height, width) <= 2100
    *panels, bar = figure.axes
    assert len(panels) == (1 if true is None else 2)
    assert len(panels[0].texts) == (classes**2 if numbered else 0)
    if true is not None:
        known = np.isfinite(true).all(1)
        assert len(panels[1].texts) == (known.sum() if numbered else 0)
        assert np.array_equal(np.ma.getmaskarray(panels[1].images[0].get_array()).all(1), ~known)
    assert bar.get_ylabel() == "% of the true class"


def test_noise_matrix_is_in_percent_of_the_true_class():
    """Row = truth, column = label. Less than half a thousandth is not written; in the third row nothing is known."""
    learnt = np.array([[0.9, 0.096, 0.004], [0.3, 0.7, 0.0003], [0, 0, 1]])
    true = np.array([[1, 0, 0], [0.25, 0.75, 0], [np.nan] * 3])
    figure = transition_figure(learnt, true, NAMES)
    left, right, _ = figure.axes

    def cells(axis):
        return {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axis.texts}

    assert cells(left) == {(0, 0): "90", (0, 1): "10", (0, 2): "<1", (1, 0): "30", (1, 1): "70", (2, 2): "100"}
    assert cells(right) == {(0, 0): "100", (1, 0): "25", (1, 1): "75"}
    assert (left.images[0].get_clim(), right.images[0].get_clim()) == ((0, 100), (0, 100))
    assert np.allclose(left.images[0].get_array(), 100 * learnt)
    assert {*NAMES, "true class", "noisy label", "Noise matrix, learnt, %", "Noise matrix, true, %"} <= texts(figure)
    assert left.get_ylim()[0] > left.get_ylim()[1], "first class on top"
    assert texts(transition_figure(learnt, None, NAMES)) >= {"Noise matrix, learnt, %"}


def test_clients_have_their_names_on_the_axis():
    counts = held([[3, 1], [0, 2]], [[1, 0], [2, 2]])
    figure = partition_figure(counts, KINDS, ["a", "b"], client_labels=["0: Aachen", "1: US$ $x"])
    figure.canvas.draw()
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [text for text in ticks if text] == ["0: Aachen", r"1: US\$ \$x"]
    bars = client_accuracy_figure(np.array([0.5, 0.25]), ["0: Aachen", "1: Bern"])
    assert {"0: Aachen", "1: Bern", "worst: client 1: Bern, 25.0 %"} <= texts(bars)
