"""What is wrong with the loss of a phase, in words of its phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedlabel.methods.batch import Batch, LossFunction, Model, Step
from fedlabel.methods.recipe import VIEWS, Phase, Update

PARTS = {"labeled": "labelled samples", "unlabeled": "unlabelled samples", "mix": "samples to mix with"}


def checked_updates(phase: Phase) -> tuple[Update, ...]:
    """Returns the optimiser steps of a phase, with losses that raise a ValueError where one reads a view or a teacher
    that the phase does not have, or returns no `Step`.
    """
    return tuple(replace(update, loss=_checked(phase, update.loss)) for update in phase.updates)


def _checked(phase: Phase, loss: LossFunction) -> LossFunction:
    def checked(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        try:
            found = loss(student, teachers, batch)
        except KeyError as error:
            reason = _why_missing(phase, error.args[0] if error.args else None)
            if reason is None:
                raise
            raise ValueError(reason) from error
        if not isinstance(found, Step):
            raise ValueError(
                f"The loss of phase `{phase.name}` returned {type(found).__name__}; it must return a "
                "fedlabel.methods.batch.Step, e.g. Step(loss, metrics, examples)."
            )
        return found

    return checked


def _why_missing(phase: Phase, name: object) -> str | None:
    """Returns why a loss finds nothing under a name, if it is that of a view or a teacher."""
    if name in ("global", "previous") and name not in phase.teachers:
        return (
            f'The loss of phase `{phase.name}` reads teachers["{name}"], and its teachers are '
            f"{', '.join(phase.teachers) or 'none'}: add it, Phase(..., teachers={(*phase.teachers, name)!r})."
        )
    drawn = {part: getattr(phase.draw, part) for part in PARTS if hasattr(phase.draw, part)}
    lacking = [part for part, views in drawn.items() if name not in views]
    if name not in VIEWS or not lacking:
        return None
    has = "; ".join(f"of {PARTS[part]}: {', '.join(views) or 'none'}" for part, views in drawn.items())
    part = next((each for each in lacking if drawn[each]), lacking[0])
    more = f"{part}={(*drawn[part], name)!r}"
    return (
        f'The loss of phase `{phase.name}` reads views["{name}"], and the phase draws the views {has}. Add it there: '
        f"Phase(..., {type(phase.draw).__name__}({more}))."
    )
