"""What is left out of an update of few samples."""

from __future__ import annotations

import torch

from fedlabel.data.labels.supervision import Supervision, reveal_labels
from fedlabel.learning.client import ClientData, ClientUpdate
from fedlabel.learning.suppression import fewest, without_few, without_tiny
from fedlabel.methods.batch import Votes
from fedlabel.methods.uploads import ModelPart
from fedlabel.metric_tags import client_tags
from tests.methods.recipes import recipe_of

TAGS = client_tags(())
VOTES = Votes(torch.zeros(20, 2, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool))


def record(labeled: int, n: int = 20, bags: int = 0) -> Supervision:
    """A record of n samples of which the first have labels; the last 2 * bags are in bags of two."""
    found = reveal_labels(torch.zeros(n, dtype=torch.int64), torch.arange(n) < labeled, 4)
    if not bags:
        return found
    bag, counts = torch.full((n,), -1), torch.zeros(bags, 4, dtype=torch.int64)
    bag[n - 2 * bags :] = torch.arange(2 * bags) // 2
    counts[:, 0] = 2
    return Supervision(found.candidates, found.noisy, found.annotations, bag, counts, found.votes)


def update(sums: dict[str, list[float]], times: int = 1) -> ClientUpdate:
    model = {"model": ModelPart({"w": torch.ones(2)}, 3.0)}
    statistics = {"class_mean": torch.ones(4)}
    return ClientUpdate(
        model, sums, statistics, {"own": torch.ones(1)}, torch.ones(0), None, 1, 1, 1, None, VOTES, times
    )


def left(
    known: Supervision, least: int, sums: dict[str, list[float]], times: int = 1, audit: bool = False
) -> ClientUpdate:
    return without_few(update(sums, times), known, recipe_of("supervised"), {}, TAGS, least, audit)


def test_a_client_below_the_bound_has_no_data() -> None:
    data = ClientData(torch.zeros(20, 1, 2, 2), record(4, bags=3))
    assert without_tiny(data, 20) is data
    none = without_tiny(data, 21)
    assert len(none.images) == len(none.supervision.candidates) == len(none.supervision.bag_counts) == 0


def test_a_group_below_the_bound_leaves_a_model_alone() -> None:
    sums = {"train/loss": [9.0, 100.0]}
    for known, least in ((record(4), 5), (record(17), 5), (record(8, bags=3), 4)):  # labelled, others, bags
        found = left(known, least, sums)
        assert (found.sums, found.statistics, found.votes) == ({}, {}, None)
        assert found.parts["model"].weight == 3
        assert set(found.kept) == {"own"}
        found = left(known, least - 2, sums)
        assert found.sums == sums
        assert set(found.statistics) == {"class_mean"}
        assert found.votes is VOTES
    assert left(record(0), 20, sums).sums == sums  # a group of nobody is none
    assert left(record(0), 21, sums).kept == {}  # it takes no part


def test_the_evaluator_of_a_simulation_keeps_the_votes() -> None:
    assert left(record(4), 5, {}, audit=True).votes is VOTES


def test_a_metric_of_few_different_samples_is_left_out() -> None:
    """Ten draws in which one sample can come three times are of four samples at least."""
    assert left(record(0), 4, {"train/loss": [1.0, 12.0]}, times=3).sums
    assert not left(record(0), 4, {"train/loss": [1.0, 11.0]}, times=3).sums


def test_pairs_and_functions_count_a_sample_several_times() -> None:
    pairs = next(tag for tag in TAGS.values() if tag.of_pairs)
    assert fewest(pairs, 5, 2, 0) == 50
    assert fewest(TAGS["train/loss"], 5, 2, 7) == 10
    assert fewest(TAGS["functions/kept"], 5, 2, 7) == 70
