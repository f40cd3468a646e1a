"""The federation of real nodes, as each node and the server see it: samples stay in the node's folder.

A node has its own samples alone, under its client's number. The server has none: it has a `Holding` of each client, the
counts that the node sends once, before the first round, and the sum of their label cards, which every node gets so that
all build the same recipe of the method.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedlabel.data.federation import Federation
from fedlabel.data.labels.label_card import LabelCard, label_card
from fedlabel.data.labels.supervision import KIND_NAMES, Supervision
from fedlabel.data.nodes.folder import NodeData, read_test_folder
from fedlabel.data.nodes.schema import Schema, parse_schema
from fedlabel.data.ragged import Ragged
from fedlabel.data.sets.config import NODES, DataError
from fedlabel.data.sets.datasets import Dataset
from fedlabel.data.sets.loaders import Split
from fedlabel.errors import naming

_SUMMED = ("samples", "true", "noisy", "sets", "noisy_sets", "annotated", "bags", "asked")
"""Counts of a label card that add up over nodes."""
NOTHING = np.empty(0, dtype=np.int64)


class Holding(NamedTuple):
    """Counts of what a node holds; all that its server gets to know of its data before the first round."""

    card: LabelCard
    kinds: tuple[int, ...]
    """Samples by kind of label, see `KIND_NAMES`."""
    held_out: int
    """Labelled samples to evaluate models on; they are not among the others."""
    in_bags: int
    """Samples in a bag."""
    largest_bag: int
    """Samples in the largest bag."""
    alone: int
    """Samples with a certain label that are in no bag."""

    @classmethod
    def of(cls, data: NodeData) -> Holding:
        """Counts what is in a node's folder."""
        record = data.record
        sizes = record.bag_counts.sum(1)
        certain = record.labeled & ~record.noisy
        return cls(
            label_card(record)._replace(noisy_counts=data.noisy_counts),
            tuple(torch.bincount(record.kind, minlength=len(KIND_NAMES)).tolist()),
            len(data.held_out.labels),
            int((record.bag >= 0).sum()),
            int(sizes.max()) if len(sizes) else 0,
            int((certain & (record.bag < 0)).sum()),
        )

    def coarse(self, least: int) -> Holding:
        """Returns these counts without small ones: from 1 to `least` - 1 becomes `least`.

        That there is something stays, as methods are built by it. All counts are then bounds from above, so a server
        that checks replies by them refuses none: samples without a label are added for every count that may have
        been raised, so that the samples of all kinds still suffice for it. Held-out samples are 0 if they are fewer:
        the node would not evaluate on them.
        """
        if least <= 1:
            return self

        def up(count: int) -> int:
            return max(count, least) if count else 0

        card, kinds = self.card, [up(count) for count in self.kinds]
        votes = tuple(tuple(map(up, of_one)) for of_one in card.votes)
        asked = max([up(card.asked), *map(sum, votes)])
        parts = [
            card.true,
            card.noisy,
            card.sets,
            card.noisy_sets,
            card.annotated,
            card.asked,
            self.in_bags,
            self.alone,
        ]
        kinds[0] += least * sum(0 < count <= least for count in parts)
        kinds[0] += max(0, asked - sum(kinds))
        few: dict[str, Any] = {name: up(getattr(card, name)) for name in _SUMMED}
        card = card._replace(**{**few, "samples": sum(kinds), "asked": asked, "votes": votes})
        held_out = self.held_out if self.held_out >= least else 0
        return Holding(card, tuple(kinds), held_out, up(self.in_bags), up(self.largest_bag), up(self.alone))

    def check(self, schema: Schema) -> None:
        """Raises a ValueError unless these can be counts of one node's data."""
        card, classes = self.card, len(schema.classes)
        counts = [*card[:9], *self.kinds, *self[2:], *(count for votes in card.votes for count in votes)]
        if not all(type(count) is int and 0 <= count < 2**53 for count in counts):
            raise ValueError("its counts must be whole numbers from 0 on")
        if card.samples < 1 or sum(self.kinds) != card.samples or len(self.kinds) != len(KIND_NAMES):
            raise ValueError("its counts of the kinds of label must sum to its samples, of which it needs one")
        parts = (card.true + card.noisy + card.sets + card.noisy_sets, card.annotated, card.asked, self.in_bags)
        if max(*parts, self.alone) > card.samples or self.alone > card.true:
            raise ValueError("one of its counts is more than it has samples")
        if not self.largest_bag <= self.in_bags <= card.bags * self.largest_bag or card.bags > self.in_bags:
            raise ValueError("its bags cannot have these sizes")
        if card.annotators != len(schema.annotators) or len(card.votes) != len(schema.functions):
            raise ValueError("its annotators or labelling functions are not those of the schema")
        if any(len(votes) != classes or sum(votes) > card.asked for votes in card.votes):
            raise ValueError("its votes are more than its samples, or for other classes than the schema's")
        if type(card.noisy_counts) is not bool or card.label_epsilon is not None:
            raise ValueError(
                "whether its counts of bags have noise must be true or false, and no label_epsilon be given"
            )


def sum_cards(cards: Sequence[LabelCard]) -> LabelCard:
    """Returns the label card of all nodes together."""
    each = list(zip(*cards, strict=True))  # by field
    sums = {name: sum(values) for name, values in zip(LabelCard._fields, each, strict=True) if name in _SUMMED}
    votes = [tuple(map(sum, zip(*of_one, strict=True))) for of_one in zip(*(card.votes for card in cards), strict=True)]
    noisy_counts = any(card.noisy_counts for card in cards)
    return LabelCard(**sums, annotators=cards[0].annotators, votes=tuple(votes), noisy_counts=noisy_counts)


class Agreement(NamedTuple):
    """What server and nodes agree on before the first round; it goes along with every message."""

    schema: Schema
    card: LabelCard
    """Of all nodes together."""

    @property
    def text(self) -> str:
        """All of it as JSON; `parse_agreement` reads it back."""
        return json.dumps({"schema": self.schema.text, "card": self.card._asdict()})


def parse_agreement(text: str) -> Agreement:
    """Returns the agreement in a server's message.

    Raises:
        DataError: it is none.
    """
    try:
        content = json.loads(text)
        card = content["card"]
        votes = tuple(tuple(int(count) for count in row) for row in card.pop("votes"))
        noisy_counts, schema_text = bool(card.pop("noisy_counts")), str(content["schema"])
        del card["label_epsilon"]  # it is the schema's
        found = LabelCard(**{key: int(count) for key, count in card.items()}, votes=votes, noisy_counts=noisy_counts)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"The server's agreement cannot be read ({type(error).__name__}).") from error
    schema = parse_schema(schema_text, "The server's schema")
    return Agreement(schema, found._replace(label_epsilon=schema.label_epsilon))


@dataclass(frozen=True, eq=False)
class NodesFederation(Federation):
    """A federation of which this process holds the samples of one client, or of none."""

    agreement: Agreement | None = None

    @property
    def schema(self) -> Schema:
        """The federation's."""
        assert self.agreement is not None
        return self.agreement.schema

    @property
    def card(self) -> LabelCard:
        """The label card of all nodes."""
        assert self.agreement is not None
        return self.agreement.card

    @property
    def function_names(self) -> tuple[str, ...]:
        """See `Federation`."""
        return self.schema.functions


@dataclass(frozen=True, eq=False)
class ServerFederation(NodesFederation):
    """The federation as the server knows it; `parts` numbers samples that are elsewhere, client after client."""

    holdings: tuple[Holding, ...] = ()
    """Of each client."""

    def supervision(self, client: int) -> Supervision:
        """Only the node has it."""
        raise AssertionError("the server has no supervision record of real nodes")

    def hidden_labels(self, client: int) -> torch.Tensor:
        """Nobody has them."""
        raise AssertionError("real nodes have no hidden labels")

    @property
    def true_classes(self) -> tuple[str, ...]:
        """The only column of `histograms`: nobody knows the true classes of real nodes' samples."""
        return ("unknown",)

    def kinds(self, clients: np.ndarray | None = None) -> np.ndarray:
        """See `Federation`."""
        found = np.array([holding.kinds for holding in self.holdings], dtype=np.int64)
        return found if clients is None else found[clients]

    def histograms(self, clients: np.ndarray | None = None) -> np.ndarray:
        """See `Federation`."""
        return self.kinds(clients).T[:, :, None]

    def warnings(self) -> list[str]:
        """See `Federation`."""
        return []

    @cached_property
    def sha256(self) -> str:
        """A hash of the clients' counts."""
        return sha256(self._counts().encode()).hexdigest()

    @cached_property
    def data_hashes(self) -> dict[str, str]:
        """Hashes of the schema and of the server's own test set."""
        test = blake2b(digest_size=16)
        for values in (self.dataset.test.images, self.dataset.test.labels):
            test.update(repr(tuple(values.shape)).encode() + values.numpy().tobytes())
        return {"schema": self.schema.hash, "test": test.hexdigest()}

    def to_json(self, further: Mapping[str, str] | None = None) -> str:
        """Returns each client's counts, and hashes, as JSON; see `Federation`."""
        found = {"sha256": self.sha256, "data": {**self.data_hashes, **(further or {})}, "dataset": self.dataset.name}
        return json.dumps({**found, "clients": json.loads(self._counts())})

    def audit(self) -> dict[str, Any]:
        """Returns the kinds of label per client and the label card; nothing can be compared with true labels."""
        kinds = {"names": list(KIND_NAMES), "clients": self.kinds().tolist()}
        return {"classes": list(self.schema.classes), "kinds": kinds, "label_card": self.card._asdict()}

    def _counts(self) -> str:
        return json.dumps([{**each._asdict(), "card": each.card._asdict()} for each in self.holdings])


def node_federation(data: NodeData, agreement: Agreement, client: int, num_clients: int) -> NodesFederation:
    """Returns the federation as a node sees it: all parts but its own are empty.

    Args:
        data: what is in the node's folder.
        agreement: the server's.
        client: the node's number.
        num_clients: in the federation.
    """
    n, held_out = len(data.inputs), len(data.held_out.labels)
    train = Split(data.inputs, torch.full((n,), -1))
    return NodesFederation(
        dataset=_dataset(agreement.schema, train, data.held_out),
        parts=Ragged.by_owner(np.full(n, client), num_clients),
        record=data.record,
        test_parts=Ragged.by_owner(np.full(held_out, client), num_clients),
        in_sets=np.zeros(n, dtype=bool),
        server_rows=NOTHING,
        test_bags=None,
        agreement=agreement,
    )


def server_federation(schema: Schema, holdings: Sequence[Holding], test: Path | None) -> ServerFederation:
    """Returns the federation as the server sees it.

    Args:
        schema: the nodes'.
        holdings: of each client.
        test: the folder of the server's own test set; None: it has none.

    Raises:
        DataError: the test set cannot be read.
    """
    nothing, card = _nothing(schema), sum_cards([holding.card for holding in holdings])
    sizes = np.array([holding.card.samples for holding in holdings], dtype=np.int64)
    classes, annotators, functions = len(schema.classes), len(schema.annotators), len(schema.functions)
    record = Supervision(
        torch.ones(0, classes, dtype=torch.bool),
        torch.zeros(0, dtype=torch.bool),
        torch.zeros(0, annotators, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, classes, dtype=torch.int64),
        torch.zeros(0, functions, dtype=torch.int64),
    )
    return ServerFederation(
        dataset=_dataset(schema, nothing, nothing if test is None else read_test_folder(test, schema)),
        parts=Ragged.of_lengths(np.arange(sizes.sum()), sizes),
        record=record,
        test_parts=Ragged.of([NOTHING] * len(holdings)),  # nobody says which client a sample of it is like
        in_sets=np.zeros(0, dtype=bool),
        server_rows=NOTHING,
        test_bags=None,
        agreement=Agreement(schema, card._replace(label_epsilon=schema.label_epsilon)),
        holdings=tuple(holdings),
    )


def _nothing(schema: Schema) -> Split:
    dtype = torch.float32 if schema.tabular else torch.uint8
    return Split(torch.zeros(0, *schema.shape, dtype=dtype), torch.zeros(0, dtype=torch.int64))


def _dataset(schema: Schema, train: Split, test: Split) -> Dataset:
    features = schema.shape[0]
    mean, std = ((0.0,) * features, (1.0,) * features) if schema.tabular else (schema.mean, schema.std)
    rows = torch.arange(len(train.labels))
    return Dataset(
        NODES, train, _nothing(schema), test, schema.classes, mean, std, schema.allow_flip, rows, len(train.labels)
    )


def as_json(holding: Holding) -> str:
    """Returns a holding as JSON; `parse_holding` reads it back."""
    return json.dumps({**holding._asdict(), "card": holding.card._asdict()})


def parse_holding(text: str, schema: Schema) -> Holding:
    """Returns the holding in a node's answer, checked.

    Raises:
        ValueError: it is none; the text says why, in words that are safe to show.
    """
    try:
        content = json.loads(text)
        card = content.pop("card")
        votes = tuple(map(tuple, card.pop("votes")))
        found = Holding(LabelCard(**card, votes=votes), tuple(content.pop("kinds")), **content)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError("it is no JSON of counts") from error
    found.check(schema)
    return found


def saved_holdings(path: Path, schema: Schema) -> tuple[Holding, ...]:
    """Returns what each client held when a run began.

    Args:
        path: the run's partition.json, see `ServerFederation.to_json`.
        schema: of the federation.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with naming(path):
            clients = json.loads(path.read_bytes())["clients"]
        return tuple(parse_holding(json.dumps(each), schema) for each in clients)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}), so it is unknown what nodes held when the run began. Put "
            "the file back, or begin a new run."
        ) from error
