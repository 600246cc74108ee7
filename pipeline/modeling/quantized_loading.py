"""Quantised checkpoints: which ones are streamed, and how loading them is recorded.

transformers unpacks them while it loads, where there is no kernel for the packed form (on a CPU). Its functions that do so
record one operation when they get tracers (see unpacking.py), and work as ever otherwise.
"""

import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from layerstream.pipeline.checkpoint.quantization import refuse_quantization
from layerstream.pipeline.modeling.config import text_config_of
from layerstream.pipeline.modeling.tracer_tensor import Tracer
from layerstream.pipeline.modeling.unpacking import unpacked
from layerstream.stages.errors import ModelError
from layerstream.stages.unpack.fp8 import Fp8Packing
from layerstream.stages.unpack.integers import IntPacking
from layerstream.stages.unpack.mxfp4 import Mxfp4Packing
from layerstream.stages.unpack.packing import Packing

__all__ = ["dequantized_config", "recorded_unpacking"]

_REMEDY = (
    "use the checkpoint that it was made from, or load this one with transformers' from_pretrained"
)
# Packages that transformers wants for each method.
_PACKAGES = {"fp8": "accelerate", "mxfp4": "accelerate", "compressed-tensors": "compressed_tensors"}


def dequantized_config(config: Any, path: Path) -> Any:
    """``config``, or for a quantised checkpoint a copy of it that has transformers unpack all weights.

    Raises:
        ModelError: The checkpoint is quantised in a way that is not supported.
    """
    quantization = _quantization_of(config)
    if quantization is None:
        return config
    refuse_quantization(quantization, path)
    method = str(quantization["quant_method"])
    package = _PACKAGES[method]
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            f"{path} is quantised with {method!r}, for which transformers needs the package {package}: install "
            "layerstream[hf]."
        )
    changed = copy.deepcopy(config)
    holder = changed if getattr(changed, "quantization_config", None) else text_config_of(changed)
    holder.quantization_config = {**quantization, "dequantize": True}
    return changed


def _quantization_of(config: Any) -> dict[str, Any] | None:
    for holder in (config, config.get_text_config(decoder=True)):
        found = getattr(holder, "quantization_config", None)
        if found is not None:
            if not isinstance(found, Mapping):
                found = found.to_dict()
            return dict(found)
    return None


@contextmanager
def recorded_unpacking() -> Iterator[None]:
    """Let transformers' functions that unpack weights record it, if they get tracers."""
    with ExitStack() as stack:
        from transformers.integrations import finegrained_fp8, mxfp4

        original_fp8 = finegrained_fp8.Fp8Dequantize._dequantize_one  # noqa: SLF001 - no public function does this
        stack.enter_context(
            patch.object(
                finegrained_fp8.Fp8Dequantize, "_dequantize_one", _recording_fp8(original_fp8)
            )
        )
        stack.enter_context(
            patch.object(
                mxfp4,
                "convert_moe_packed_tensors",
                _recording_mxfp4(mxfp4.convert_moe_packed_tensors),
            )
        )
        if importlib.util.find_spec("compressed_tensors") is not None:
            stack.enter_context(_recorded_compressors())
        yield


def _recording_fp8(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def dequantize(
        self: Any, quantized: Any, scales: Any, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        if not isinstance(quantized, Tracer):
            return original(self, quantized, scales, output_dtype)
        shape = list(quantized.shape)
        packs_fp4 = quantized.dtype in {torch.int8, torch.float4_e2m1fn_x2}
        if packs_fp4:
            shape[-1] *= 2
        dtype = output_dtype
        if dtype is None:
            wide = scales.dtype.is_floating_point and scales.element_size() > 1
            dtype = scales.dtype if wide else torch.bfloat16
        return unpacked(
            [quantized, scales],
            Fp8Packing(packs_fp4=packs_fp4),
            shape=shape,
            dtype=dtype,
            on_device=lambda *parts: original(self, *parts, dtype),
        )

    return dequantize


def _recording_mxfp4(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def convert(
        blocks: Any, scales: Any, *, dtype: torch.dtype = torch.bfloat16, **kwargs: Any
    ) -> torch.Tensor:
        if not isinstance(blocks, Tracer):
            return original(blocks, scales, dtype=dtype, **kwargs)
        *leading, groups, width = blocks.shape
        plain = unpacked(
            [blocks, scales],
            Mxfp4Packing(),
            shape=(*leading, groups * width * 2),
            dtype=dtype,
            on_device=lambda *parts: original(*parts, dtype=dtype).transpose(1, 2),
        )
        return plain.transpose(1, 2).contiguous()

    return convert


@contextmanager
def _recorded_compressors() -> Iterator[None]:
    from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from transformers.integrations.compressed_tensors import CompressedTensorsDequantize

    with (
        patch.object(
            NaiveQuantizationCompressor,
            "decompress",
            _recording_decompress(NaiveQuantizationCompressor.decompress),
        ),
        patch.object(
            PackedQuantizationCompressor,
            "decompress",
            _recording_decompress(PackedQuantizationCompressor.decompress),
        ),
        patch.object(
            CompressedTensorsDequantize,
            "convert",
            _recording_convert(CompressedTensorsDequantize.convert),
        ),
    ):
        yield


def _recording_decompress(original: Callable[..., Any]) -> Any:
    """``decompress`` of a compressor, for the tensors of one module."""

    def decompress(state: Mapping[str, Any], scheme: Any) -> dict[str, Any]:
        name = "weight_packed" if "weight_packed" in state else "weight"
        if not isinstance(state.get(name), Tracer):
            result: dict[str, Any] = original(state, scheme)
            return result
        return {"weight": _decompressed(state, name, scheme, original)}

    return staticmethod(decompress)


def _decompressed(
    state: Mapping[str, Any], name: str, scheme: Any, original: Callable[..., Any]
) -> torch.Tensor:
    weights = scheme.weights
    stored, scale = state[name], state["weight_scale"]
    zero_point = None if weights.symmetric else state.get("weight_zero_point")
    parts = [stored, scale, *([] if zero_point is None else [zero_point])]
    names = [name, "weight_scale", *([] if zero_point is None else ["weight_zero_point"])]
    shape = list(stored.shape)
    if name == "weight_packed":
        shape[-1] = shape[-1] * 32 // weights.num_bits

    def on_device(*tensors: torch.Tensor) -> torch.Tensor:
        found = dict(zip(names, tensors, strict=True))
        found["weight_shape"] = torch.tensor(shape)
        unpacked_weight: torch.Tensor = original(found, scheme)["weight"]
        return unpacked_weight

    return unpacked(
        parts,
        _packing_of(weights, columns=shape[-1]),
        shape=shape,
        dtype=scale.dtype,
        on_device=on_device,
        rounds=True,
    )


def _packing_of(weights: Any, *, columns: int) -> Packing:
    """Of weights with compressed-tensors' arguments ``weights``."""
    if str(weights.type) == "float":
        block = getattr(weights, "block_structure", None)
        return Fp8Packing(arithmetic="scale", block=tuple(block) if block else None)
    if weights.num_bits not in {4, 8}:
        raise ModelError(
            f"The checkpoint has integers of {weights.num_bits} bits; only 4 and 8 can be unpacked: {_REMEDY}."
        )
    return IntPacking(bits=weights.num_bits, columns=columns)


def _recording_convert(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """``CompressedTensorsDequantize.convert``, which fills a buffer with one expert after the other."""
    from compressed_tensors.compressors import BaseCompressor
    from transformers.integrations import compressed_tensors

    def convert(self: Any, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        is_dense = "weight" in input_dict or "weight_scale" in input_dict
        lists = {
            key: value if isinstance(value, list) else [value] for key, value in input_dict.items()
        }
        if is_dense or not isinstance(next(iter(lists.values()))[0], Tracer):
            return original(self, input_dict, *args, **kwargs)
        settings = self.hf_quantizer.compressor.quantization_config
        scheme = self.scheme or compressed_tensors.get_experts_scheme(settings)  # type: ignore[no-untyped-call]
        compressor = BaseCompressor.get_value_from_registry(scheme.format or settings.format)
        plain: dict[str, Any] = {}
        for key, tensors in lists.items():
            stem, _, kind = key.rpartition(".")
            if kind not in {"weight", "weight_packed"}:
                continue
            names = [name for name in lists if name.startswith(f"{stem}.")]
            if f"{stem}.weight_scale" not in names:
                plain[key] = tensors
                continue
            plain[key] = [
                compressor.decompress(
                    {name.rpartition(".")[2]: lists[name][index] for name in names}, scheme
                )["weight"]
                for index in range(len(tensors))
            ]
        return plain

    return convert
