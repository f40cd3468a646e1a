"""Sums at places that repeat."""

import pytest
import torch

from fedlabel.inference.sums import add_at


def test_rows_are_added_where_they_belong() -> None:
    total = torch.ones(3, 2)
    returned = add_at(total, torch.tensor([2, 0, 2]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert returned is total
    assert total.tolist() == [[4.0, 5.0], [1.0, 1.0], [7.0, 9.0]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sums_on_cuda_are_the_same_to_the_bit_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 50, (200_000,), generator=generator).cuda()
    values = torch.randn(200_000, generator=generator).cuda()
    sums = [add_at(torch.zeros(50, device="cuda"), index, values) for _ in range(20)]
    assert all(torch.equal(sums[0], other) for other in sums)
    expected = torch.zeros(50, dtype=torch.float64).index_add_(0, index.cpu(), values.cpu().double())
    torch.testing.assert_close(sums[0].cpu().double(), expected, atol=1e-2, rtol=1e-4)
