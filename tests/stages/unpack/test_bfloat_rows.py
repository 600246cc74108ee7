"""Products of a few rows with matrices of bfloat16, where compiled kernels sum as torch does."""

import pytest
import torch

from layerstream.stages.unpack import bfloat_rows
from layerstream.stages.unpack.bfloat_rows import BfloatMatrices, summed_columns

ROWS, COLUMNS = 96, 1216  # more than two sums of 512 columns


@pytest.fixture
def matrices() -> torch.Tensor:
    if not summed_columns(ROWS, COLUMNS):
        pytest.skip("this processor has no AVX-512 BF16, or torch sums in another order on it")
    generator = torch.Generator().manual_seed(3)
    # Each behind a gap, as the other tensors of a cell are.
    memory = torch.randn((5, ROWS * COLUMNS + 64), generator=generator).bfloat16()
    return memory[:, 64:].view(5, ROWS, COLUMNS)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_products_have_the_bits_of_torchs(matrices: torch.Tensor, threads: int) -> None:
    before = torch.get_num_threads()
    inputs = torch.randn((6, COLUMNS), generator=torch.Generator().manual_seed(4)).bfloat16()
    inputs[:, 1::2] = inputs[:, ::2]  # some terms nearly cancel one another
    matrices[:, :, 1::2] = -matrices[:, :, ::2].roll(1, dims=1)
    torch.set_num_threads(threads)
    try:
        expected = torch.cat(
            [
                torch.mm(inputs[each], matrices[place].T)
                for place, each in ((4, slice(1)), (0, slice(1, 3)), (2, slice(3, 6)))
            ]
        )
        summed = summed_columns(ROWS, COLUMNS)
        if len(summed) < 3:
            pytest.skip(f"torch sums in another order in {threads} threads")
        fast = BfloatMatrices(matrices, summed)
        assert fast.fit([1, 2, 3])
        assert torch.equal(fast.products([4, 0, 2], [1, 2, 3], inputs), expected)
    finally:
        torch.set_num_threads(before)


def test_the_order_is_that_of_a_number_of_threads(matrices: torch.Tensor) -> None:
    before = torch.get_num_threads()
    fast = BfloatMatrices(matrices, summed_columns(ROWS, COLUMNS))
    assert fast.fit([1])
    torch.set_num_threads(before + 1)
    try:
        assert not fast.fit([1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("matrices")
def test_a_sum_in_another_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # The same terms, the last ones first.
    mm = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda rows, columns: mm(rows.flip(1), columns.flip(0).contiguous())
    )
    bfloat_rows._summed_columns.cache_clear()
    try:
        assert summed_columns(ROWS, COLUMNS) == ()
    finally:
        bfloat_rows._summed_columns.cache_clear()


@pytest.mark.parametrize("shape", [(8, 16), (1000, 1024), (1024, 1000)])
def test_small_matrices_and_odd_ones_are_left_to_torch(shape: tuple[int, int]) -> None:
    assert summed_columns(*shape) == ()
