"""Other libraries that run models larger than memory. Each returns a function from a prompt to logits.

Nothing here imports layerstream: a peer may run in an interpreter that does not have it.
"""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "PEERS",
    "Forward",
    "NotInstalledError",
    "accelerate_mapped",
    "airllm",
    "in_memory",
    "module_offload",
]

Forward = Callable[[torch.Tensor], torch.Tensor]  # ids on the device -> logits


class NotInstalledError(Exception):
    """Raised when a peer is not installed."""


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise NotInstalledError(f"{package} is not installed")


def _load_model(folder: Path, **options: Any) -> Any:
    """Load the model in the class that its config names, in its own dtype."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder)
    kind: Any = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(folder, **options).eval()


def _forward_function(model: Any) -> Forward:
    def forward(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    return forward


def in_memory(folder: Path, device: torch.device, scratch: Path) -> Forward:
    """Load the model with transformers, all of it on ``device``."""
    _ = scratch
    return _forward_function(_load_model(folder).to(device))


def accelerate_mapped(folder: Path, scratch: Path, *, ram_bytes: int) -> Forward:
    """Dispatch with accelerate in ``from_pretrained``: modules on "cpu" up to ``ram_bytes``, the others on "disk".

    Disk means the checkpoint's own files, from which a module's weights are copied as it is called.
    """
    _require("accelerate")
    options: dict[str, Any] = {"device_map": {"": "disk"}}
    if ram_bytes:
        options = {"device_map": "auto", "max_memory": {"cpu": ram_bytes}}
    return _forward_function(_load_model(folder, offload_folder=str(scratch), **options))


def accelerate_cpu(folder: Path, device: torch.device, scratch: Path) -> Forward:
    """Use accelerate's ``cpu_offload``: each call of a module copies its weights from RAM."""
    _require("accelerate")
    from accelerate import cpu_offload

    _ = scratch
    return _forward_function(cpu_offload(_load_model(folder), execution_device=device))


def accelerate_disk(folder: Path, device: torch.device, scratch: Path) -> Forward:
    """Use accelerate's ``disk_offload``: weights are copied from its own mapped copy of the files.

    A dispatch with everything on disk computes on the CPU; this is the way to compute on another device.
    """
    _require("accelerate")
    from accelerate import disk_offload

    return _forward_function(
        disk_offload(_load_model(folder), offload_dir=str(scratch), execution_device=device)
    )


def airllm(folder: Path, device: torch.device, scratch: Path) -> Forward:
    """Use AirLLM, which reads a file for each layer, written beforehand."""
    _require("airllm")
    from airllm import AutoModel

    model = AutoModel.from_pretrained(
        str(folder), device=str(device), layer_shards_saving_path=str(scratch)
    )
    return _forward_function(model)


def diffusers_groups(folder: Path, device: torch.device, scratch: Path) -> Forward:
    """Use diffusers' group offloading of single modules, prefetched on a stream."""
    _require("diffusers")
    from diffusers.hooks import apply_group_offloading

    _ = scratch
    model = _load_model(folder)
    apply_group_offloading(
        model,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=device.type == "cuda",
    )
    return _forward_function(model)


def module_offload(folder: Path, device: torch.device, scratch: Path) -> Forward:
    """Do by hand what diffusers does without a stream: each call moves a block to the device and back."""
    _ = scratch
    model = _load_model(folder)
    blocks = {id(block) for block in model.model.layers}

    def load(module: torch.nn.Module, _: Any) -> None:
        module.to(device)

    def unload(module: torch.nn.Module, _: Any, output: Any) -> Any:
        module.to("cpu")
        return output

    for module in model.modules():
        if id(module) in blocks:
            module.register_forward_pre_hook(load)
            module.register_forward_hook(unload)
    for part in (model.model.embed_tokens, model.model.norm, model.model.rotary_emb, model.lm_head):
        part.to(device)
    return _forward_function(model)


def pageable_offload(folder: Path, device: torch.device, scratch: Path) -> Forward:
    """Do by hand what accelerate's ``cpu_offload`` does: each call of a module copies its own weights from RAM.

    They are copied from pageable memory, one after the other, and dropped after the call. Stands in where accelerate
    is not installed: without its bookkeeping, this can only be faster.
    """
    _ = scratch
    model = _load_model(folder)
    # Copies from the mapped files would be slower still.
    for weight in model.parameters():
        weight.data = weight.data.clone()
    kept: dict[int, dict[str, Any]] = {}

    def load(module: torch.nn.Module, _: Any) -> None:
        own = kept[id(module)] = dict(module._parameters)  # noqa: SLF001 - in place, as accelerate does
        for name, weight in own.items():
            if weight is not None:
                on_device = torch.nn.Parameter(
                    weight.to(device), requires_grad=weight.requires_grad
                )
                module._parameters[name] = on_device  # noqa: SLF001

    def unload(module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        module._parameters.update(kept.pop(id(module)))  # noqa: SLF001

    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)  # noqa: SLF001
        if any(weight is not None for weight in module._parameters.values()):  # noqa: SLF001
            module.register_forward_pre_hook(load)
            module.register_forward_hook(unload)
    return _forward_function(model)


# By the name in the table.
PEERS: Mapping[str, Callable[[Path, torch.device, Path], Forward]] = {
    "accelerate cpu_offload": accelerate_cpu,
    "pageable offload by hand": pageable_offload,
    "per-module offload by hand": module_offload,
    "diffusers group offloading": diffusers_groups,
    "accelerate disk_offload": accelerate_disk,
    "AirLLM": airllm,
}
