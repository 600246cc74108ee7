"""fp8, packed fp4 and MXFP4, against transformers' own conversions and compressed-tensors' decompression."""

import math

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from support.packed import (
    DTYPES,
    assert_equal_bits,
    assert_windows_equal_the_whole,
    at_odd_address,
    difficult_scales,
    unpacked,
)
from support.selection import covering
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from layerstream.stages.unpack.fp8 import Fp8Packing
from layerstream.stages.unpack.mxfp4 import Mxfp4Packing

RNG = np.random.default_rng(8)
SHAPE = (300, 160)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)


def random_bytes(*shape):
    return torch.from_numpy(RNG.integers(0, 256, shape, dtype=np.uint8))


def random_scales(shape, dtype):
    if dtype in EXPONENTS:
        return random_bytes(*shape).view(dtype)
    return difficult_scales(RNG, shape, dtype)


def assert_dequantized(weights, scales, **choices):
    """Compare with transformers for every output, and in windows."""
    fp4 = weights.dtype in {torch.int8, torch.float4_e2m1fn_x2}
    packing = Fp8Packing(packs_fp4=fp4, **choices)
    reference = Fp8Dequantize(None)
    for dtype in DTYPES:
        expected = reference._dequantize_one(weights, scales, dtype).flatten(0, -2)
        assert_equal_bits(unpacked(packing, [weights, scales], expected.shape, dtype), expected)
    parts = [at_odd_address(weights), at_odd_address(scales)]
    assert_windows_equal_the_whole(packing, parts, expected.shape)


@pytest.mark.usefixtures("way")
@covering(
    grid=[(3, 5), (300, 1), (1, 1), (2, 10), (300, 160)],
    stored=[torch.float32, torch.bfloat16, torch.float16, *EXPONENTS],
)
def test_fp8_has_the_bits_that_transformers_gives_it(grid, stored):
    for dtype in FP8:
        assert_dequantized(random_bytes(*SHAPE).view(dtype), random_scales(grid, stored))


@pytest.mark.usefixtures("way")
def test_every_byte_meets_every_difficult_scale():
    for dtype in FP8:
        weights = torch.arange(256, dtype=torch.uint8).view(dtype).repeat(512, 1)
        for stored in (torch.float32, torch.bfloat16, torch.float16):
            assert_dequantized(weights, difficult_scales(RNG, (512, 2), stored))
        assert_dequantized(weights[:256], torch.arange(256, dtype=torch.uint8)[:, None])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("scales", [(), (1,), (1, 1), (3,), (3, 1, 1), (3, 2, 5)], ids=str)
def test_experts_may_share_a_scale_or_have_their_own(scales):
    weights = random_bytes(3, 4, 40).view(torch.float8_e4m3fn)
    assert_dequantized(weights, random_scales(scales, torch.float32))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.int8, torch.float4_e2m1fn_x2])
def test_packed_fp4_has_the_bits_that_transformers_gives_it(dtype):
    for stored in (torch.float32, *EXPONENTS):
        assert_dequantized(random_bytes(300, 96).view(dtype), random_scales((300, 6), stored))
    # Blocks of an odd width begin in the upper half of a byte.
    assert_dequantized(random_bytes(4, 77).view(dtype), random_scales((2, 14), torch.float32))


@pytest.mark.usefixtures("way")
def test_bits_of_fp8_may_be_stored_as_bytes():
    weights, scales = random_bytes(*SHAPE), random_scales((3, 5), torch.float32)
    for bits, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        expected = unpacked(Fp8Packing(), [weights.view(dtype), scales], SHAPE, torch.float16)
        values = unpacked(Fp8Packing(bits=bits), [weights, scales], SHAPE, torch.float16)
        assert_equal_bits(values, expected)


def decompressed(weights, scales, **choices):
    arguments = QuantizationArgs(num_bits=8, type="float", symmetric=True, **choices)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    state = {"weight": weights, "weight_scale": scales}
    return NaiveQuantizationCompressor.decompress(state, scheme)["weight"]


@pytest.mark.usefixtures("way")
@covering(
    strategy=["tensor", "channel", "group", "block"],
    stored=DTYPES,
)
def test_compressed_tensors_multiply_in_the_dtype_of_the_scales(strategy, stored):
    grid = {"tensor": (1,), "channel": (300, 1), "group": (300, 5), "block": (3, 2)}[strategy]
    block = (128, 128) if strategy == "block" else None
    choices = {"group_size": 32} if strategy == "group" else {}
    choices |= {"block_structure": list(block)} if block else {}
    weights = random_bytes(*SHAPE).view(torch.float8_e4m3fn)
    scales = random_scales(grid, stored)
    expected = decompressed(weights, scales, strategy=strategy, **choices)
    packing = Fp8Packing(arithmetic="scale", block=block)
    for dtype in DTYPES:
        values = unpacked(packing, [weights, scales], SHAPE, dtype)
        assert_equal_bits(values, expected.to(dtype))
    assert_windows_equal_the_whole(packing, [weights, scales], SHAPE)


@pytest.mark.parametrize(
    ("choices", "weights", "scales", "problem"),
    [
        ({}, torch.float16, torch.zeros(2, 2), "float16 cannot be unpacked"),
        ({}, torch.uint8, torch.zeros(2, 2), "uint8 cannot be unpacked"),
        ({}, torch.int8, torch.zeros(2, 2), "int8 cannot be unpacked"),
        ({}, torch.float8_e5m2, torch.zeros(3, 2), "do not fit weights of 4 x 6"),
        ({"block": (3, 3)}, torch.float8_e5m2, torch.zeros(1, 2), "in blocks of 3 x 3"),
        ({}, torch.float8_e5m2, torch.zeros(2, 2, dtype=torch.int32), "Scales of torch.int32"),
        ({"arithmetic": "scale"}, torch.float8_e5m2, torch.zeros(2, 2).byte(), "is computed"),
    ],
)
def test_parts_that_do_not_fit_are_refused(choices, weights, scales, problem):
    packed = torch.zeros(4, 6 * weights.itemsize, dtype=torch.uint8).view(weights)
    with pytest.raises(ValueError, match=problem):
        Fp8Packing(**choices).unpack([packed, scales], 0, torch.empty(4, 6))


@pytest.mark.usefixtures("way")
def test_mxfp4_has_the_bits_that_transformers_gives_it():
    # 10,240 blocks: every byte, and every exponent 40 times.
    shape = (4, 40, 64)
    exponents = torch.arange(math.prod(shape)).to(torch.uint8)[torch.randperm(math.prod(shape))]
    parts = [random_bytes(*shape, 16), exponents.reshape(shape)]
    for dtype in DTYPES:
        reference = convert_moe_packed_tensors(*parts, dtype=dtype).transpose(1, 2)
        expected = reference.reshape(160, 2048)
        assert_equal_bits(unpacked(Mxfp4Packing(), parts, expected.shape, dtype), expected)
    odd = [at_odd_address(part) for part in parts]
    assert_windows_equal_the_whole(Mxfp4Packing(), odd, expected.shape)


def test_mxfp4_without_its_scales_is_refused():
    blocks, scales = torch.zeros(2, 3, 16).byte(), torch.zeros(2, 2).byte()
    with pytest.raises(ValueError, match="a scale for each block of 16 bytes"):
        Mxfp4Packing().unpack([blocks, scales], 0, torch.empty(2, 96))
