"""TensorBoard's pages: each metric has its place, and a chart is the same in every run."""

from __future__ import annotations

from collections.abc import Collection

from tensorboard.plugins.custom_scalar import layout_pb2

from fedlabel.metric_tags import FIGURE, PAGES, TAGS, Tag
from fedlabel.record.layout import CHARTS, HOW_TO_READ, Margin, layout

NUMBERS = [tag.name for tag in TAGS if tag.unit != FIGURE]


def pages(present: Collection[str], own: tuple[Tag, ...] = ()) -> dict[str, dict[str, list[str]]]:
    """Page -> title -> tags."""
    (value,) = layout(present, own).value
    (text,) = value.tensor.string_val
    found = layout_pb2.Layout.FromString(text)
    return {
        page.title: {
            chart.title: [*chart.multiline.tag]
            or [name for each in chart.margin.series for name in (each.value, each.lower, each.upper)]
            for chart in page.chart
        }
        for page in found.category
    }


def test_charts_are_of_declared_metrics_on_their_page() -> None:
    """A band may have a line of another page: the training loss between the clients' extremes."""
    page_of = {tag.name: tag.page for tag in TAGS if tag.unit != FIGURE}
    assert list(CHARTS) == list(PAGES) == list(HOW_TO_READ)
    for page, charts in CHARTS.items():
        for title, names in charts.items():
            assert names, title
            pages_of = {page_of[name] for name in names}
            assert page in pages_of or isinstance(names, Margin), title
            assert isinstance(names, Margin) or title == "loss: evaluation and training (nats)" or len(pages_of) == 1


def test_every_metric_of_a_run_is_in_a_chart() -> None:
    charts = pages(NUMBERS)
    shown = {
        name.removesuffix("$").replace("\\", "") for page in charts.values() for tags in page.values() for name in tags
    }
    assert shown == set(NUMBERS)
    assert list(charts) == list(PAGES)


def test_a_run_has_only_charts_of_what_it_has_and_a_band_only_whole() -> None:
    charts = pages(["eval/accuracy", "pseudo/coverage", "eval/mean_client_accuracy", "unknown/x"])
    assert charts["Learning"].keys() == {"accuracy"}
    assert charts["Pseudo-labels"].keys() == {"coverage by expert"}
    assert charts["Clients"].keys() == {"accuracy: mean, worst tenth, worst client"}
    assert charts["System"] == {}
    band = ("eval/mean_client_accuracy", "eval/worst_10pct_client_accuracy", "eval/best_10pct_client_accuracy")
    assert pages(band)["Clients"]["accuracy: mean, worst and best tenth of clients"] == list(band)


def test_equal_charts_of_two_runs_are_equal_so_that_tensorboard_shows_them_once() -> None:
    few, many = pages(["train/loss_mix", "train/loss"]), pages(["train/loss_mix", "train/loss_vat", "train/loss"])
    assert few == many


def test_a_methods_own_metric_has_a_chart_of_its_own_with_its_unit() -> None:
    own = Tag("pseudo/margin", "margin", "nats", "Pseudo-labels")
    assert pages(["pseudo/margin"], (own,))["Pseudo-labels"] == {"margin (nats)": ["pseudo/margin$"]}
