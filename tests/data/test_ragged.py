"""Sample indices per client in two arrays, against the same in lists of arrays."""

from __future__ import annotations

import numpy as np
import pytest

from fedlabel.data.ragged import Ragged

PARTS = [[4, 7], [], [0], [], [1, 2, 9]]


@pytest.fixture
def ragged() -> Ragged:
    return Ragged.of(np.array(part, dtype=np.int64) for part in PARTS)


def lists(parts: Ragged) -> list[list[int]]:
    return [part.tolist() for part in parts]


def test_it_is_a_sequence_of_arrays(ragged: Ragged) -> None:
    assert lists(ragged) == [ragged[place].tolist() for place in range(5)] == PARTS
    assert len(ragged) == 5
    assert ragged[-1].tolist() == ragged[np.int64(4)].tolist() == [1, 2, 9]
    assert lists(ragged[1:4]) == PARTS[1:4]
    assert lists(ragged[::-2]) == PARTS[::-2]
    for outside in (5, -6):
        with pytest.raises(IndexError):
            ragged[outside]
    assert Ragged.of(ragged) is ragged
    assert all(part.dtype == np.int64 for part in (*ragged, *Ragged.of([])))


def test_owners_and_back(ragged: Ragged) -> None:
    owner = ragged.owner(10)
    assert owner.tolist() == [2, 4, 4, -1, 0, -1, -1, 0, -1, 4]
    assert lists(Ragged.by_owner(owner, 5)) == PARTS
    assert lists(Ragged.by_owner(np.array([], dtype=np.int64), 3)) == [[], [], []]
    assert lists(Ragged.by_owner(np.array([1, 1]), 3)) == [[], [0, 1], []]  # the last parts are empty, too
    assert ragged.part_of_row.tolist() == [0, 0, 2, 4, 4, 4]
    assert ragged.lengths.tolist() == [2, 0, 1, 0, 3]


def test_where_take_and_sums(ragged: Ragged) -> None:
    assert lists(ragged.where(ragged.rows % 2 == 1)) == [[7], [], [], [], [1, 9]]
    assert lists(ragged.take(np.array([4, 1, 0]))) == [[1, 2, 9], [], [4, 7]]
    assert ragged.places(np.array([4, 1, 0])).tolist() == [3, 4, 5, 0, 1]
    assert ragged.sums(ragged.rows).tolist() == [11, 0, 0, 0, 12]  # an empty part is 0, not what follows it
    assert ragged.sums(ragged.rows > 1).tolist() == [2, 0, 0, 0, 2]
