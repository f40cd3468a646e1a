"""How a cohort is cut up, and the sums of its models: arithmetic, order, types."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fedlabel.methods.uploads import ModelPart
from server.blocks import WeightedSum, cut_into_blocks, cut_into_tasks, weighted_sum


@pytest.mark.parametrize(
    ("cohort", "sizes"),
    [
        (1, [1]),
        (10, [1] * 10),
        (31, [1] * 31),
        (32, [2] * 16),
        (50, [3] * 16 + [2]),
        (200, [8] * 25),
        (1001, [8] * 125 + [1]),
    ],
)
def test_blocks_depend_on_the_size_of_the_cohort_only(cohort: int, sizes: list[int]) -> None:
    blocks = cut_into_blocks(list(range(100, 100 + cohort)))
    assert [len(block) for block in blocks] == sizes
    assert [client for block in blocks for client in block] == list(range(100, 100 + cohort))


@pytest.mark.parametrize(
    ("stack", "sizes"),
    [(1, [3, 3, 3, 3, 1]), (3, [3, 3, 3, 3, 1]), (4, [6, 6, 1]), (6, [6, 6, 1]), (7, [9, 4]), (99, [13])],
)
def test_tasks_are_runs_of_whole_blocks(stack: int, sizes: list[int]) -> None:
    blocks = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12]]
    tasks = cut_into_tasks(blocks, stack)
    assert [sum(map(len, task)) for task in tasks] == sizes
    assert [block for task in tasks for block in task] == blocks


def parts(*values: float, weight: float = 1.0) -> dict[str, ModelPart]:
    return {"model": ModelPart({"w": torch.tensor(values)}, weight)}


def value_of(total: WeightedSum, like: torch.Tensor) -> torch.Tensor:
    mean = total.mean({"w": like})
    assert mean is not None
    return mean["w"]


def test_products_are_rounded_before_they_are_added() -> None:
    """In float64 (1 + 2^-40)(1 - 2^-40) = 1 - 2^-80 rounds to 1, so that -1 + 1 = 0; fused it would be -2^-80.

    Over 9 numbers: vectors of four or eight, and one that is left over.
    """
    total = WeightedSum()
    total.add({"model": ModelPart({"w": torch.full((9,), -1.0, dtype=torch.float64)}, 1.0)})
    total.add({"model": ModelPart({"w": torch.full((9,), 1 + 2**-40, dtype=torch.float64)}, 1 - 2**-40)})
    assert torch.equal(total.totals["model"], torch.zeros(9, dtype=torch.float64))


def test_a_blocks_models_are_added_in_their_order_to_the_bit_however_they_lie_in_memory() -> None:
    """Beside the same additions of rows, written out."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(5, 33, 7, generator=generator)
    weights = (3.0, 0.1, 7.0, 1 / 3, 11.0)
    laid_out = stack.mT.contiguous().mT
    expected = torch.zeros(33 * 7, dtype=torch.float64)
    for value, weight in zip(stack, weights, strict=True):
        expected = expected + value.flatten().double() * weight
    for values in (stack, laid_out):
        models = [ModelPart({"w": value}, weight) for value, weight in zip(values, weights, strict=True)]
        assert torch.equal(weighted_sum(models), expected)
        assert torch.equal(laid_out, stack)  # a client's model is not changed


def test_sums_of_blocks_are_added_in_the_order_of_the_blocks() -> None:
    """1e17 - 1e17 + 1 = 1 and 1 + 1e17 - 1e17 = 0 in float64."""

    def summed(values: Sequence[float]) -> float:
        total = WeightedSum()
        for value in values:
            block = WeightedSum()
            block.add({"model": ModelPart({"w": torch.tensor([value], dtype=torch.float64)}, 1.0)})
            total.merge(block)
        return float(total.totals["model"])

    assert summed([1e17, -1e17, 1.0]) == 1
    assert summed([1.0, 1e17, -1e17]) == 0


def test_a_merged_sum_is_not_changed() -> None:
    """It may be in memory that other processes share."""
    first, second = WeightedSum(), WeightedSum()
    first.add(parts(1.0))
    second.add(parts(5.0))
    total = WeightedSum()
    total.merge(first)
    total.merge(second)
    assert float(total.totals["model"]) == 6
    assert (float(first.totals["model"]), float(second.totals["model"])) == (1, 5)


def test_three_parts_are_averaged_plainly() -> None:
    """Weighted means (1 + 3 * 5) / 4 = 4, 6 and 2; their mean is 4."""
    total = WeightedSum()
    for first, weight in ((1.0, 1.0), (5.0, 3.0)):
        total.add({name: ModelPart({"w": torch.tensor(v)}, w) for name, v, w in (("a", first, weight), ("b", 6, 1.0))})
        total.add({"c": ModelPart({"w": torch.tensor(2.0)}, 1.0)})
    assert float(value_of(total, torch.tensor(0.0))) == 4


def test_a_part_without_weight_keeps_the_model() -> None:
    total = WeightedSum()
    total.add({"a": ModelPart({"w": torch.tensor(1.0)}, 1.0), "b": ModelPart({"w": torch.tensor(1.0)}, 0.0)})
    assert total.mean({"w": torch.tensor(0.0)}) is None
    assert WeightedSum().mean({"w": torch.tensor(0.0)}) is None


def test_arrays_of_any_type_and_layout_come_back_in_their_own() -> None:
    stack = torch.arange(24.0).reshape(2, 3, 4)
    model = {
        "a": stack[1].T,  # a view, and not contiguous
        "n": torch.tensor(2**40),
        "used": torch.tensor([True, False]),
        "empty": torch.zeros(0, 5),
        "d": torch.tensor([0.1], dtype=torch.float64),
    }
    assert weighted_sum([ModelPart(model, 1.0)]).dtype == torch.float64
    total = WeightedSum()
    total.add({"model": ModelPart(model, 3.0)})
    total.add({"model": ModelPart(model, 7.0)})
    mean = total.mean(model)
    assert mean is not None
    assert list(mean) == list(model)
    for name, value in model.items():
        assert mean[name].dtype == value.dtype
        assert torch.allclose(mean[name].double(), value.double(), rtol=1e-15)


def test_a_sum_owns_its_numbers() -> None:
    """A client's model may be a view of a stack that is trained on."""
    weights = torch.ones(3, dtype=torch.float64)
    total = WeightedSum()
    total.add({"model": ModelPart({"w": weights}, 1.0)})
    weights.fill_(9)
    assert float(total.totals["model"].sum()) == 3
