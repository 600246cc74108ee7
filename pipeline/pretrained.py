"""The arguments of ``from_pretrained``: each is honoured, or refused by name with the reason. None vanishes."""

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.hub import Lookup
from layerstream.pipeline.checkpoint.weight_choice import WeightChoice
from layerstream.stages.errors import ModelError

__all__ = ["Pretrained"]

_ONE_DEVICE = "a streamed model computes on the one device of device="
_OWN_PLACES = "weights stay in their own files, and what is in memory is up to the plan and budget="

# What a streamed model cannot do, or does by itself, with the reason. Values that ask for nothing are taken.
_REFUSED: Mapping[str, str] = {
    "adapter_kwargs": "base=, adapters= and autocast_adapter_dtype= say which adapters are loaded, and how",
    "adapter_name": "adapters= gives each adapter its name",
    "device_mesh": _ONE_DEVICE,
    "disable_mmap": "reader= says how files are read ('direct' maps none)",
    "distributed_config": _ONE_DEVICE,
    "from_flax": "flax weights cannot be streamed; save the model as safetensors",
    "from_tf": "TensorFlow weights cannot be streamed; save the model as safetensors",
    "max_memory": "budget= says how much memory may be used",
    "mirror": "set HF_ENDPOINT in the environment",
    "offload_buffers": _OWN_PLACES,
    "offload_folder": _OWN_PLACES,
    "output_loading_info": "one model is returned; what does not fit its weights is an error",
    "proxies": "set HTTPS_PROXY in the environment",
    "quantization_config": "weights are streamed as they are stored; quantise them with transformers first, and save them",
    "state_dict": "weights are read from their files",
    "tp_plan": _ONE_DEVICE,
    "tp_size": _ONE_DEVICE,
    "tqdm_class": "huggingface_hub's own progress bars are shown",
}
_ASKS_FOR_NOTHING: Mapping[str, Any] = {"adapter_name": "default"}
# What transformers ignores as well, and what holds in any case: little memory is used, and nothing is unpickled.
_WITHOUT_MEANING = (
    "_commit_hash",
    "_fast_init",
    "low_cpu_mem_usage",
    "offload_state_dict",
    "weights_only",
)
# What transformers is given as it is, while it builds the model; and what it does in any case, but we only if it is said.
_FOR_LOADING = (
    "allow_all_kernels",
    "fusion_config",
    "ignore_mismatched_sizes",
    "initialize_missing",
    "kernel_config",
    "key_mapping",
    "use_kernels",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """What the arguments of ``from_pretrained`` say."""

    source: str | os.PathLike[str]
    lookup: Lookup
    base: str | os.PathLike[str] | None
    """The model of an adapter that is alone in ``source``; None for the one that the adapter names."""
    adapters: Mapping[str, str | os.PathLike[str]]
    """Further adapters, by the names by which requests choose them."""
    device: str
    dtype: torch.dtype | str
    config: Any
    """A config, or the path of one, instead of the model's own; None for that."""
    generation_config: Any
    """Instead of the model's own; None for that."""
    trust_remote_code: bool
    autocast_adapter_dtype: bool
    """As in PeftModel.from_pretrained: adapters of 16 bits compute in float32."""
    loading: Mapping[str, Any]
    """For transformers, while it builds the model."""
    settings: Mapping[str, Any]
    """All others: attributes of the config."""

    @classmethod
    def of(
        cls,
        source: str | os.PathLike[str],
        arguments: Mapping[str, Any],
        *,
        device: Any,
        dtype: Any,
    ) -> "Pretrained":
        """Understand ``arguments``, those of ``from_pretrained`` that have no name of their own in ``open``.

        Raises:
            ModelError: One of them cannot be honoured.
        """
        given = dict(arguments)
        for name in _WITHOUT_MEANING:
            given.pop(name, None)
        for name, reason in _REFUSED.items():
            value = given.pop(name, None)
            if value not in (None, False, _ASKS_FOR_NOTHING.get(name)) and value != {}:
                raise ModelError(
                    f"{name}={value!r:.80} cannot be set for a streamed model: {reason}."
                )
        weights = WeightChoice(
            variant=given.pop("variant", None), use_safetensors=given.pop("use_safetensors", None)
        )
        lookup = Lookup(
            revision=given.pop("revision", None),
            subfolder=given.pop("subfolder", None) or "",
            cache_dir=given.pop("cache_dir", None),
            token=given.pop("token", None),
            local_files_only=bool(given.pop("local_files_only", False)),
            force_download=bool(given.pop("force_download", False)),
            weights=weights,
        )
        return cls(
            source=_with_file(source, given.pop("gguf_file", None)),
            lookup=lookup,
            base=given.pop("base", None),
            adapters=dict(given.pop("adapters", None) or {}),
            device=_device(device, given.pop("device_map", None)),
            dtype=_dtype(dtype, given.pop("torch_dtype", None)),
            config=given.pop("config", None),
            generation_config=given.pop("generation_config", None),
            trust_remote_code=bool(given.pop("trust_remote_code", False)),
            autocast_adapter_dtype=bool(given.pop("autocast_adapter_dtype", True)),
            loading={name: given.pop(name) for name in _FOR_LOADING if name in given},
            settings=given,
        )

    def refuse_remote_code(self, checkpoint: Checkpoint) -> None:
        """Refuse a model whose own code was asked for: its results may be others than those of transformers' class.

        Raises:
            ModelError: ``trust_remote_code`` was given, and the model comes with code.
        """
        path = checkpoint.path
        folder = path if path.is_dir() else path.parent
        code = folder / "custom_generate" / "generate.py"
        found = "auto_map in its config.json" if (checkpoint.config or {}).get("auto_map") else None
        found = found or (str(code) if code.is_file() else None)
        if self.trust_remote_code and found:
            raise ModelError(
                f"{path} comes with code of its own ({found}), which a streamed model does not run; leave "
                "trust_remote_code out to use transformers' own class, if it has one."
            )

    def init_arguments(self, model_class: type[Any], unused: Mapping[str, Any]) -> dict[str, Any]:
        """What is left for the model's class, of the settings that are no attributes of its config.

        Raises:
            ModelError: The class does not take one of them by its name.
        """
        taken = inspect.signature(model_class.__init__).parameters
        if unknown := [name for name in unused if name not in taken]:
            why = (
                "and config= was given, which must have it"
                if self.config is not None
                else "or config"
            )
            raise ModelError(
                f"{unknown[0]}={unused[unknown[0]]!r:.80} is no argument of from_pretrained that {model_class.__name__} "
                f"knows, {why}; check its name."
            )
        return dict(unused)


def _with_file(source: str | os.PathLike[str], gguf_file: str | None) -> str | os.PathLike[str]:
    """``source`` with the file in it that ``gguf_file`` names."""
    if gguf_file is None:
        return source
    return Path(source) / gguf_file if Path(source).is_dir() else f"{source}:{gguf_file}"


def _dtype(dtype: Any, torch_dtype: Any) -> Any:
    """The dtype under either of its names."""
    first, second = (None if each in (None, "auto") else each for each in (dtype, torch_dtype))
    if first is not None and second is not None and first != second:
        raise ModelError(f"dtype={first} and torch_dtype={second} contradict each other: give one.")
    return first or second or "auto"


def _device(device: Any, device_map: Any) -> str:
    """The device under either of its names; a map that leaves the choice to the library leaves it to the plan."""
    name = _device_name(device)
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None or device_map == "auto":
        return name
    if isinstance(device_map, Mapping) or not isinstance(device_map, str | int | torch.device):
        raise ModelError(
            f"device_map={device_map!r:.80} cannot be set for a streamed model: {_ONE_DEVICE}, and where its weights are "
            "is up to its plan."
        )
    try:
        mapped = _device_name(torch.device(device_map))
    except RuntimeError as error:
        raise ModelError(
            f"device_map={device_map!r} cannot be set for a streamed model: {_ONE_DEVICE}."
        ) from error
    if name not in ("auto", mapped):
        raise ModelError(f"device={name} and device_map={mapped} contradict each other: give one.")
    return mapped


def _device_name(device: Any) -> str:
    return f"cuda:{device}" if isinstance(device, int) else str(device)
