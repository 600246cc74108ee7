"""Packed weights for tests: random bytes with difficult scales, and a comparison of bits."""

import numpy as np
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Zeros, subnormal, largest, infinite, and NaN with all and with few bits of its payload set.
DIFFICULT_HALVES = (0, 0x8000, 1, 0x83FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7FFF, 0xFE00, 0x7D01)
DIFFICULT_SINGLES = (
    *(0, 1 << 31, 1, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF),
    *(0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFC00000, 0x7FC00001, 0x477FE000, 0x33000001),
)
# Where a GGUF block has the halves that everything in it is multiplied with.
SCALE_HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "MXFP4": (),
}


def assert_equal_bits(values, reference):
    """Equal in every bit, where the reference is not NaN; NaN where it is."""
    assert values.dtype == reference.dtype
    assert values.shape == reference.shape
    bits = torch.int32 if values.dtype == torch.float32 else torch.int16
    equal = values.view(bits) == reference.view(bits)
    equal |= values.isnan() & reference.isnan()
    wrong = (~equal).nonzero()
    first = tuple(wrong[0].tolist()) if len(wrong) else ()
    assert not len(wrong), (
        f"{len(wrong)} differ, first {first}: {values[first]}, {reference[first]}"
    )


def difficult_scales(rng, shape, dtype):
    """Scales of any size and sign, a tenth of them difficult."""
    if dtype == torch.float32:
        bits = rng.standard_normal(shape).astype(np.float32).view(np.uint32)
        difficult = np.array(DIFFICULT_SINGLES, np.uint32)
    elif dtype == torch.float16:
        bits, difficult = rng.integers(0, 1 << 16, shape), np.array(DIFFICULT_HALVES)
    else:
        bits, difficult = rng.integers(0, 1 << 16, shape), np.array(DIFFICULT_SINGLES) >> 16
    bits = np.where(rng.random(shape) < 0.1, rng.choice(difficult, shape), bits)
    if dtype == torch.float32:
        return torch.from_numpy(bits.astype(np.uint32)).view(dtype)
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(dtype)


def at_odd_address(tensor):
    """The same tensor, as a file may give it: nothing about its address is even."""
    data = bytearray(b"xyz") + bytearray(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    kept = torch.frombuffer(data, dtype=tensor.dtype, offset=3, count=tensor.numel())
    return kept.reshape(tensor.shape)


def unpacked(packing, parts, shape, dtype):
    """All rows, over garbage that must not be seen afterwards."""
    out = torch.full(shape, 77.0, dtype=dtype)
    packing.unpack(parts, 0, out)
    return out


def assert_windows_equal_the_whole(packing, parts, shape, dtype=torch.bfloat16):
    whole = unpacked(packing, parts, shape, dtype)
    for tile in (1, 3, shape[0] - 1):
        tiled = torch.full(shape, 77.0, dtype=dtype)
        for first in range(0, shape[0], tile):
            packing.unpack(parts, first, tiled[first : first + tile])
        assert_equal_bits(tiled, whole)
