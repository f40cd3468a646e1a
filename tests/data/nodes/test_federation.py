"""What server and nodes know of the federation: counts that add up, and odd ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlabel.config import load_config, to_yaml
from fedlabel.data.labels.label_card import LabelCard
from fedlabel.data.nodes.export import client_folder, export_federation
from fedlabel.data.nodes.federation import (
    Agreement,
    Holding,
    as_json,
    parse_agreement,
    parse_holding,
    server_federation,
    sum_cards,
)
from fedlabel.data.nodes.folder import read_node_folder
from fedlabel.data.nodes.schema import Schema, load_schema
from fedlabel.data.sets.config import DataError
from fedlabel.experiment import Experiment, open_experiment
from fedlabel.learning.plan import bag_units
from tests.data.nodes.folders import IMAGES, write

OPTIONS = [
    *("num_clients=3", "partition.kind=iid", "model.name=mlp", "device=cpu", "method.name=ill"),
    "supervision.mix=[{share: 0.34, kind: few_labels, label_rate: 0.3}, {share: 0.33, kind: noisy, noise_rate: 0.3}, "
    "{share: 0.33, kind: bags, bag_size: 7}]",
]


class Deployed:
    """A simulated federation, and what its nodes hold."""

    def __init__(self, path: Path) -> None:
        self.experiment: Experiment = open_experiment(to_yaml(load_config([], OPTIONS)))
        images, test = self.experiment.images, self.experiment.evaluates_on.split.images
        export_federation(self.experiment.federation, images, test, path, held_out=True)
        self.schema: Schema = load_schema(path / "schema.yaml")
        self.data = [read_node_folder(path / client_folder(client), self.schema) for client in range(3)]
        self.holdings = [Holding.of(data) for data in self.data]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return Deployed(tmp_path_factory.mktemp("deployed") / "nodes")


def test_cards_of_nodes_add_up_to_that_of_the_federation(deployed: Deployed) -> None:
    assert sum_cards([holding.card for holding in deployed.holdings]) == deployed.experiment.federation.card
    federation = server_federation(deployed.schema, deployed.holdings, None)
    simulated = deployed.experiment.federation
    assert federation.card == simulated.card
    assert federation.kinds().tolist() == simulated.kinds().tolist()
    assert federation.parts.lengths.tolist() == simulated.parts.lengths.tolist()
    assert federation.histograms().sum(2).tolist() == simulated.histograms().sum(2).tolist()


def test_bags_of_a_node_are_known_by_number_and_size(deployed: Deployed) -> None:
    """As far as they bound what a client draws: units, samples in them, and the largest."""
    federation = server_federation(deployed.schema, deployed.holdings, None)
    config = load_config([], ["num_clients=3", "data.name=nodes", "model.name=mlp", "device=cpu", "method.name=ill"])
    server = Experiment(config, federation)
    for client in range(3):
        for singles in (False, True):
            ours = server.units(client, singles)
            theirs = bag_units(deployed.experiment.federation.supervision(client), singles)
            assert ours.rows.shape == theirs.rows.shape
            assert int((ours.rows >= 0).sum()) == int((theirs.rows >= 0).sum())


def test_what_a_node_says_is_counts_alone(deployed: Deployed) -> None:
    for holding in deployed.holdings:
        text = as_json(holding)
        assert parse_holding(text, deployed.schema) == holding
        assert len(text) < 600
    changed = [holding._replace(held_out=1) for holding in deployed.holdings]
    hashes = {server_federation(deployed.schema, each, None).sha256 for each in (deployed.holdings, changed)}
    assert len(hashes) == 2


def test_small_counts_become_the_bound(tmp_path: Path) -> None:
    """4 samples with a label, of which 2 are in the only bag, 1 noisy, 1 candidate set, 1 with votes, 1 without."""
    labels = "sample,label,noisy_label,candidates,bag,annotator:ann 0,cat,,,a,dog 1,cat,,,a, 2,dog,,,, 3,owl,,,,"
    files = {
        "labels": f"{labels} 4,,cat,,, 5,,,cat;dog,,",
        "bags": "bag,cat,dog,owl a,2,0,0",
        "votes": "sample,ears,wings 6,cat,",
    }
    exact = Holding.of(read_node_folder(write(tmp_path / "node", **files), IMAGES))
    assert exact.card == LabelCard(8, 4, 1, 1, 0, 1, 2, 1, 1, ((1, 0, 0), (0, 0, 0)))
    assert exact.coarse(1) == exact
    coarse = exact.coarse(3)
    coarse.check(IMAGES)
    # Seven counts are small: samples without a label are 1, raised to 3, and 3 for each count of at most 3 but kinds.
    assert coarse.kinds == (3 + 3 * 6, 3, 3, 3, 0, 0, 3, 0, 3)
    assert coarse.card == LabelCard(36, 4, 3, 3, 0, 3, 2, 3, 3, ((3, 0, 0), (0, 0, 0)))
    assert (coarse.in_bags, coarse.largest_bag, coarse.alone) == (3, 3, 3)
    assert exact.coarse(3)._replace(held_out=0) == coarse


@pytest.mark.parametrize("least", [2, 5, 1000])
def test_small_counts_are_bounds_and_make_sense(deployed: Deployed, least: int) -> None:
    """All are at least what they stand for, none but 0 is below the bound, and the server takes them."""
    for exact in [holding._replace(held_out=4) for holding in deployed.holdings]:
        coarse = exact.coarse(least)
        assert parse_holding(as_json(coarse), deployed.schema) == coarse
        assert coarse.held_out == (4 if least <= 4 else 0)
        pairs = [*zip(exact.kinds, coarse.kinds, strict=True), *zip(exact[3:], coarse[3:], strict=True)]
        pairs += zip(exact.card[:6], coarse.card[:6], strict=True)
        assert all(ours >= theirs and ours >= least * (ours > 0) for theirs, ours in pairs)
        assert coarse.card.samples - coarse.in_bags >= exact.card.samples - exact.in_bags


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": -1}, "whole numbers"),
        ({"held_out": 1.5}, "whole numbers"),
        ({"held_out": True}, "whole numbers"),
        ({"kinds": [1] * 9}, "must sum to its samples"),
        ({"kinds": [0, 479]}, "must sum to its samples"),
        ({"in_bags": 481}, "more than it has samples"),
        ({"alone": 400}, "more than it has samples"),
        ({"largest_bag": 0}, "bags cannot have these sizes"),
        ({"largest_bag": 480}, "bags cannot have these sizes"),
        ({"card": {"samples": 0}}, "must sum to its samples"),
        ({"card": {"noisy": 10**6}}, "more than it has samples"),
        ({"card": {"annotators": 2}}, "not those of the schema"),
        ({"card": {"votes": [[1] * 10]}}, "not those of the schema"),
        ({"card": {"noisy_counts": 1}}, "must be true or false"),
        ({"card": {"label_epsilon": 1.0}}, "must be true or false"),
        ({"card": {"more": 1}}, "no JSON of counts"),
        ({"more": 1}, "no JSON of counts"),
        ({"card": 3}, "no JSON of counts"),
    ],
)
def test_odd_counts_are_refused(deployed: Deployed, change: dict[str, Any], message: str) -> None:
    holding = max(deployed.holdings, key=lambda each: each.in_bags)
    content = json.loads(as_json(holding))
    card = change.get("card", {})
    changed = {**content, **change, "card": {**content["card"], **card} if isinstance(card, dict) else card}
    parse_holding(json.dumps(content), deployed.schema)
    with pytest.raises(ValueError, match=message):
        parse_holding(json.dumps(changed), deployed.schema)


def test_the_agreement_travels_as_text(deployed: Deployed) -> None:
    agreement = Agreement(deployed.schema, deployed.experiment.federation.card)
    assert parse_agreement(agreement.text) == agreement
    for text in ("", "[]", '{"card": {}}', agreement.text.replace('"samples"', '"sample"')):
        with pytest.raises(DataError, match="The server's agreement cannot be read"):
            parse_agreement(text)
