"""GGUF's blocks, against the two ways in which transformers unpacks them."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from support.packed import (
    DIFFICULT_HALVES,
    DTYPES,
    SCALE_HALVES,
    assert_equal_bits,
    assert_windows_equal_the_whole,
    at_odd_address,
    unpacked,
)
from transformers.integrations.gguf import dequant

from layerstream.stages.unpack.gguf import GGUF_BLOCKS, GgufPacking

BLOCKS = 10_000
BLOCKS_IN_A_ROW = 5
WAYS = [
    (name, arithmetic)
    for name in GGUF_BLOCKS
    for arithmetic in ("float32", "target")
    if arithmetic == "float32" or GGMLQuantizationType[name] in dequant.GGML_BLOCK
]


def random_blocks(encoding, blocks=BLOCKS):
    """Random bytes, so that every byte of a block takes all values, with difficult halves in a tenth of the blocks."""
    rng = np.random.default_rng(sum(encoding.encode()))
    data = rng.integers(0, 256, (blocks, GGUF_BLOCKS[encoding].nbytes), dtype=np.uint8)
    for place in SCALE_HALVES[encoding]:
        chosen = rng.random(blocks) < 0.1
        halves = rng.choice(np.array(DIFFICULT_HALVES, np.uint16), chosen.sum())
        data[chosen, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(data.reshape(blocks // BLOCKS_IN_A_ROW, -1))


def packing_of(encoding, arithmetic):
    columns = GGUF_BLOCKS[encoding].columns * BLOCKS_IN_A_ROW
    return GgufPacking(encoding=encoding, columns=columns, arithmetic=arithmetic)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("encoding", "arithmetic"), WAYS)
def test_unpacked_blocks_have_the_bits_that_transformers_gives_them(encoding, arithmetic):
    packed, packing = random_blocks(encoding), packing_of(encoding, arithmetic)
    shape = (len(packed), packing.columns)
    if arithmetic == "float32":
        with np.errstate(all="ignore"):
            whole = torch.from_numpy(dequantize(packed.numpy(), GGMLQuantizationType[encoding]))
    for dtype in DTYPES:
        if arithmetic == "target":
            number = int(GGMLQuantizationType[encoding])
            reference = dequant.dequantize(packed, number, dtype).reshape(shape)
        else:
            reference = whole.to(dtype)
        assert_equal_bits(unpacked(packing, [packed], shape, dtype), reference)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("encoding", GGUF_BLOCKS)
def test_windows_of_rows_equal_the_whole_wherever_the_bytes_lie(encoding):
    packed, packing = random_blocks(encoding, 11 * BLOCKS_IN_A_ROW), packing_of(encoding, "float32")
    experts = at_odd_address(packed).reshape(1, 11, -1)
    assert_windows_equal_the_whole(packing, [experts], (11, packing.columns))
    whole = unpacked(packing, [packed], (11, packing.columns), torch.bfloat16)
    assert_equal_bits(unpacked(packing, [experts], whole.shape, torch.bfloat16), whole)


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        ({"encoding": "IQ2_XXS"}, "no kernel for GGUF tensors of type IQ2_XXS"),
        ({"columns": 100}, "Rows of 100 numbers do not consist of Q4_K blocks"),
        ({"arithmetic": "float16"}, "float32 or target"),
        ({"encoding": "Q5_0", "arithmetic": "target"}, "does not read Q5_0"),
    ],
)
def test_what_has_no_kernel_is_refused_by_name(choices, problem):
    with pytest.raises(ValueError, match=problem):
        GgufPacking(**({"encoding": "Q4_K", "columns": 256, "arithmetic": "target"} | choices))


@pytest.mark.parametrize(
    ("nbytes", "first", "shape", "problem"),
    [
        (143, 0, (2, 256), "are 144 bytes"),
        (144, 3, (2, 256), "no rows 3 to 5"),
        (144, -1, (2, 256), "no rows -1 to 1"),
        (144, 0, (2, 255), "rows of 256 numbers"),
    ],
)
def test_windows_that_are_not_there_are_refused(nbytes, first, shape, problem):
    packing = GgufPacking(encoding="Q4_K", columns=256, arithmetic="float32")
    with pytest.raises(ValueError, match=problem):
        packing.unpack([torch.zeros(4, nbytes, dtype=torch.uint8)], first, torch.empty(shape))
