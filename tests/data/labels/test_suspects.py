"""Files of suspects, and labels revised by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedlabel.data.labels.supervision import Supervision
from fedlabel.data.labels.supervision_config import SupervisionConfig
from fedlabel.data.labels.suspects import Suspects, file_name, read_suspects, revised, to_csv
from fedlabel.data.ragged import Ragged
from fedlabel.data.sets.config import DataError
from tests.data.test_federation import build

NAMES = ("cat", 'dog, "hot"', "8")
FIRST = Suspects(np.array([1, 3]), np.array([0, 1]), np.array([1, 2]), np.array([0.4, 0.2]))
NOBODY = Suspects(*(np.zeros(0, dtype=np.int64) for _ in range(3)), np.zeros(0))
LABELS = torch.tensor([2, 1, 0, 1, 0, 2])
PARTS = Ragged.of([np.array([1, 2, 4, 5]), np.array([0, 3])])
"""The first client's row 1 is sample 2 with label 0; its row 3 is sample 5 with label 2, which FIRST says is 1."""


def write(folder: Path, client: int, suspects: Suspects | str) -> Path:
    path = folder / file_name(client)
    path.parent.mkdir(exist_ok=True)
    path.write_text(suspects if isinstance(suspects, str) else to_csv(suspects, NAMES))
    return path


def record() -> Supervision:
    candidates = LABELS[:, None] == torch.arange(3)
    return Supervision.without_bags(candidates, torch.ones(6, dtype=torch.bool), torch.zeros(6, 0, dtype=torch.int64))


def test_a_file_holds_the_worst_first_and_reads_back(tmp_path: Path) -> None:
    path = write(tmp_path, 12, FIRST)
    assert path.name == "client-012.csv"
    text = 'row,given_label,suggested_label,score\n3,"dog, ""hot""",8,0.200000\n1,cat,"dog, ""hot""",0.400000\n'
    assert path.read_text() == text
    found = read_suspects(path, NAMES)
    assert [each.tolist() for each in found] == [[3, 1], [1, 0], [2, 1], [0.2, 0.4]]
    assert [each.dtype for each in found] == [np.int64] * 3 + [np.float64]
    assert [len(each) for each in read_suspects(write(tmp_path, 1, NOBODY), NAMES)] == [0] * 4


HEAD = "row,given_label,suggested_label,score\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["must begin with the line row,given_label,suggested_label,score"]),
        ("3,cat,8,0.1\n", ["must begin with the line"]),
        (f"{HEAD}3,cat,8\n", ["line 2 ('3,cat,8') must hold a row"]),
        (f"{HEAD}3,cat,8,0.1\n-1,cat,8,0.1\n", ["line 3 ('-1,cat,8,0.1')"]),
        (f"{HEAD}{'9' * 30},cat,8,0.1\n", ["line 2"]),
        (f"{HEAD}3,cat,8,0.1\n3,cat,8,0.1\n", ["line 3", "no other line has"]),
        (f"{HEAD}3,mouse,8,0.1\n", ["line 2 ('3,mouse,8,0.1')"]),
        (f"{HEAD}3,cat,8,low\n", ["line 2"]),
        (f'{HEAD}3,"cat,8,0.1\n', ["line 2"]),
    ],
)
def test_a_damaged_file_is_named(text: str, words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, 0, text)
    with pytest.raises(DataError) as caught:
        read_suspects(path, NAMES)
    for word in ["`supervision.audit`", str(path), *words]:
        assert word in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path, 0, "")
    path.write_bytes(b"row\xff")
    with pytest.raises(DataError, match=r"is damaged .*audit the run again"):
        read_suspects(path, NAMES)


@pytest.mark.parametrize(
    ("action", "candidates", "noisy"),
    [
        ("drop", [True, True, True], False),
        ("relabel", [False, True, False], True),
        ("candidates", [True, True, False], True),
        ("weight", [True, False, False], True),
    ],
)
def test_what_is_done_with_suspects(action: str, candidates: list[bool], noisy: bool, tmp_path: Path) -> None:
    """Of sample 2, the first client's row 1; all else stays."""
    suspects = Suspects(np.array([1]), np.array([0]), np.array([1]), np.array([0.4]))
    write(tmp_path, 0, suspects)
    write(tmp_path, 1, NOBODY)
    before = record()
    after = revised(before, PARTS, tmp_path, action, NAMES, weight=0.25)
    assert after.candidates[2].tolist() == candidates
    assert bool(after.noisy[2]) == noisy
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(after.candidates[others], before.candidates[others])
    assert torch.equal(before.candidates, record().candidates)
    assert (after.weight is not None) == (action == "weight")
    if after.weight is not None:
        assert after.weight.tolist() == [1, 1, 0.25, 1, 1, 1]
        assert after.rows(torch.tensor([2, 3])).weight.tolist() == [0.25, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("client", "row", "given"),
    [(0, 3, 1), (0, 4, 0), (1, 2, 0)],
)
def test_an_audit_of_something_else(client: int, row: int, given: int, tmp_path: Path) -> None:
    """Another label, and rows that clients do not have."""
    for each in range(2):
        wrong = Suspects(np.array([row]), np.array([given]), np.array([2]), np.array([0.1]))
        write(tmp_path, each, wrong if each == client else NOBODY)
    with pytest.raises(DataError, match=rf"client-00{client}.csv says that row {row} has the label .* another seed"):
        revised(record(), PARTS, tmp_path, "drop", NAMES)


def test_an_audit_with_fewer_clients(tmp_path: Path) -> None:
    write(tmp_path, 0, NOBODY)
    with pytest.raises(DataError, match=r"there is no file .*client-001.csv.*as many clients"):
        revised(record(), PARTS, tmp_path, "drop", NAMES)


def test_a_federation_after_an_audit(tmp_path: Path) -> None:
    """Suspects and folds together; a weight shows in the hash."""
    whole = build(label_rate=1.0)
    names = whole.dataset.class_names
    for client, rows in enumerate(whole.parts):
        given = whole.record.label[rows[:3]].numpy()
        suspects = Suspects(np.arange(3), given, (given + 1) % 10, np.full(3, 0.1))
        path = tmp_path / file_name(client)
        path.parent.mkdir(exist_ok=True)
        path.write_text(to_csv(suspects, names))
    dropped = build(label_rate=1.0, audit=str(tmp_path), folds=2, withheld_fold=0)
    for client, rows in enumerate(dropped.parts):
        known = dropped.supervision(client).labeled
        assert not bool(known[:3].any())
        assert abs(int(known.sum()) - (len(rows) - 3) / 2) <= 1
    weighted = build(label_rate=1.0, audit=str(tmp_path), audit_action="weight")
    other = build(label_rate=1.0, audit=str(tmp_path), audit_action="weight", audit_weight=0.5)
    assert torch.equal(weighted.record.candidates, whole.record.candidates)
    assert len({whole.sha256, weighted.sha256, other.sha256}) == 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"audit_action": "relabel"}, r"`supervision.audit_action` \(=relabel\) needs supervision.audit"),
        ({"audit": "x", "audit_action": "delete"}, r"`supervision.audit_action` \(=delete\) must be one of drop"),
        ({"audit": "x", "audit_action": "weight", "audit_weight": 0.0}, r"`supervision.audit_weight` \(=0.0\)"),
        ({"audit": "x", "audit_weight": 0.5}, r"`supervision.audit_weight` \(=0.5\) is for supervision.audit_action=w"),
    ],
)
def test_audits_that_cannot_be(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SupervisionConfig(**keys)  # type: ignore[arg-type]
