"""Sums at places that repeat."""

import pytest
import torch

from fedlabel.inference.sums import IndexedSums, add_at


def test_rows_are_added_where_they_belong() -> None:
    total = torch.ones(3, 2)
    returned = add_at(total, torch.tensor([2, 0, 2]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert returned is total
    assert total.tolist() == [[4.0, 5.0], [1.0, 1.0], [7.0, 9.0]]


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_sorted_index_adds_in_the_order_of_the_index(shape: tuple[int, ...]) -> None:
    """Some rows get nothing; so the same bits, sorted or not."""
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, 40, (500,), generator=generator)
    values = torch.randn(500, *shape, generator=generator)
    found = [IndexedSums(index, 50, sort).add_to(torch.zeros(50, *shape), values) for sort in (False, True)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], add_at(torch.zeros(50, *shape), index, values))
    onto = IndexedSums(index, 50, sort=True).add_to(torch.ones(50, *shape), values)
    torch.testing.assert_close(onto, found[0] + 1)


@pytest.mark.parametrize("sort", [False, True])
def test_an_empty_index_adds_nothing(sort: bool) -> None:
    total = torch.ones(4, 2)
    assert IndexedSums(torch.zeros(0, dtype=torch.int64), 4, sort).add_to(total, torch.zeros(0, 2)) is total
    assert bool((total == 1).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sums_on_cuda_are_the_same_to_the_bit_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 50, (200_000,), generator=generator).cuda()
    values = torch.randn(200_000, generator=generator).cuda()
    sums = [add_at(torch.zeros(50, device="cuda"), index, values) for _ in range(20)]
    assert all(torch.equal(sums[0], other) for other in sums)
    indexed = IndexedSums(index, 50).add_to(torch.zeros(50, device="cuda"), values)
    assert torch.equal(indexed.cpu(), torch.zeros(50).index_add_(0, index.cpu(), values.cpu()))
    expected = torch.zeros(50, dtype=torch.float64).index_add_(0, index.cpu(), values.cpu().double())
    torch.testing.assert_close(sums[0].cpu().double(), expected, atol=1e-2, rtol=1e-4)
