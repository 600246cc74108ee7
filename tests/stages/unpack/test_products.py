"""Products with packed weights, against those with the unpacked ones in float64, within the bound that ``Packing`` states."""

import numpy as np
import pytest
import torch
from support.packed import SCALE_HALVES

from layerstream.stages.unpack.fp8 import Fp8Packing
from layerstream.stages.unpack.gguf import GGUF_BLOCKS, GgufPacking
from layerstream.stages.unpack.integers import IntPacking
from layerstream.stages.unpack.mxfp4 import Mxfp4Packing

ROWS, COLUMNS, TOKENS = 37, 1024, 7


def random_bytes(rng, *shape):
    return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))


def gguf(encoding):
    rng, block = np.random.default_rng(len(encoding)), GGUF_BLOCKS[encoding]
    data = rng.integers(0, 256, (ROWS * COLUMNS // block.columns, block.nbytes), dtype=np.uint8)
    for place in SCALE_HALVES[encoding]:
        halves = rng.standard_normal((len(data), 1)).astype(np.float16)
        data[:, place : place + 2] = halves.view(np.uint8)
    if not SCALE_HALVES[encoding]:
        data[:, 0] = rng.integers(100, 140, len(data))
    packing = GgufPacking(encoding=encoding, columns=COLUMNS, arithmetic="float32")
    return packing, [torch.from_numpy(data.reshape(ROWS, -1))]


def others():
    rng = np.random.default_rng(1)
    normal = torch.from_numpy(rng.standard_normal((ROWS, COLUMNS // 32)).astype(np.float32))
    exponents = torch.from_numpy(rng.integers(100, 140, normal.shape, dtype=np.uint8))
    # Without NaN, which every sum would be.
    fp8 = (random_bytes(rng, ROWS, COLUMNS) & 0xBF).view(torch.float8_e4m3fn)
    blocks = random_bytes(rng, ROWS, COLUMNS // 32, 16)
    nibbles, words = blocks.flatten(1), random_bytes(rng, ROWS, COLUMNS)
    zeros = torch.from_numpy(rng.integers(-8, 8, normal.shape, dtype=np.int8))
    whole = normal[:, :1].contiguous().half()
    odd = normal.repeat(1, 2).bfloat16()
    return {
        "fp8": (Fp8Packing(), [fp8, normal]),
        "fp8 in bfloat16": (Fp8Packing(arithmetic="scale"), [fp8, normal.bfloat16()]),
        "fp4": (Fp8Packing(packs_fp4=True), [nibbles.view(torch.int8), normal]),
        "mxfp4": (Mxfp4Packing(), [blocks, exponents]),
        "int4": (IntPacking(bits=4, columns=COLUMNS), [nibbles.view(torch.int32), normal, zeros]),
        "int8": (IntPacking(bits=8, columns=COLUMNS), [words.view(torch.int32), normal]),
        "int8 in half": (IntPacking(bits=8, columns=COLUMNS), [words.view(torch.int8), whole]),
        "fp8 in blocks": (Fp8Packing(), [fp8[:36], normal[:12, ::4].contiguous()]),
        "int8 in groups of 16": (
            IntPacking(bits=8, columns=COLUMNS),
            [words.view(torch.int8), odd],
        ),
    }


CASES = {name: gguf(name) for name in GGUF_BLOCKS} | others()


# Of numbers that are rounded to this dtype when they are unpacked, but not in a product.
PRECISION = {torch.bfloat16: 8, torch.float16: 11}


@pytest.mark.parametrize("case", CASES)
def test_products_are_as_near_to_the_exact_ones_as_stated(case, way):
    packing, parts = CASES[case]
    inputs = torch.randn(TOKENS, COLUMNS, generator=torch.Generator().manual_seed(2))
    kernel = way == "compiled" and case != "int8 in groups of 16"
    roundings = (COLUMNS / 64 + 8 if kernel else COLUMNS) * 2.0**-24
    stated = roundings / (1 - roundings)
    bits = PRECISION.get(parts[1].dtype) if len(parts) > 1 else None
    # With scales of float32, numbers are not rounded further.
    references = [(parts, stated + (2.0**-bits / (1 - 2.0**-bits) if bits else 0.0))]
    if bits and kernel:
        references.append(([parts[0], parts[1].float(), *parts[2:]], stated))
    rows = len(parts[0])
    for reference, most in references:
        weights = torch.empty(rows, COLUMNS)
        packing.unpack(reference, 0, weights)
        exact = inputs.double() @ weights.double().T
        bound = most * (inputs.double().abs() @ weights.double().abs().T)
        # Seven tokens are four, two and one; rows 5 to 36 are neither the first nor the last.
        for tokens, first, last in ((7, 0, rows), (1, 5, 36), (2, rows - 1, rows)):
            out = torch.full((tokens, last - first), 77.0)
            packing.multiply(parts, first, inputs[:tokens], out)
            error = (out.double() - exact[:tokens, first:last]).abs()
            assert (error <= bound[:tokens, first:last]).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("dtype", "byte"), [("float8_e4m3fn", 0xFF), ("float8_e5m2", 0x7E)])
@pytest.mark.parametrize("width", [32, 128])
def test_a_row_of_fp8_with_a_missing_number_has_no_product(dtype, byte, width):
    weights = torch.full((5, COLUMNS), 0x7B, dtype=torch.uint8)
    weights[2, -1] = byte
    parts = [weights.view(getattr(torch, dtype)), torch.ones(5, COLUMNS // width)]
    parts[1][4, 1] = np.nan
    out = torch.zeros(2, 5)
    Fp8Packing().multiply(parts, 0, torch.ones(2, COLUMNS), out)
    assert out.isnan().tolist() == [[False, False, True, False, True]] * 2


@pytest.mark.usefixtures("way")
def test_infinite_and_missing_numbers_stay_what_they_are_in_a_product():
    packing, [packed] = gguf("Q8_0")
    packed[1, :2] = torch.tensor([np.inf], dtype=torch.float16).view(torch.uint8)
    packed[1, 2:34] = 1
    packed[2, :2] = torch.tensor([np.nan], dtype=torch.float16).view(torch.uint8)
    out = torch.empty(1, 4)
    packing.multiply([packed], 0, torch.ones(1, COLUMNS), out)
    assert out.isfinite().tolist() == [[True, False, False, True]]
    assert out[0, 1] == np.inf
    assert out[0, 2].isnan()


@pytest.mark.parametrize(
    ("inputs", "out", "first", "problem"),
    [
        (torch.zeros(2, 1023), torch.zeros(2, 37), 0, "do not fit inputs"),
        (torch.zeros(2, 1024), torch.zeros(3, 37), 0, "do not fit inputs"),
        (torch.zeros(2, 1024), torch.zeros(2, 37), 1, "no rows 1 to 38"),
        (torch.zeros(2, 1024).bfloat16(), torch.zeros(2, 37), 0, "the inputs are torch.bfloat16"),
        (torch.zeros(2, 1024), torch.zeros(37, 2).T, 0, "the outputs are"),
    ],
)
@pytest.mark.parametrize("case", ["Q8_0", "fp8"])
def test_inputs_and_outputs_that_do_not_fit_are_refused(case, inputs, out, first, problem):
    packing, parts = CASES[case]
    with pytest.raises(ValueError, match=problem):
        packing.multiply(parts, first, inputs, out)
