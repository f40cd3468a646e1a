"""Checks whether a method can learn from the labels of a federation, and which of them it would not use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fedlabel.data.labels.label_card import LabelCard
from fedlabel.methods.recipe import VIEWS, LabelKinds, Phase, Recipe, Stage
from fedlabel.shown import shown_repr


class _Kind(NamedTuple):
    name: str
    amount: str
    """The text before a number and `unit`: "the counts of" in "the counts of 3 bags"."""
    unit: str
    learnt_by: str
    """Example of a configuration that learns from it."""
    given_by: str
    """The value of supervision.kind for this kind of label; empty: none."""


_KINDS = {
    LabelKinds.BAGS: _Kind("counts of bags", "the counts of", "bag", "method.name=llp_bp", "bags"),
    LabelKinds.VOTES: _Kind(
        "votes of labelling functions",
        "the votes of",
        "labelling function",
        "method.name=dp_ssl with method.functions=written",
        "labeling_functions",
    ),
    LabelKinds.ANNOTATIONS: _Kind(
        "labels of annotators",
        "the annotators' labels of",
        "sample",
        "method.name=ill (or supervision.vote=true)",
        "",
    ),
    LabelKinds.TRUE: _Kind("true labels", "the true labels of", "sample", "method.name=supervised", "few_labels"),
    LabelKinds.NOISY: _Kind("noisy labels", "the noisy labels, or sets, of", "sample", "method.name=ill", "noisy"),
    LabelKinds.SETS: _Kind("candidate sets", "the candidate sets of", "sample", "method.name=ill", "partial"),
}


def check_labels(name: str, recipe: Recipe, card: LabelCard, at_server: bool = False) -> None:
    """Checks, before training, that the method can learn from the labels of a federation.

    Args:
        name: of the method.
        recipe: its recipe.
        card: the labels of all clients, and of the server.
        at_server: whether labels are only at the server.

    Raises:
        ValueError: the method cannot learn from any of them.
    """
    uses = recipe.uses
    if at_server and LabelKinds.AT_SERVER not in uses:
        raise ValueError(
            f"`supervision.labels_at` (=server): method {name} learns from labels at the clients. "
            "Take supervision.labels_at=clients or some_clients."
        )
    amounts = _amounts(uses, card)
    used = [kind for kind in _KINDS if kind in uses]
    if not any(amounts[kind] for kind in used) and not (at_server and card.true):
        held = [kind for kind in _KINDS if amounts[kind]]
        found = f"only {_listed([_amount(kind, amounts[kind]) for kind in held], 'and')}" if held else "no label"
        given = _listed([_KINDS[kind].given_by for kind in used if _KINDS[kind].given_by], "or")
        take = [f"{_KINDS[kind].learnt_by} for {_KINDS[kind].name}" for kind in held]
        take += [f"supervision.kind={given}"] if given else []
        wanted = _listed([_KINDS[kind].name for kind in used], "or") or "labels at the server"
        raise ValueError(
            f"`method.name` (={name}) learns from {wanted}, and the federation holds {found}. "
            f"Take {_listed(take, 'or')}."
        )
    if LabelKinds.VOTES in uses and card.functions and not any(map(any, card.votes)):
        raise ValueError(
            f"None of the {card.functions} labelling functions votes for a class on any of the {card.asked:,} samples "
            "they were given: nothing to learn from. A function returns a class, its name or its number; None abstains."
        )


def label_warnings(name: str, recipe: Recipe, card: LabelCard, class_names: Sequence[str]) -> list[str]:
    """Returns warnings to show before a run: labels that a method does not use, functions and classes without votes;
    arguments: see `check_labels`.
    """
    uses, amounts = recipe.uses, _amounts(recipe.uses, card)
    warnings = [
        f"method.name={name} does not use {_amount(kind, amounts[kind])}: these samples count as unlabelled."
        for kind in _KINDS
        if amounts[kind] and kind not in uses
    ]
    if LabelKinds.BAGS in uses and not card.bags:
        warnings.append(
            f"method.name={name} learns from counts of bags, and there are none: each true label is a bag of one "
            "sample. If bags were meant, take supervision.kind=bags, with supervision.bag_size."
        )
    if LabelKinds.VOTES in uses and card.functions:
        silent = [str(place) for place, votes in enumerate(card.votes) if not any(votes)]
        if silent:
            warnings.append(
                f"Labelling functions that vote on no sample (in the file's order, from 0): {', '.join(silent)}."
            )
        by_class = zip(class_names, zip(*card.votes, strict=True), strict=True)
        missing = [label for label, votes in by_class if not any(votes)]
        if missing:
            warnings.append(
                f"No labelling function votes for {', '.join(missing)}: the label model cannot find these classes."
            )
    return warnings


def _amounts(uses: LabelKinds, card: LabelCard) -> dict[LabelKinds, int]:
    """Returns the number of samples of each kind; a noisy set is unused by methods that use noisy labels alone."""
    as_set = LabelKinds.NOISY in uses and LabelKinds.SETS not in uses
    return {
        LabelKinds.BAGS: card.bags,
        LabelKinds.VOTES: card.functions,
        LabelKinds.ANNOTATIONS: card.annotated,
        LabelKinds.TRUE: card.true,
        LabelKinds.NOISY: card.noisy + (0 if as_set else card.noisy_sets),
        LabelKinds.SETS: card.sets + (card.noisy_sets if as_set else 0),
    }


def _amount(kind: LabelKinds, number: int) -> str:
    return f"{_KINDS[kind].amount} {number:,} {_KINDS[kind].unit}{'' if number == 1 else 's'}"


def _listed(words: Sequence[str], last: str) -> str:
    """Returns "a, b or c" for last="or"."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def check_recipe(name: str, recipe: object) -> None:
    """Checks that a method's recipe can be run, before anything starts.

    Args:
        name: of the method.
        recipe: what its `recipe` returned.

    Raises:
        ValueError: it is no recipe, or a stage, phase, view or name in it is not what it has to be.
    """
    if not isinstance(recipe, Recipe):
        raise ValueError(f"`recipe` of method {name} returned {type(recipe).__name__}, not a Recipe.")
    _check_tuple(name, "Recipe.stages", recipe.stages, Stage)
    for number, stage in enumerate(recipe.stages):
        if stage.rounds is None and number < len(recipe.stages) - 1:
            raise ValueError(f"Method {name}: stage {number} has no `rounds`, so that the stages after it never begin.")
        for phases in _phases(stage):
            _check_tuple(name, "Stage.phases", phases, Phase)
            _check_phases(name, phases)
    _check_tuple(name, "Recipe.server_phases", recipe.server_phases, Phase)


def _phases(stage: Stage) -> list[tuple[Phase, ...]]:
    """Returns the phases of a stage's first and last round."""
    if not callable(stage.phases):
        return [stage.phases]
    return [stage.phases(number) for number in dict.fromkeys((1, max(1, stage.rounds or 1)))]


def _check_tuple(name: str, what: str, values: object, kind: type) -> None:
    if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
        given = shown_repr(values) if isinstance(values, tuple) else type(values).__name__
        raise ValueError(
            f"Method {name}: `{what}` (={given}) must be a tuple of {kind.__name__}; a tuple of one ends with a comma."
        )


def _check_phases(name: str, phases: tuple[Phase, ...]) -> None:
    names = [phase.name for phase in phases]
    if len(set(names)) < len(names):
        raise ValueError(f"Method {name}: two phases of a round have one name ({', '.join(names)}).")
    starts = [phase.start for phase in phases if phase.start in names]
    if len(set(starts)) < len(starts):
        raise ValueError(f"Method {name}: two phases start from the end of phase {starts[0]}.")
    for phase in phases:
        _check_tuple(name, f"teachers of phase {phase.name}", phase.teachers, str)
        for part in ("labeled", "unlabeled", "mix"):
            views = getattr(phase.draw, part, ())
            if not isinstance(views, tuple) or not set(views) <= set(VIEWS):
                raise ValueError(
                    f"Method {name}: `{part}` (={views}) of phase {phase.name} must be a tuple of views, "
                    f'{", ".join(VIEWS)}, e.g. ("weak",).'
                )
