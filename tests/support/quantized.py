"""Checkpoints of tiny models whose weights are quantised, with the tensors and settings that transformers expects."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from support.models import save_model
from support.traced import rewrite

__all__ = ["QUANTISERS", "save_quantised"]

# What common quantisers leave alone.
_LEFT = ("lm_head", "embed", "norm", "router", "mlp.gate.weight", "correction_bias")


def save_quantised(folder: Path, case: str, quantiser: str, **settings: Any) -> Path:
    """Save the tiny bf16 model ``case``, quantised."""
    save_model(folder, case, dtype=torch.bfloat16, **settings)
    change, quantization = QUANTISERS[quantiser]
    rewrite(folder, change)
    path = folder / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "quantization_config": quantization})
    )
    return folder


def _each_matrix(
    quantise: Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]],
) -> Callable[[dict[str, torch.Tensor]], None]:
    """A change of a checkpoint: ``quantise`` replaces each weight of a linear layer."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            is_linear = tensor.dim() == 2 and name.endswith(".weight")
            if is_linear and not any(part in name for part in _LEFT):
                del tensors[name]
                tensors.update(quantise(name.removesuffix(".weight"), tensor))

    return change


def _fp8(rows: int, columns: int, scale_dtype: torch.dtype = torch.float32) -> Any:
    def quantise(stem: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        height, width = min(rows, weight.shape[0]), min(columns, weight.shape[1])
        blocks = weight.float().reshape(
            weight.shape[0] // height, height, weight.shape[1] // width, width
        )
        scales = (blocks.abs().amax((1, 3)) / 448).to(scale_dtype)
        stored = blocks / scales.float()[:, None, :, None]
        return {
            f"{stem}.weight": stored.reshape(weight.shape).to(torch.float8_e4m3fn),
            f"{stem}.weight_scale_inv": scales,
        }

    return _each_matrix(quantise), {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [rows, columns],
    }


def _mxfp4() -> Any:
    generator = torch.Generator().manual_seed(5)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                experts, columns, rows = tensors.pop(name).shape
                form = (experts, rows, columns // 32)
                tensors[f"{name}_blocks"] = torch.randint(
                    0, 256, (*form, 16), dtype=torch.uint8, generator=generator
                )
                tensors[f"{name}_scales"] = torch.randint(
                    118, 124, form, dtype=torch.uint8, generator=generator
                )
                del tensor

    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    return change, {"quant_method": "mxfp4", "modules_to_not_convert": [*left, "lm_head"]}


def _compressed(form: str, **weights: Any) -> Any:
    """compressed-tensors' ``form``, with its own compressor; ``weights``: its arguments."""
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*router.*", "re:.*mlp.gate$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": {"dynamic": False, **weights},
            }
        },
    }

    def quantise(stem: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams

        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        groups = weight.shape[1] // (args.group_size or weight.shape[1])
        parts = weight.reshape(weight.shape[0], groups, -1)
        if args.strategy == "tensor":
            parts = weight.reshape(1, 1, -1)
        scale, zero_point = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
        compressor = BaseCompressor.get_value_from_registry(form)
        packed = compressor.compress(state, scheme)
        return {f"{stem}.{name}": tensor for name, tensor in packed.items()}

    return _each_matrix(quantise), settings


QUANTISERS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], dict[str, Any]]] = {
    "fp8-blocks": _fp8(16, 16),
    "fp8-bf16-scales": _fp8(32, 8, torch.bfloat16),
    "fp8-whole": _fp8(1 << 30, 1 << 30),
    "mxfp4": _mxfp4(),
    "int4-groups": _compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=True
    ),
    "int4-asymmetric": _compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=False
    ),
    "int8-channels": _compressed(
        "pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True
    ),
    "int8-plain": _compressed(
        "int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True
    ),
    "fp8-channels": _compressed(
        "float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True
    ),
}
"""For each kind: what changes a checkpoint's tensors, and the quantization_config."""
