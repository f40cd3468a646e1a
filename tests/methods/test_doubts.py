"""What a run says before it begins: knowledge that the method makes nothing of, functions and classes without votes."""

import dataclasses

import pytest
import torch

from fedlabel.config import load_config
from fedlabel.data.supervision import Supervision

NAMES = ("cat", "dog", "cow")
NOBODY = [[True] * 3]


def record(candidates: list[list[bool]], votes: list[list[int]] | None = None, bags: bool = False) -> Supervision:
    """Samples in one bag where `bags`."""
    known = Supervision.certain(torch.tensor(candidates))
    if votes is not None:
        known = dataclasses.replace(known, votes=torch.tensor(votes))
    if bags:
        n = len(candidates)
        known = dataclasses.replace(known, bag=torch.zeros(n, dtype=torch.int64), bag_counts=torch.tensor([[n, 0, 0]]))
    return known


def doubts(method: str, known: Supervision, *overrides: str) -> list[str]:
    return load_config(overrides=["num_rounds=60", f"method.name={method}", *overrides]).method.doubts(known, NAMES)


WRITTEN = ("method.functions=written", "method.num_functions=2")
SETS = [[True, True, False], [True, False, False], [True, True, True]]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("ill", ["the counts of 1 bags", "the votes of 2 labelling functions"]),
        ("dllp", ["the votes of 2 labelling functions", "the candidate sets of 1 samples"]),
        ("llp_bp", ["the votes of 2 labelling functions"]),
        (
            "fixmatch",
            ["the counts of 1 bags", "the votes of 2 labelling functions", "the candidate sets of 1 samples"],
        ),
    ],
)
def test_knowledge_that_a_method_makes_nothing_of_is_named(method: str, said: list[str]) -> None:
    known = record(SETS, [[0, 1]] * 3, bags=True)
    assert doubts(method, known) == [
        f"method.name={method} makes nothing of {what}: these samples count as unlabelled." for what in said
    ]


def test_labels_of_annotators_are_named_but_for_ill() -> None:
    known = record([[True, False, False], *NOBODY * 2])
    known = dataclasses.replace(known, annotations=torch.tensor([[-1, -1], [0, 1], [2, -1]]))
    said = "makes nothing of the annotators' labels of 2 samples: these samples count as unlabelled."
    for method in ("fixmatch", "supervised", "cc"):
        assert doubts(method, known) == [f"method.name={method} {said}"]
    assert doubts("ill", known) == []


def test_what_methods_for_bags_leave_aside_is_named() -> None:
    """Noisy labels, as counts are exact; sets, but for beliefs, which go by them."""
    known = record([*SETS, [False, True, False]], bags=True)
    known = dataclasses.replace(known, noisy=torch.tensor([False, False, False, True]))
    noisy = "the noisy labels, or sets, of 1 samples"
    for method, said in (("dllp", [noisy, "the candidate sets of 1 samples"]), ("llp_bp", [noisy])):
        assert doubts(method, known) == [
            f"method.name={method} makes nothing of {what}: these samples count as unlabelled." for what in said
        ]


def test_noisy_labels_alone_are_nothing_for_bags() -> None:
    known = dataclasses.replace(record([[True, False, False]] * 2), noisy=torch.tensor([True, True]))
    for method in ("dllp", "llp_bp"):
        with pytest.raises(ValueError, match=rf"`method.name` \(={method}\) learns from bags of known counts and from"):
            load_config(overrides=[f"method.name={method}"]).method.check(known)


@pytest.mark.parametrize("method", ["ill", "fixmatch", "dp_ssl"])
def test_labels_alone_leave_no_doubt(method: str) -> None:
    assert doubts(method, record([[True, False, False], *NOBODY])) == []


@pytest.mark.parametrize("method", ["llp_bp", "dllp"])
def test_a_method_for_bags_says_that_there_are_none(method: str) -> None:
    (said,) = doubts(method, record([[True, False, False], *NOBODY]))
    assert said.startswith(
        f"method.name={method} learns from bags of known counts, and there are none: each true label"
    )
    assert doubts(method, record(NOBODY * 2, bags=True)) == []


@pytest.mark.parametrize(
    ("known", "instead"),
    [
        (record(NOBODY * 2, bags=True), r"there are only bags of known counts \(.*=llp_bp learns from them\)\.$"),
        (record(NOBODY * 2, [[0, 1]] * 2), r"there are only votes of labelling functions \(.*functions=written\)\.$"),
        (record(NOBODY * 2, [[0, 1]] * 2, bags=True), r"only bags .* and votes of labelling functions \(.*\)\.$"),
        (record(NOBODY * 2), r"and nothing is\. Take supervision\.kind=few_labels"),
    ],
)
def test_ill_says_who_learns_from_what_is_known(known: Supervision, instead: str) -> None:
    with pytest.raises(ValueError, match=instead):
        load_config(overrides=["method.name=ill"]).method.check(known)


def test_silent_functions_and_classes_without_votes_are_named() -> None:
    known = record(NOBODY * 3, [[-1, 0], [-1, 2], [-2, -2]])
    assert doubts("dp_ssl", known, *WRITTEN) == [
        "Labelling functions that vote on no sample (in the file's order, from 0): 0.",
        "No labelling function votes for dog: the label model cannot find these classes.",
    ]
    assert doubts("dp_ssl", record(NOBODY * 3, [[1, 0], [-1, 2], [-2, -2]]), *WRITTEN) == []


def test_functions_that_never_vote_are_refused() -> None:
    method = load_config(overrides=["num_rounds=60", "method.name=dp_ssl", *WRITTEN]).method
    with pytest.raises(ValueError, match="None of the 2 labelling functions votes .* on any of the 2 samples"):
        method.check(record(NOBODY * 3, [[-1, -1], [-1, -1], [-2, -2]]))
