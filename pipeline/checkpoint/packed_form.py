"""Packed tensors from headers alone: how they are encoded, and what they take unpacked. Pure."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint, TensorInfo

__all__ = ["PackedForm", "packed_form"]

_BITS_OF_WORD = 32
_ITEM_BYTES = 2
_FLOAT32_BYTES = 4


class PackedForm(NamedTuple):
    """How a tensor is packed."""

    encoding: str
    """The name under which the rate of unpacking is measured: "fp8", "Q4_K"."""
    plain_bytes: int
    """What it takes unpacked; 0 for scales."""


def packed_form(checkpoint: Checkpoint, info: TensorInfo) -> PackedForm | None:
    """How ``info`` is packed, as far as names and dtypes tell; None for a plain tensor.

    The unpacked dtypes are transformers' defaults: 32 bits for the blocks of GGUF, 16 for quantised safetensors.
    """
    if info.encoding is not None:
        return PackedForm(info.encoding, math.prod(info.logical_shape) * _FLOAT32_BYTES)
    settings = (checkpoint.config or {}).get("quantization_config")
    if not isinstance(settings, Mapping):
        return None
    return _form(str(settings.get("quant_method")), settings, info, _ITEM_BYTES)


def _form(
    method: str, settings: Mapping[str, Any], info: TensorInfo, item_bytes: int
) -> PackedForm | None:
    name = info.name.rpartition(".")[2]
    if "scale" in name or "zero_point" in name:
        return PackedForm(method, 0)
    if info.dtype.startswith("float8"):
        return PackedForm("fp8", info.nbytes * item_bytes)
    if method == "mxfp4" and name.endswith("_blocks"):
        return PackedForm("mxfp4", 2 * info.nbytes * item_bytes)
    if name == "weight_packed":
        bits = _bits(settings)
        return PackedForm(f"int{bits}", info.nbytes * 8 // bits * item_bytes)
    if info.dtype == "int8":
        return PackedForm("int8", info.nbytes * item_bytes)
    return None


def _bits(settings: Mapping[str, Any]) -> int:
    """Of a weight in compressed-tensors' packed format; 4 if the settings do not say."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
        if type(bits) is int and 0 < bits <= _BITS_OF_WORD:
            return bits
    return 4
