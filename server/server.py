"""The components of a server that last for a run, and the steps of a round that use them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from fedlabel.cohort import Invitation, compressed
from fedlabel.compression import moved
from fedlabel.data.sets.config import NODES
from fedlabel.errors import RunError
from fedlabel.experiment import Experiment
from fedlabel.methods.batch import State, StateDict
from fedlabel.methods.recipe import Start
from fedlabel.privacy import private_mean
from fedlabel.record.results import is_evaluated
from fedlabel.record.run_folder import RunFolder
from fedlabel.seeding import numpy_generator
from server.asynchronous import Asynchronous
from server.blocks import BlockResult, cut_into_blocks, cut_into_tasks
from server.checkpoint import oldest_round, save_checkpoint
from server.grids.base import ClientGrid, MemoryOf, Order
from server.helpers import HelperPool
from server.observers import Observer, Report, Round, observers_of
from server.observers.base import has_figures
from server.observers.budget import DrawingBudget
from server.observers.over_rounds import figures_over_rounds
from server.pacing import Pacing, Rounds
from server.schema import ResultSchema
from server.selection import Selection, select_key
from server.state import ServerState, check_model, check_shared
from server.strategy import (
    CannotCombine,
    WeightedMean,
    begin_round,
    build_strategy,
    combine,
    normalized,
    restore_strategy,
    strategy_state,
)
from server.tally import RoundTally
from server.traffic import ResultBytes

OnRound = Callable[[int, Mapping[str, float]], object]
"""(round, metrics) -> False to end the run after this round, anything else to go on."""


class Ended(Exception):
    """`OnRound` asked for the run to end."""


class Server:
    """The components of a run besides its state.

    Args:
        experiment: the run's.
        grid: carries the rounds to the clients.
        folder: the run's.
        state: that the run goes on from.
        on_round: called after every round with its metrics.
    """

    def __init__(
        self,
        experiment: Experiment,
        grid: ClientGrid,
        folder: RunFolder,
        state: ServerState,
        on_round: OnRound,
    ) -> None:
        self.config, self.recipe = experiment.config, experiment.recipe
        self._experiment, self._grid, self._folder, self._on_round = experiment, grid, folder, on_round
        self._strategy = build_strategy(self.config.strategy)
        restore_strategy(self._strategy, state.strategy)
        grid.load_memories(state.clients)
        self._pool = HelperPool(experiment, self.recipe.helpers) if self.recipe.helpers is not None else None
        if self._pool is not None and state.helpers:
            self._pool.load(state.helpers)
        # Tests and Flower's runtime simulate nodes, too; those with data of their own have no true labels.
        self._is_simulated = grid.simulated and self.config.data.name != NODES
        self._observers: dict[str, Observer] = observers_of(experiment, state.observers, self._is_simulated)
        self._selection = Selection(
            folder.checkpoints, select_key(experiment), self.recipe, folder.read_metrics(), state.selected
        )
        schema = ResultSchema.of(experiment)
        self._result_bytes = ResultBytes(schema)
        kind = Asynchronous if self.config.pacing.is_asynchronous else Rounds
        self._pacing: Pacing = kind(
            experiment, self._result_bytes, lambda client, number: schema.limits(client, number).draws, state.pace
        )
        self._budget, self._may_draw = DrawingBudget(time.perf_counter()), True
        self._spans = experiment.spans
        self._spans.take()  # of a run before, in this process
        self._saved = oldest_round(folder.checkpoints)
        self._memory_of: MemoryOf | None = None
        """What clients kept when the round began; None: not looked up, or only they know."""

    def begin_stage(self, state: ServerState, number: int) -> ServerState:
        """Returns the initial state of a round: if a stage begins, with its initial weights and a fresh strategy."""
        if self.recipe.place(number).number != self.recipe.place(number - 1).number:
            self._pacing.begin_stage()
        if not self.recipe.begins(number):
            return state
        previous = self._selection.begin_stage() or state.average or state.model
        start, fresh = self.recipe.place(number).stage.start, self._experiment.fresh_state(number)
        self._strategy = build_strategy(self.config.strategy)  # its momentum belongs to the stage before
        model = fresh if isinstance(start, Start) else start(previous, fresh)
        return replace(state, previous=previous, average={}, model=model)

    def invite(self, state: ServerState, number: int) -> tuple[list[int], Invitation]:
        """Draws the cohort of a round and returns it, with what is sent to it."""
        shared = self.recipe.shared.broadcast(state.shared)
        cohort = self._pacing.cohort(number)
        helpers = self._pool.helpers_of(cohort, number) if self._pool is not None else {}
        own = Invitation(number, state.model, shared, state.previous, helpers, audit=self._is_simulated)
        return cohort, compressed(own, self._experiment.downlink, self.config.seed)

    def collect(
        self, cohort: Sequence[int], invitation: Invitation, state: ServerState
    ) -> tuple[RoundTally, StateDict | None]:
        """Has the cohort train and returns the tally of its results, and the strategy's combined weights; None if no
        result has a weight.

        Raises:
            RunError: too few results are usable, the strategy cannot combine them, or no client can be reached.
        """
        number, single = invitation.round_number, self._pool is not None
        self._may_draw = number == self.config.num_rounds or self._budget.allows(time.perf_counter())
        wanted = self._may_draw and any(observer.needs_memory(number) for observer in self._observers.values())
        self._memory_of = self._grid.memory_of(cohort) if wanted else None
        begin_round(self._strategy, number, invitation.model, cohort or [0])
        normalize = self.config.strategy.normalize_steps
        fold = isinstance(self._strategy, WeightedMean) and not (single or normalize or self._pacing.needs_models)

        memory: dict[str, str | int] = {}
        if not self._grid.simulated:
            memory = {"run": self._folder.key, "saved-round": self._saved}

        def train(clients: Sequence[int], work: Mapping[int, float]) -> Iterator[BlockResult]:
            tasks = cut_into_tasks(cut_into_blocks(clients), self._experiment.stack_in(len(clients)))
            return self._grid.train(Order(invitation._replace(work=work), state.shared, fold, memory), tasks)

        tally = RoundTally(invitation, cohort, self._result_bytes)
        blocks = tally.watch(self._pacing.blocks(invitation, cohort, train, tally))
        if normalize:
            blocks = normalized(blocks, invitation.model, self._experiment.parameters)
        if self._pool is not None:
            blocks = self._pool.watch(blocks)
        unfit, model = "", None
        try:
            with self._spans.part("reduce", "cohort"):
                model = combine(self._strategy, number, blocks, self._experiment.initial_state)
        except CannotCombine as error:
            unfit = f"Strategy {error}"
        if model is not None:
            if self.config.privacy.kind == "server":
                model = self._private(invitation, model, tally)
            model = self._pacing.moved(invitation.model, model)
            if invitation.encoded is not None:
                model = self._own(model, invitation.model, state.model)
        if model is not None:  # a mean of equal numbers may round
            model = {**model, **{name: state.model[name] for name in self._experiment.frozen}}
        for failure in tally.failures:
            self._folder.log_failure(failure)
        if unfit or tally.num_usable + tally.num_excused < self.config.strategy.min_replies:
            raise RunError(self._too_few(tally, unfit))
        if model is not None:
            variances = self._experiment.running.variances
            check_model(model, variances, f"Strategy {self.config.strategy.name} made", number, "step in strategy.args")
        return tally, model

    def _private(self, invitation: Invitation, mean: StateDict, tally: RoundTally) -> StateDict:
        """Returns the mean of clipped models with noise, see `private_mean`."""
        # Real clients know the seed, and could take noise off again that is drawn from it.
        seeded = numpy_generator(self.config.seed, "privacy", invitation.round_number)
        rng = seeded if self._grid.simulated else np.random.default_rng()
        names, privacy = self._experiment.parameters, self.config.privacy
        return private_mean(invitation.model, mean, names, tally.num_usable, len(tally.cohort), privacy, rng)

    def _own(self, combined: StateDict, received: StateDict, model: StateDict) -> StateDict:
        """Returns the server's own model, moved as the strategy moved the one that clients received.

        Otherwise each round would begin with a rounded model, and what is smaller than half of the last digit would
        never add up.
        """
        names = self._experiment.downlink.names(model)
        lost = {name: model[name] - received[name] if name in names else value for name, value in combined.items()}
        return moved(combined, lost, names)

    def _too_few(self, tally: RoundTally, unfit: str) -> str:
        """Returns the message that too few replies end the run."""
        asked, least = len(tally.cohort), self.config.strategy.min_replies
        few = f"All {asked} clients failed" if asked > 1 else "The only client failed"
        if tally.num_usable:
            few = unfit or f"Only {tally.num_usable} of {asked} clients gave a usable reply"
            few += f", `strategy.min_replies` is {least}," * (not unfit)
        first = ""
        if tally.failures:
            first = f" {tally.failures[0].splitlines()[0]} (all, with tracebacks: {self._folder.failures})"
        if tally.failures and all(map(_diverged, tally.failures)):
            first += (
                f" Training diverged: take a smaller training.lr (={self.config.training.lr:g}), or cut gradients with "
                "training.max_grad_norm."
            )
        return f"{few} in round {tally.round_number}, so the run stops; its checkpoints stay.{first}"

    def fine_tune(self, model: StateDict, number: int) -> StateDict:
        """Returns the model after the server's own training, if it holds labels.

        Raises:
            RunError: it is finite no more.
        """
        model = self._experiment.train_server(model, number)
        check_model(
            model,
            self._experiment.running.variances,
            "The server's own training made",
            number,
            "steps in training.server_steps",
        )
        return model

    def update_shared(self, shared: State, tally: RoundTally, number: int) -> State:
        """Returns the next shared state.

        Raises:
            RunError: clients could not go on from it.
        """
        with self._spans.part("reduce", "shared state"):
            updated = self.recipe.shared.update(shared, tally.statistics(self._experiment.device))
        check_shared(self.config.method.name, self.recipe, updated, number)
        return updated

    def observe(self, state: ServerState, tally: RoundTally, started: float) -> dict[str, float]:
        """Runs the observers on a round, writes their reports, and returns the metrics."""
        number, evaluation = state.round_number, self.config.evaluation
        evaluated = is_evaluated(number, self.config.num_rounds, evaluation.every)
        place = self.config.evaluation.at
        elsewhere = partial(self._grid.evaluate, state) if place == "nodes" else None
        shown = evaluated and place != "none"
        seen = Round(number, tally, self._memory_of, started, shown, self._may_draw, elsewhere)
        began = time.perf_counter()
        report = Report()
        for name, observer in self._observers.items():
            with self._spans.part("evaluate", name):
                report = report.add(observer.after_round(seen, state))
        draws = evaluated and self._may_draw and has_figures(self.config, number)
        if draws and self.config.tracking.level == "full":
            with self._spans.part("evaluate", "over rounds"):
                rows = [*self._folder.read_metrics(), {"round": number, **report.metrics, **report.lists}]
                names = self._experiment.federation.dataset.class_names
                report = report.add(Report(figures=figures_over_rounds(self.config, names, rows)))
        recorded = self._spans.take()
        with self._spans.part("write"):
            if recorded is not None:
                report = report.add(Report(recorded.metrics()))
                self._folder.log_trace(number, recorded)
            self._folder.log_round(number, **vars(report))
        if evaluated:
            self._budget.add(time.perf_counter() - began, draws)
        return report.metrics

    def save(self, state: ServerState, metrics: Mapping[str, float]) -> None:
        """Writes a checkpoint if one is due.

        Raises:
            Ended: the run should end here.
        """
        with self._spans.part("write", "checkpoint"):
            self._save(state, metrics)
        if self._on_round(state.round_number, metrics) is False and state.round_number < self.config.num_rounds:
            raise Ended

    def _save(self, state: ServerState, metrics: Mapping[str, float]) -> None:
        number, every = state.round_number, self.config.checkpoint.every
        self._selection.see(number, metrics, state.model)
        if number == self.config.num_rounds or number % every == 0:
            complete = replace(
                state,
                strategy=strategy_state(self._strategy),
                pace=self._pacing.dump(),
                clients=self._grid.dump_memories(),
                helpers=self._pool.dump() if self._pool is not None else {},
                observers={name: kept for name, each in self._observers.items() if (kept := each.dump())},
                selected=self._selection.stage_model,
            )
            save_checkpoint(self._folder.checkpoints, complete, self.config.checkpoint.keep)
            self._saved = oldest_round(self._folder.checkpoints)
            self._selection.settle()


def _diverged(failure: str) -> bool:
    """Returns whether a client failed because its values overflowed."""
    return any(sign in failure.partition("\n")[0] for sign in (" NotFinite: ", " TooLarge: ", "(=nan)", "(=inf)"))
