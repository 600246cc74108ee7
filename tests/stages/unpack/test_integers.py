"""Integers of 4 and 8 bits, against compressed-tensors' own decompression."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
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

from layerstream.stages.unpack.integers import IntPacking

RNG = np.random.default_rng(4)
# 10,000 groups and more; the rows are no multiple of those that a word of zero points holds.
ROWS, COLUMNS, GROUP = 2003, 160, 32
STRATEGIES = {"tensor": (1,), "channel": (ROWS, 1), "group": (ROWS, COLUMNS // GROUP)}


def random_integers(bits, *shape):
    limit = 1 << (bits - 1)
    return torch.from_numpy(RNG.integers(-limit, limit, shape, dtype=np.int8))


def scheme_of(bits, strategy, symmetric):
    group = {"group_size": GROUP} if strategy == "group" else {}
    arguments = QuantizationArgs(
        num_bits=bits, type="int", strategy=strategy, symmetric=symmetric, **group
    )
    return QuantizationScheme(targets=["Linear"], weights=arguments)


def assert_decompressed(bits, parts, reference):
    packing = IntPacking(bits=bits, columns=COLUMNS)
    for dtype in DTYPES:
        values = unpacked(packing, parts, tuple(reference.shape), dtype)
        assert_equal_bits(values, reference.to(dtype))
    few = [at_odd_address(part) for part in parts]
    out = torch.empty(3, COLUMNS, dtype=torch.bfloat16)
    packing.unpack(few, ROWS - 3, out)
    assert_equal_bits(out, reference[-3:].to(torch.bfloat16))


@pytest.mark.usefixtures("way")
@covering(
    bits=[4, 8],
    strategy=list(STRATEGIES),
    symmetric={"symmetric": True, "asymmetric": False},
    stored=DTYPES,
)
def test_packed_integers_have_the_bits_that_decompression_gives_them(
    bits, strategy, symmetric, stored
):
    state = {
        "weight_packed": pack_to_int32(random_integers(bits, ROWS, COLUMNS), bits),
        "weight_scale": difficult_scales(RNG, STRATEGIES[strategy], stored),
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    parts = [state["weight_packed"], state["weight_scale"]]
    if not symmetric:
        zeros = random_integers(bits, *STRATEGIES[strategy])
        if strategy != "tensor":
            zeros = pack_to_int32(zeros, bits, packed_dim=0)
        state["weight_zero_point"] = zeros
        parts.append(zeros)
    scheme = scheme_of(bits, strategy, symmetric)
    reference = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert_decompressed(bits, parts, reference)


@pytest.mark.usefixtures("way")
@covering(
    strategy=list(STRATEGIES),
    symmetric={"symmetric": True, "asymmetric": False},
    stored=DTYPES,
)
def test_plain_integers_have_the_bits_that_decompression_gives_them(strategy, symmetric, stored):
    state = {
        "weight": random_integers(8, ROWS, COLUMNS),
        "weight_scale": difficult_scales(RNG, STRATEGIES[strategy], stored),
    }
    if not symmetric:
        state["weight_zero_point"] = random_integers(8, *STRATEGIES[strategy])
    scheme = scheme_of(8, strategy, symmetric)
    reference = IntQuantizationCompressor.decompress(state, scheme)["weight"]
    assert_decompressed(8, list(state.values()), reference)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bits", [4, 8])
def test_experts_are_unpacked_as_one_matrix_whose_words_begin_anew(bits):
    # 5 rows and 21 columns fill no word.
    weights, zeros = random_integers(bits, 3, 5, 21), random_integers(bits, 3, 5, 3)
    packed = pack_to_int32(weights, bits)
    scales = difficult_scales(RNG, (3, 5, 3), torch.float32)
    packed_zeros = pack_to_int32(zeros, bits, packed_dim=0)
    spread = [each.repeat_interleave(7, dim=2).flatten(0, 1) for each in (zeros, scales)]
    expected = (weights.flatten(0, 1).float() - spread[0]) * spread[1]
    packing = IntPacking(bits=bits, columns=21)
    for each in (zeros, packed_zeros):
        parts = [packed, scales, each]
        assert_equal_bits(unpacked(packing, parts, (15, 21), torch.float32), expected)
        assert_windows_equal_the_whole(packing, parts, (15, 21))


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([torch.int8, (4, 16), (4, 2)], "int32 words or int8"),
        ([torch.int32, (4, 3), (4, 2)], "Rows of 16 numbers are not 3 elements"),
        ([torch.int32, (4, 2), (4, 3)], "do not fit 4 rows of 16"),
        ([torch.int32, (4, 2), (4, 2), (3, 2)], "Zero points"),
        ([torch.int32, (4, 2), (4, 2), (4, 2), (16,)], "weight_g_idx"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, problem):
    dtype, weights, scales, *rest = parts
    tensors = [torch.zeros(weights, dtype=dtype), torch.ones(scales)]
    tensors += [torch.zeros(shape, dtype=torch.int8) for shape in rest]
    with pytest.raises(ValueError, match=problem):
        IntPacking(bits=4, columns=16).unpack(tensors, 0, torch.empty(4, 16))


def test_integers_of_other_widths_are_refused():
    with pytest.raises(ValueError, match="not of 3"):
        IntPacking(bits=3, columns=16)
