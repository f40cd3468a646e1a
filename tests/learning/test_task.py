"""What a run says before it begins: labels that the method cannot or does not use, functions and classes without
votes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlabel.data.labels.label_card import label_card
from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning.task import check_labels, check_recipe, label_warnings
from fedlabel.methods import METHODS
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.recipe import BySample, LabelKinds, Phase, Recipe, Stage
from tests.methods.recipes import task

TRUE, NOISY, SETS, VOTES = LabelKinds.TRUE, LabelKinds.NOISY, LabelKinds.SETS, LabelKinds.VOTES
USES = {
    "fixmatch": TRUE | NOISY | LabelKinds.AT_SERVER,
    "proden": TRUE | NOISY | SETS | LabelKinds.AT_SERVER,
    "ill": TRUE | NOISY | SETS | LabelKinds.ANNOTATIONS | LabelKinds.AT_SERVER,
    "dllp": TRUE | LabelKinds.BAGS | LabelKinds.AT_SERVER,
    "llp_bp": TRUE | LabelKinds.BAGS | SETS | LabelKinds.AT_SERVER,
    "dp_ssl": TRUE | NOISY | VOTES,
}
"""Of these methods; of DP-SSL with written functions."""
NAMES = ("cat", "dog", "cow")
NOBODY = [[True] * 3]
LABEL = [[True, False, False]]
SOME_SETS = [[True, True, False], [True, False, False], [True, True, True]]


def record(candidates: list[list[bool]], votes: list[list[int]] | None = None, bags: bool = False) -> Supervision:
    """Samples in one bag where `bags`."""
    supervision = Supervision.certain(torch.tensor(candidates))
    if votes is not None:
        supervision = replace(supervision, votes=torch.tensor(votes))
    if bags:
        n = len(candidates)
        bag, bag_counts = torch.zeros(n, dtype=torch.int64), torch.tensor([[n, 0, 0]])
        supervision = replace(supervision, bag=bag, bag_counts=bag_counts)
    return supervision


def noisy(supervision: Supervision, *rows: int) -> Supervision:
    mask = torch.zeros(len(supervision.candidates), dtype=torch.bool)
    mask[list(rows)] = True
    return replace(supervision, noisy=mask)


def annotated(supervision: Supervision, annotations: list[list[int]]) -> Supervision:
    return replace(supervision, annotations=torch.tensor(annotations))


def warnings_of(method: str, supervision: Supervision) -> list[str]:
    return label_warnings(method, Recipe((), USES[method]), label_card(supervision), NAMES)


def check(method: str, supervision: Supervision, at_server: bool = False) -> None:
    check_labels(method, Recipe((), USES[method]), label_card(supervision), at_server)


def unused(method: str, *what: str) -> list[str]:
    return [f"method.name={method} does not use {one}: these samples count as unlabelled." for one in what]


@pytest.mark.parametrize("method", USES)
def test_methods_use_these_kinds(method: str) -> None:
    changes = {"functions": "written", "num_functions": 2} if method == "dp_ssl" else {}
    recipe = METHODS[method](**changes).recipe(task(votes=((1, 1, 1),) * 2))  # type: ignore[arg-type]
    assert recipe.uses == USES[method]


# --------------------------------------------------------------------------------------------------------- warnings

BAG, VOTED, ONE_SET = "the counts of 1 bag", "the votes of 2 labelling functions", "the candidate sets of 1 sample"


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("ill", (BAG, VOTED)),
        ("proden", (BAG, VOTED)),
        ("dllp", (VOTED, ONE_SET)),
        ("llp_bp", (VOTED,)),
        ("fixmatch", (BAG, VOTED, ONE_SET)),
        ("dp_ssl", (BAG, ONE_SET)),
    ],
)
def test_labels_that_a_method_does_not_use_are_named(method: str, what: tuple[str, ...]) -> None:
    """Three samples in a bag, one a set; each function votes, and each class has a vote."""
    supervision = record(SOME_SETS, [[0, 1], [2, 0], [0, 1]], bags=True)
    assert warnings_of(method, supervision) == unused(method, *what)


def test_labels_of_annotators_are_named_but_for_ill() -> None:
    supervision = annotated(record([*LABEL, *NOBODY * 2]), [[-1, -1], [0, 1], [2, -1]])
    for method in ("fixmatch", "proden"):
        assert warnings_of(method, supervision) == unused(method, "the annotators' labels of 2 samples")
    assert warnings_of("ill", supervision) == []


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("dllp", ("the noisy labels, or sets, of 2 samples", ONE_SET)),
        ("llp_bp", ("the noisy labels, or sets, of 2 samples",)),
        ("fixmatch", ("the candidate sets of 2 samples",)),
        ("ill", ()),
    ],
)
def test_a_noisy_set_counts_once(method: str, what: tuple[str, ...]) -> None:
    """A set, a label, neither, a noisy label, a noisy set: for counts, which are exact, both of the last are noisy; for
    a method that learns noisy labels the last is a set.
    """
    supervision = noisy(record([*SOME_SETS, [False, True, False], [False, True, True]], bags=method != "ill"), 3, 4)
    bag = (BAG,) if method == "fixmatch" else ()
    assert warnings_of(method, supervision) == unused(method, *bag, *what)


def test_a_noisy_sample_of_all_classes_has_no_label() -> None:
    assert warnings_of("dllp", noisy(record(NOBODY * 2, bags=True), 0)) == []


@pytest.mark.parametrize("method", ["ill", "fixmatch", "dp_ssl"])
def test_of_labels_alone_there_is_nothing_to_say(method: str) -> None:
    assert warnings_of(method, record([*LABEL, *NOBODY])) == []


@pytest.mark.parametrize("method", ["llp_bp", "dllp"])
def test_a_method_for_bags_says_that_there_are_none(method: str) -> None:
    (warning,) = warnings_of(method, record([*LABEL, *NOBODY]))
    assert warning.startswith(f"method.name={method} learns from counts of bags, and there are none: each true label")
    assert warnings_of(method, record(NOBODY * 2, bags=True)) == []


def test_silent_functions_and_classes_without_votes_are_named() -> None:
    assert warnings_of("dp_ssl", record(NOBODY * 3, [[-1, 0], [-1, 2], [-2, -2]])) == [
        "Labelling functions that vote on no sample (in the file's order, from 0): 0.",
        "No labelling function votes for dog: the label model cannot find these classes.",
    ]
    assert warnings_of("dp_ssl", record(NOBODY * 3, [[1, 0], [-1, 2], [-2, -2]])) == []


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("method", "supervision", "message"),
    [
        (
            "ill",
            record(NOBODY * 2, bags=True),
            "learns from labels of annotators, true labels, noisy labels or candidate sets, and the federation holds "
            "only the counts of 1 bag. Take method.name=llp_bp for counts of bags or "
            "supervision.kind=few_labels, noisy or partial.",
        ),
        (
            "proden",
            record(NOBODY * 2, [[0, 1]] * 2),
            "learns from true labels, noisy labels or candidate sets, and the federation holds only the votes of 2 "
            "labelling functions. Take method.name=dp_ssl with method.functions=written for votes of labelling "
            "functions or supervision.kind=few_labels, noisy or partial.",
        ),
        (
            "ill",
            record(NOBODY * 2, [[0, 1]] * 2, bags=True),
            "holds only the counts of 1 bag and the votes of 2 labelling functions. Take method.name=llp_bp for",
        ),
        ("ill", record(NOBODY * 2), "holds no label. Take supervision.kind=few_labels, noisy or partial."),
        (
            "fixmatch",
            annotated(record(NOBODY * 2), [[0, 1], [-1, -1]]),
            "learns from true labels or noisy labels, and the federation holds only the annotators' labels of 1 sample."
            " Take method.name=ill (or supervision.vote=true) for labels of annotators or supervision.kind=few_labels "
            "or noisy.",
        ),
        (
            "fixmatch",
            noisy(record([[True, True, False]] * 2), 0),  # of the noisy set it would learn nothing, either
            "holds only the candidate sets of 2 samples. Take method.name=ill for candidate sets or",
        ),
        (
            "dllp",
            noisy(record([*LABEL, [False, True, True]]), 0, 1),
            "learns from counts of bags or true labels, and the federation holds only the noisy labels, or sets, of 2 "
            "samples. Take method.name=ill for noisy labels or supervision.kind=bags or few_labels.",
        ),
        ("llp_bp", noisy(record(LABEL * 2), 0, 1), "holds only the noisy labels, or sets, of 2 samples."),
        ("dp_ssl", record(NOBODY), "learns from votes of labelling functions, true labels or noisy labels, and the"),
    ],
)
def test_a_method_without_a_label_of_its_kinds_is_refused(method: str, supervision: Supervision, message: str) -> None:
    with pytest.raises(ValueError, match="learns from") as error:
        check(method, supervision)
    assert str(error.value).startswith(f"`method.name` (={method}) learns from ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("method", "supervision"),
    [
        *[(method, record([*LABEL, *NOBODY])) for method in USES],
        *[(method, noisy(record(LABEL), 0)) for method in ("fixmatch", "proden", "ill", "dp_ssl")],
        *[(method, record(SOME_SETS[:1])) for method in ("proden", "ill")],
        *[(method, noisy(record(SOME_SETS[:1]), 0)) for method in ("proden", "ill")],
        *[(method, record(NOBODY, bags=True)) for method in ("dllp", "llp_bp")],
        ("ill", annotated(record(NOBODY), [[0]])),
        ("dp_ssl", record(NOBODY, [[0, -1]])),
    ],
)
def test_one_label_of_a_kind_that_it_learns_from_is_enough(method: str, supervision: Supervision) -> None:
    check(method, supervision)


def test_functions_that_never_vote_are_refused() -> None:
    """Also where there are labels: the label model would have nothing to fit."""
    for candidates in (NOBODY * 3, LABEL * 3):
        with pytest.raises(ValueError, match="None of the 2 labelling functions votes .* on any of the 2 samples"):
            check("dp_ssl", record(candidates, [[-1, -1], [-1, -1], [-2, -2]]))


def test_labels_at_the_server_need_a_method_that_trains_there() -> None:
    check("fixmatch", record(LABEL), at_server=True)
    with pytest.raises(ValueError, match=r"`supervision.labels_at` \(=server\): method dp_ssl learns from labels at"):
        check("dp_ssl", record(LABEL), at_server=True)


def test_a_method_may_learn_at_the_server_alone() -> None:
    recipe = Recipe((), LabelKinds.AT_SERVER)
    check_labels("own", recipe, label_card(record(LABEL)), at_server=True)
    with pytest.raises(ValueError, match=r"learns from labels at the server, .* Take method.name=supervised for true"):
        check_labels("own", recipe, label_card(record(LABEL)))


PHASE = Phase("train", labels_loss)
GOOD = Recipe((Stage((PHASE,)),), LabelKinds.TRUE)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (None, "returned NoneType, not a Recipe"),
        (replace(GOOD, stages=Stage((PHASE,))), r"`Recipe.stages` \(=Stage\) must be a tuple of Stage; a tuple of one"),
        (replace(GOOD, stages=(Stage(PHASE),)), r"`Stage.phases` \(=Phase\) must be a tuple of Phase"),
        (replace(GOOD, stages=(Stage(lambda number: PHASE),)), r"`Stage.phases` \(=Phase\)"),
        (replace(GOOD, stages=(Stage((PHASE,)), Stage((PHASE,)))), "stage 0 has no `rounds`"),
        (replace(GOOD, stages=(Stage((PHASE, PHASE)),)), "two phases of a round have one name"),
        (
            replace(GOOD, stages=(Stage((PHASE, *(replace(PHASE, name=n, start="train") for n in "ab"))),)),
            "two phases start from the end of phase train",
        ),
        (replace(GOOD, stages=(Stage((replace(PHASE, teachers="global"),)),)), "`teachers of phase train`"),
        (replace(GOOD, stages=(Stage((replace(PHASE, draw=BySample("weak")),)),)), r"`labeled` \(=weak\)"),
        (replace(GOOD, stages=(Stage((replace(PHASE, draw=BySample(unlabeled=("big",))),)),)), r"`unlabeled` "),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_starts(recipe: Any, said: str) -> None:
    check_recipe("mine", GOOD)
    with pytest.raises(ValueError, match=said):
        check_recipe("mine", recipe)
