"""Activation functions on some rows of a tensor, with the bits that they have in the whole tensor."""

from collections.abc import Callable

import torch

__all__ = ["activate_rows"]

# torch's element-wise kernels take two vectors at once (of 64 bytes at most; gate and up are half a row each), and give
# a thread no less than so many elements.
_VECTORS_BYTES = 256
_ONE_THREADS_ELEMENTS = 32768


def activate_rows(
    activate: Callable[[torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    rows: torch.Tensor,
    total: int,
) -> torch.Tensor:
    """``activate(values)``, with the bits that it has where ``values`` are these rows of a tensor of ``total`` rows.

    On a CPU, torch computes exponentials in another way at the end of a tensor, or of a thread's share of it, than in its
    middle.
    """
    if values.device.type != "cpu":
        return activate(values)
    columns = values.shape[-1]
    if columns < _ONE_THREADS_ELEMENTS and _without_ends(total, columns, values.itemsize):
        # In one thread each, so that there are no ends here either.
        pieces = torch.split(values, max((_ONE_THREADS_ELEMENTS - 1) // columns, 1))
        return torch.cat([activate(piece) for piece in pieces])
    everything = values.new_zeros((total, columns))
    everything[rows] = values
    return activate(everything)[rows]


def _without_ends(rows: int, columns: int, itemsize: int) -> bool:
    """Whether every thread gets whole vectors of each row of such a tensor, and of the halves of its rows."""
    if columns * itemsize % _VECTORS_BYTES:
        return False
    threads = torch.get_num_threads()
    shares = {
        min(threads, -(-n // _ONE_THREADS_ELEMENTS)) for n in (rows * columns, rows * columns // 2)
    }
    return all(rows * columns * itemsize % (_VECTORS_BYTES * max(each, 1)) == 0 for each in shares)
