"""Checkpoints with weights in packed forms that are not read: recognised by their configs and names, and refused in a sentence."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint, TensorInfo
from layerstream.stages.errors import ModelError

__all__ = ["QUANTIZATIONS", "quantizations_in", "refuse_packed_otherwise", "refuse_quantization"]

QUANTIZATIONS = ("fp8", "mxfp4", "compressed-tensors")
"""The methods of transformers' quantisers that are read."""
_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")
_BITS = (4, 8)
_INSTEAD = "use the checkpoint that it was made from, or a GGUF file of it"
# What runs the others: with a package, transformers does.
_PACKAGES = {
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "eetq": "kernels (on a GPU)",
    "fbgemm_fp8": "fbgemm-gpu (on a GPU)",
    "fp_quant": "fp_quant (on a GPU)",
    "gptq": "gptqmodel",
    "higgs": "flute-kernel (on a GPU)",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "spqr": "spqr_quant (on a GPU)",
    "torchao": "torchao",
    "vptq": "vptq (on a GPU)",
}
_PROGRAMS = {
    "bitnet": "transformers",
    "exl2": "exllamav2",
    "exl3": "exllamav3",
    "modelopt": "vLLM or TensorRT-LLM",
    "mlx": "mlx-lm, on a Mac",
}
# Names of tensors that only these have.
_NAMES = {
    "gptq or awq": re.compile(r"\.qweight$"),
    "exl2": re.compile(r"\.q_weight$"),
    "exl3": re.compile(r"\.trellis$"),
    "hqq": re.compile(r"\.W_q$"),
    "bitsandbytes": re.compile(r"\.(SCB|weight\.absmax)$"),
    "modelopt": re.compile(r"\.weight_scale_2$"),
}

# Methods whose names of tensors are those of scales.
_OF_FLOATS = ("bitsandbytes", "modelopt")
# What AutoGPTQ wrote before it named a method.
_OF_OLD_GPTQ = frozenset({"desc_act", "damp_percent", "sym", "true_sequential"})


def refuse_packed_otherwise(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose weights are packed in a form that is not read, as far as its headers and config tell.

    Raises:
        ModelError: It says what they are, and what runs them.
    """
    config = checkpoint.config or {}
    path = checkpoint.path
    found = list(quantizations_in(config))
    for settings in found:
        refuse_quantization(settings, path)
    if found:
        return
    if "group_size" in _mapping(config.get("quantization")):
        _refuse("mlx", path, "quantization in its config.json")
    for method, pattern in _NAMES.items():
        matching = (info for info in checkpoint.tensors.values() if pattern.search(info.name))
        name = next(
            (info.name for info in matching if method in _OF_FLOATS or _is_packed(info)), None
        )
        if name is not None:
            _refuse(method, path, f"it has {name}, and no quantization_config")


def quantizations_in(config: Mapping[str, Any]) -> Iterator[Any]:
    """Each ``quantization_config`` in ``config`` and its parts."""
    if config.get("quantization_config"):
        yield config["quantization_config"]
    for name, part in config.items():
        if isinstance(part, Mapping) and name != "quantization_config":
            yield from quantizations_in(part)


def _is_packed(info: TensorInfo) -> bool:
    return not info.dtype.startswith(("float", "bfloat", "complex"))


def refuse_quantization(settings: Any, path: Path) -> None:
    """Refuse what a ``quantization_config`` describes, unless it is read.

    Raises:
        ModelError: It says what it is, and what runs it.
    """
    where = "quantization_config in its config.json"
    if not isinstance(settings, Mapping):
        raise ModelError(
            f"{path} has a {where} that is {settings!r:.40}, where an object with a quant_method belongs; {_INSTEAD}."
        )
    method = _method_of(settings)
    if method not in QUANTIZATIONS:
        _refuse(method, path, where)
    if method == "compressed-tensors":
        for fault in _faults(settings):
            raise ModelError(
                f"{path} is quantised with 'compressed-tensors' and {fault}, which is not supported; {_INSTEAD}, or "
                "this one with vLLM."
            )


def _method_of(settings: Mapping[str, Any]) -> str:
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"  # which wrote no method at first
    if "quant_method" not in settings and {"group_size", "bits"} <= settings.keys():
        return "gptq" if settings.keys() & _OF_OLD_GPTQ else "mlx"
    return str(settings.get("quant_method", "no quant_method"))


def _faults(settings: Mapping[str, Any]) -> Iterator[str]:
    """What is not read of compressed-tensors' settings."""
    if (_mapping(settings.get("sparsity_config")).get("format") or "dense") != "dense":
        yield f"its weights are sparse ({settings['sparsity_config']['format']})"
    for name, group in _mapping(settings.get("config_groups")).items():
        group = _mapping(group)  # noqa: PLW2901 - anything may be there
        weights = _mapping(group.get("weights"))
        kind = group.get("format") or settings.get("format")
        bits = weights.get("num_bits")
        if kind is not None and kind not in (*_FORMATS, "dense", "mixed-precision"):
            yield f"the format {kind!r} (config_groups.{name})"
        if group.get("input_activations") or group.get("output_activations"):
            yield f"quantised activations (config_groups.{name})"
        if weights and bits not in _BITS:
            yield f"integers of {bits!r} bits (config_groups.{name})"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _refuse(method: str, path: Path, where: str) -> None:
    name = "gptq" if method == "gptq or awq" else method
    if name in _PACKAGES:
        runs = f", or this one with transformers and the package {_PACKAGES[name]}"
    else:
        runs = f", or this one with {_PROGRAMS.get(name, 'the program that it was made for')}"
    raise ModelError(
        f"{path} is quantised with {method!r} ({where}), which is not supported, only {', '.join(QUANTIZATIONS)} and GGUF "
        f"are; {_INSTEAD}{runs}."
    )
