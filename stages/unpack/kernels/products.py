"""Products of packed matrices with a few inputs: what ``put`` would store is multiplied and summed instead.

Each product unpacks a row once for up to four tokens. Its arguments are those of the kernel that unpacks, with the number of rows of
the output, a matrix of inputs (tokens, columns), a tuple with one element for each token, and the output (tokens, rows).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import register_jitable

from layerstream.stages.unpack.kernels import gguf_blocks, gguf_k_blocks
from layerstream.stages.unpack.kernels.outputs import total

__all__ = [
    "iq4_nl",
    "iq4_xs",
    "mxfp4",
    "q2_k",
    "q3_k",
    "q4_0",
    "q4_1",
    "q4_k",
    "q5_0",
    "q5_1",
    "q5_k",
    "q6_k",
    "q8_0",
]

# For each token.
_SUMS = 64


def _of_blocks(unpack: Callable[..., None]) -> Callable[..., None]:
    rows_of = register_jitable(unpack)

    def product(
        begin: int,
        end: int,
        packed: Any,
        first: int,
        rows: int,
        blocks: int,
        columns: int,
        inputs: Any,
        tokens: Any,
        out: Any,
    ) -> None:
        sums = np.empty(_SUMS * len(tokens), np.float32)
        for row in range(begin, end):
            sums[:] = 0
            rows_of(0, 1, packed, first + row, blocks, (sums, inputs, columns, tokens), sums)
            for token in range(len(tokens)):
                out[token * rows + row] = total(sums, token)

    # Native code is found by this name.
    product.__name__ = product.__qualname__ = f"product_{unpack.__name__}"
    return product


q4_0 = _of_blocks(gguf_blocks.q4_0)
q4_1 = _of_blocks(gguf_blocks.q4_1)
q5_0 = _of_blocks(gguf_blocks.q5_0)
q5_1 = _of_blocks(gguf_blocks.q5_1)
q8_0 = _of_blocks(gguf_blocks.q8_0)
iq4_nl = _of_blocks(gguf_blocks.iq4_nl)
iq4_xs = _of_blocks(gguf_blocks.iq4_xs)
mxfp4 = _of_blocks(gguf_blocks.mxfp4)
q2_k = _of_blocks(gguf_k_blocks.q2_k)
q3_k = _of_blocks(gguf_k_blocks.q3_k)
q4_k = _of_blocks(gguf_k_blocks.q4_k)
q5_k = _of_blocks(gguf_k_blocks.q5_k)
q6_k = _of_blocks(gguf_k_blocks.q6_k)
