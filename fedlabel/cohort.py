"""A round of a cohort of clients: what the server sends to them, and the result of each."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from fedlabel.attacks import attacked
from fedlabel.compression import RESIDUAL, Codec, residuals, send_update, without_residuals
from fedlabel.experiment import Experiment
from fedlabel.learning.audit import against_truth, votes_against_truth
from fedlabel.learning.client import ClientUpdate, LocalRound, train_clients
from fedlabel.learning.metrics import Counts
from fedlabel.learning.suppression import without_few, without_tiny
from fedlabel.methods.batch import State, StateDict
from fedlabel.methods.uploads import ModelPart
from fedlabel.privacy import private_upload
from fedlabel.seeding import numpy_generator, torch_generator

logger = logging.getLogger("fedlabel")


class Invitation(NamedTuple):
    """What the server sends to a cohort; its tensors are not changed by anybody."""

    round_number: int
    """1-based."""
    model: StateDict
    """The global weights, in the model's own types and order."""
    shared: State
    """See `Shared.broadcast`."""
    previous: StateDict
    """The final model of the previous stage (see `Stage`); empty in the first."""
    helpers: Mapping[int, Mapping[str, StateDict]] = MappingProxyType({})
    """Client -> models of other clients, by name ("helper0", ...); clients without any are missing."""
    work: Mapping[int, float] = MappingProxyType({})
    """Client -> share of its local steps that it takes, rounded down, but at least one in each phase; clients that take
    all are missing."""
    audit: bool = True
    """Whether the clients are simulated, so that their hidden labels may be compared with their pseudo-labels."""
    min_count: int = 1
    """A real node's own `privacy.min_count`, which is not sent; the larger one counts."""
    encoded: Invitation | None = None
    """The same with models as the arrays that travel, if they are compressed; the models here are the decoded ones."""

    @property
    def on_the_way(self) -> Invitation:
        """The invitation with its models as they travel."""
        return self if self.encoded is None else self.encoded


class ClientResult(NamedTuple):
    """The result of a client's round, for the server: never samples, labels or posteriors."""

    client: int
    parts: dict[str, ModelPart]
    """The uploaded models, see `Upload.send`."""
    sums: Counts
    """Metric -> (sum, count) over all steps."""
    counts: Counts
    """Further numbers that add up over clients: passes, bytes by the paper's count, counts for the evaluator."""
    statistics: State
    """See `Shared.statistics`."""
    kept: State
    """See `Memory.keep`, and the residuals of error feedback: stays with the client."""
    encoded: Mapping[str, StateDict] = MappingProxyType({})
    """Part -> the arrays that travel, if updates are compressed: the models in `parts` are the decoded ones."""
    stacked: bool = False
    """See `ClientUpdate.stacked`: known of simulated clients only."""


def compressed(invitation: Invitation, codec: Codec, seed: int) -> Invitation:
    """Returns an invitation as clients receive it.

    Args:
        invitation: with the server's own models.
        codec: of models.
        seed: of the run.
    """
    if codec.kind == "none":
        return invitation
    done: dict[int, tuple[StateDict, StateDict]] = {}

    def both(model: StateDict, *scope: str | int) -> tuple[StateDict, StateDict]:
        if id(model) not in done:  # several clients get one helper
            arrays = codec.encode(model, torch_generator(seed, "compression", *scope))
            done[id(model)] = arrays, codec.decode(arrays, model)
        return done[id(model)]

    number = invitation.round_number
    models = [both(invitation.model, "model", number)]
    models.append(both(invitation.previous, "previous"))  # in each round the same
    helpers = {
        client: {name: both(model, "helper", number, client, name) for name, model in own.items()}
        for client, own in invitation.helpers.items()
    }
    encoded, decoded = (
        invitation._replace(
            model=models[0][side],
            previous=models[1][side],
            helpers={client: {name: pair[side] for name, pair in own.items()} for client, own in helpers.items()},
        )
        for side in range(2)
    )
    return decoded._replace(encoded=encoded)


def train_cohort(
    experiment: Experiment,
    invitation: Invitation,
    clients: Sequence[int],
    memories: Sequence[State],
    stack: int | None = None,
) -> list[ClientResult | Exception]:
    """Runs the round of some clients.

    Args:
        experiment: the run's, in this process.
        invitation: what the server sends; its tensors are on the experiment's device.
        clients: who trains, in ascending order.
        memories: what each kept, on any device; empty for a client that never trained.
        stack: about how many clients in a row train as one stack, where the shapes of their steps allow it; 1: none;
            None: as the experiment has it.

    Returns:
        The result of each client, or the exception that its training raised.
    """
    stack = experiment.stack if stack is None else stack
    results: list[ClientResult | Exception] = []
    stacks = max(1, len(clients) // stack)
    ends = [len(clients) * (number + 1) // stacks for number in range(stacks)]
    for start, end in zip([0, *ends], ends, strict=False):
        together = clients[start:end]
        with experiment.spans.part("other", "clients", clients=list(together)):
            results += _train(experiment, invitation, together, memories[start:end])
    return results


def _train(
    experiment: Experiment, invitation: Invitation, clients: Sequence[int], memories: Sequence[State]
) -> list[ClientResult | Exception]:
    """Runs the round of clients together; if that fails, of each alone, as only one of them may be the cause."""
    if len(clients) == 1 or not experiment.stacks:
        return [_alone(experiment, invitation, *each) for each in zip(clients, memories, strict=True)]
    try:
        return _together(experiment, invitation, clients, memories)
    except Exception as error:
        failure = error
    found = [_alone(experiment, invitation, *each) for each in zip(clients, memories, strict=True)]
    if not any(isinstance(result, Exception) for result in found):
        experiment.stacks = False
        logger.warning(
            "Clients cannot be stacked (%s: %s) and train one by one from now on; grid.stack=off says so beforehand.",
            *(type(failure).__name__, str(failure).partition("\n")[0]),
        )
    return found


def _alone(experiment: Experiment, invitation: Invitation, client: int, memory: State) -> ClientResult | Exception:
    try:
        return _together(experiment, invitation, [client], [memory])[0]
    except Exception as error:
        return error


def _together(
    experiment: Experiment, invitation: Invitation, clients: Sequence[int], memories: Sequence[State]
) -> list[ClientResult | Exception]:
    rounds = [_round(experiment, invitation, *each) for each in zip(clients, memories, strict=True)]
    updates = train_clients(experiment.recipe, experiment.trainer, invitation.model, rounds, invitation.round_number)
    with_updates = zip(clients, updates, strict=True)
    results = [_result(experiment, invitation, client, update) for client, update in with_updates]
    return [_sent(experiment, invitation, *each) for each in zip(results, memories, strict=True)]


def _sent(experiment: Experiment, invitation: Invitation, result: ClientResult, memory: State) -> ClientResult:
    """Returns a result with its models as the server will see them."""
    if experiment.uplink.kind == "none":
        return result
    seed, kept = experiment.client_seed(result.client, invitation.round_number), residuals(memory)
    parts, encoded = {}, {}
    for part, (model, weight) in result.parts.items():
        residual = None
        # What has no weight in the mean is lost, so nothing that is kept is sent with it.
        if experiment.config.compression.error_feedback and weight > 0:
            residual = kept.get(part, torch.zeros(experiment.uplink.numbers(invitation.model)))
        generator = torch_generator(seed, "compression", part)
        with experiment.spans.part("transfer", "compress", client=result.client):
            sent = send_update(experiment.uplink, model, invitation.model, generator, residual)
        parts[part], encoded[part] = ModelPart(sent.model, weight), sent.arrays
        if sent.residual is not None:
            kept[part] = sent.residual
    return result._replace(
        parts=parts, encoded=encoded, kept={**result.kept, **{RESIDUAL + part: value for part, value in kept.items()}}
    )


def _round(experiment: Experiment, invitation: Invitation, client: int, memory: State) -> LocalRound:
    data = without_tiny(experiment.client_data(client), _least(experiment, invitation))
    known = without_residuals(memory) if len(data.images) else {}
    kept = {name: value.to(experiment.device) for name, value in known.items()}
    further = {"previous": invitation.previous} if invitation.previous else {}
    return LocalRound(
        data,
        experiment.client_seed(client, invitation.round_number),
        {**kept, **invitation.shared},
        {**further, **invitation.helpers.get(client, {})},
        client,
        invitation.work.get(client, 1.0),
    )


def _least(experiment: Experiment, invitation: Invitation) -> int:
    return max(experiment.config.privacy.min_count, invitation.min_count)


def _result(experiment: Experiment, invitation: Invitation, client: int, update: ClientUpdate) -> ClientResult:
    result = _honest_result(experiment, invitation, client, update)
    if experiment.config.privacy.is_on:
        result = _private(experiment, invitation, result)
    if client in experiment.attackers:
        attack, names = experiment.config.attack, experiment.parameters
        parts, statistics = attacked(attack, result.parts, result.statistics, invitation.model, names)
        result = result._replace(parts=parts, statistics=statistics)
    return result


def _private(experiment: Experiment, invitation: Invitation, result: ClientResult) -> ClientResult:
    """Returns what leaves a client under differential privacy: its clipped model. Metrics and counts stay behind,
    except those for the evaluator of a simulation.
    """
    # Everybody knows the seed: noise that is drawn from it could be taken off again. It serves simulations alone.
    seeded = numpy_generator(experiment.client_seed(result.client, invitation.round_number), "privacy")
    rng = seeded if invitation.audit else np.random.default_rng()
    parts = private_upload(result.parts, invitation.model, experiment.parameters, experiment.config.privacy, rng)
    evaluated = (result.sums, result.counts) if invitation.audit else ({}, {})
    stacked = invitation.audit and result.stacked
    return ClientResult(result.client, parts, *evaluated, statistics={}, kept=result.kept, stacked=stacked)


def _honest_result(experiment: Experiment, invitation: Invitation, client: int, update: ClientUpdate) -> ClientResult:
    if (least := _least(experiment, invitation)) > 1:
        supervision, tags = experiment.federation.supervision(client), experiment.trainer.tags
        arguments = (supervision, experiment.recipe, invitation.shared, tags, least, invitation.audit)
        update = without_few(update, *arguments)
    counts: Counts = {"passes": [float(update.forward), float(update.backward)]}
    if experiment.config.strategy.normalize_steps:
        counts["steps"] = [float(update.steps)]
    claimed_bytes = experiment.recipe.upload.claimed_bytes
    if claimed_bytes is not None:
        uploaded, received = next(iter(update.parts.values())).state, len(invitation.helpers.get(client, {}))
        received += bool(invitation.previous)
        counts["claimed_bytes"] = list(claimed_bytes(invitation.model, uploaded, received))
    with experiment.spans.part("audit", client=client):
        sums, audited = _audited(update, experiment, client, invitation.audit)
    return ClientResult(
        client, update.parts, sums, {**audited, **counts}, update.statistics, update.kept, stacked=update.stacked
    )


def _audited(update: ClientUpdate, experiment: Experiment, client: int, audit: bool) -> tuple[Counts, Counts]:
    """Returns a client's metrics, and its counts against hidden labels where they may be read."""
    if update.pseudo is None and update.pairs is None and update.votes is None:
        return dict(update.sums), {}
    supervision = experiment.federation.supervision(client)
    if not audit:
        unknown = torch.full((len(supervision.candidates),), -1)
        return dict(update.sums), votes_against_truth(update, supervision, unknown)
    truth = experiment.federation.hidden_labels(client)
    sums, counts = against_truth(update, supervision, truth)
    return {**update.sums, **sums}, {**counts, **votes_against_truth(update, supervision, truth)}
