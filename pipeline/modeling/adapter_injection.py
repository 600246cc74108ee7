"""Puts PEFT's modules for adapters into a traced model, or refuses an adapter by name."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from layerstream.pipeline.checkpoint.adapter_folder import OWN_ADAPTER, AdapterFolder
from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.adapter_weights import AdapterTensor, map_tensors
from layerstream.pipeline.modeling.adapters import Adapters
from layerstream.pipeline.modeling.config import summary_of
from layerstream.pipeline.modeling.tracing import TracedModel
from layerstream.pipeline.planning.adapter_size import AdapterSize
from layerstream.stages.errors import ModelError

__all__ = ["add_adapters"]

_OVER_DROP_IN = "open the base model with load_streamed, and give it to PeftModel.from_pretrained together with the adapter"
_REPLACED = "weights of the base model are replaced"
_MERGED = "merge it into the base model with PEFT's merge_and_unload, and open the result"
# Settings that cannot be honoured, with the reason.
_REFUSED: Mapping[str, tuple[str, str]] = {
    "target_parameters": ("it changes parameters of experts, which stream", _MERGED),
    "trainable_token_indices": (
        "it replaces rows of a table whose rows are read one by one",
        _MERGED,
    ),
    "layer_replication": ("it computes with the base's layers several times", _MERGED),
    "alora_invocation_tokens": (
        "it acts on a part of each prompt, which PeftModel finds",
        _OVER_DROP_IN,
    ),
    "kasa_config": (f"{_REPLACED} by parts of them", _OVER_DROP_IN),
    "arrow_config": ("it chooses among other adapters by their weights", _OVER_DROP_IN),
}
# Ways to begin a training that change the base model's weights; the adapter goes with the changed ones.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Kinds whose weights PEFT takes partly to float32 for a model of 16 bits, which is not followed.
_FLOAT32_ONLY = ("DELORA",)
# Kinds that compute with tensors which PEFT makes anew, from numbers that are not saved or from all of the base's weights.
_MADE_ANEW = ("ADALORA", "RANDLORA", "SHIRA")


def add_adapters(
    traced: TracedModel,
    checkpoint: Checkpoint,
    folders: Sequence[AdapterFolder],
    *,
    default: str | None,
    autocast: bool = True,
) -> tuple[TracedModel, Adapters]:
    """Put adapters into a traced model; returns it with the new names of its weights.

    Args:
        traced: The model. Its module tree is changed.
        checkpoint: Its weight files.
        folders: The adapters.
        default: The name of the one that applies if a request chooses none.
        autocast: Compute with adapters of 16 bits in float32, as PeftModel.from_pretrained does. One beside its model is
            in the model's dtype in any case, as transformers' from_pretrained loads it.

    Raises:
        ModelError: PEFT is not installed, or one of them cannot be honoured.
    """
    if not folders:
        return traced, Adapters({})
    root, before = traced.module, _tensors_of(traced.module)
    modules = sum(1 for _ in root.modules())
    known = {id(tensor) for tensor in before.values()}
    owners = _owners(traced)
    keys: dict[str, str] = {}
    kinds: dict[Any, AdapterFolder] = {}
    tensors: list[AdapterTensor] = []
    for number, folder in enumerate(folders):
        key = keys[folder.name] = _key(folder.name, number)
        config = _config_of(folder)
        kinds.setdefault(config.peft_type, folder)
        _refuse_mixture(folder, kinds)
        _inject(root, folder, config, key)
        made = {
            name: tensor for name, tensor in _tensors_of(root).items() if id(tensor) not in known
        }
        if folder.beside_model or not autocast:
            made = _cast(root, made, traced.module.dtype)
        known |= {id(tensor) for tensor in made.values()}
        mapped = map_tensors(root, folder, key, made)
        of_base = {name: each for name, each in mapped.items() if name not in made}
        _refuse_changes_of_base(folder, of_base, _renamed(traced, owners, [folder]), checkpoint)
        tensors += [each for name, each in mapped.items() if name in made]
    root.eval()  # dropout
    traced = _renamed(traced, owners, folders)
    root._hf_peft_config_loaded = True  # noqa: SLF001 - for transformers' own set_adapter and the like
    loaded = {(id(each.table), each.name) for each in tensors}
    assert len(loaded) == len(tensors)  # noqa: S101 - each has a place of its own
    size = AdapterSize(
        nbytes=sum(each.nbytes for each in tensors),
        modules=sum(1 for _ in root.modules()) - modules,
    )
    adapters = Adapters(keys, default=default, tensors=tensors, size=size)
    adapters.activate(root, default)
    return traced, adapters


def _tensors_of(root: nn.Module) -> dict[str, torch.Tensor]:
    return dict(chain(root.named_parameters(), root.named_buffers()))


def _refuse_changes_of_base(
    folder: AdapterFolder,
    of_base: Mapping[str, AdapterTensor],
    traced: TracedModel,
    checkpoint: Checkpoint,
) -> None:
    """Refuse other weights of the base than its own, which PEFT saves with an adapter of an embedding."""
    for name, tensor in of_base.items():
        recipe = traced.recipes.get(traced.aliases.get(name, name))
        if recipe is None:
            raise _refusal(folder, f"its {name} is shared between layers", _OVER_DROP_IN)
        if not tensor.equals(recipe, checkpoint):
            raise _refusal(
                folder,
                f"it changes {name}, a weight of the base model, which others share",
                _MERGED,
            )


def _key(name: str, number: int) -> str:
    """What PEFT calls an adapter: a key of ModuleDicts, and a part of the names of parameters."""
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9]{2,}", name) and not hasattr(nn.ModuleDict(), name)
    reserved = {"lora", "weight", "bias", "base", "model", "layer", "layers"}
    return name if name == OWN_ADAPTER or (plain and name not in reserved) else f"adapter_{number}"


def _config_of(folder: AdapterFolder) -> Any:
    """The adapter's config as PEFT reads it."""
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise ModelError(
            f"{folder.path} holds an adapter, and PEFT, which computes with it, is not installed: "
            "pip install 'layerstream[adapters]'."
        ) from error
    kind = folder.config.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise _refusal(
            folder,
            f"its peft_type is {kind!r}, which the installed PEFT does not know",
            "install a later PEFT",
        )
    if kind in _MADE_ANEW:
        raise _refusal(
            folder,
            f"{kind} computes with tensors that are not saved with the adapter",
            _OVER_DROP_IN,
        )
    for name, (fault, remedy) in _REFUSED.items():
        if folder.config.get(name):
            raise _refusal(folder, f"{name} is set: {fault}", remedy)
    way = str(folder.config.get("init_lora_weights")).lower()
    if way.startswith(_CHANGES_BASE):
        remedy = (
            "save it with path_initial_model_for_weight_conversion=, which makes a plain LoRA of it"
        )
        raise _refusal(folder, f"init_lora_weights is {way}: {_REPLACED}", remedy)
    try:
        config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(folder.path))
    except Exception as error:
        raise _refusal(
            folder,
            f"PEFT cannot read its adapter_config.json ({summary_of(error)})",
            "save it again",
        ) from error
    config.inference_mode = True
    if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
        raise _refusal(folder, f"{kind} changes prompts, not modules", _OVER_DROP_IN)
    return config


def _refuse_mixture(folder: AdapterFolder, kinds: Mapping[Any, AdapterFolder]) -> None:
    if len(kinds) > 1:
        (kind, first), (other, _) = list(kinds.items())[:2]
        raise _refusal(
            folder,
            f"it is of the type {other.value}, and {first.name!r} of {kind.value}",
            "adapters of one type can share a base; open the model once more for the others",
        )


def _inject(root: nn.Module, folder: AdapterFolder, config: Any, key: str) -> None:
    from peft import inject_adapter_in_model

    if (
        config.peft_type.value in _FLOAT32_ONLY
        and getattr(root, "dtype", None) is not torch.float32
    ):
        raise _refusal(folder, f"{config.peft_type.value} needs a model of float32", _OVER_DROP_IN)
    earlier = vars(root).pop("peft_config", {})  # PEFT warns of adapters that are there already
    try:
        inject_adapter_in_model(config, root, key, low_cpu_mem_usage=True)
    except Exception as error:
        shared = "shared state" in str(error)
        raise _refusal(
            folder,
            f"PEFT cannot put it into {type(root).__name__} ({summary_of(error)})",
            _OVER_DROP_IN if shared else "check that it was made for this base model",
        ) from error
    vars(root)["peft_config"] = {**earlier, key: config}
    if getattr(
        config, "target_parameters", None
    ):  # of an older transformers, which had modules there
        raise _refusal(folder, _REFUSED["target_parameters"][0], _MERGED)


def _cast(
    root: nn.Module, made: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """``made`` in ``dtype``, put into its places."""
    cast: dict[str, torch.Tensor] = {}
    for name, tensor in made.items():
        cast[name] = tensor
        if tensor.is_meta and tensor.is_floating_point():
            owner, _, leaf = name.rpartition(".")
            parts = root.get_submodule(owner)
            cast[name] = tensor.to(dtype)
            if isinstance(tensor, nn.Parameter):
                cast[name] = nn.Parameter(cast[name], requires_grad=False)
            table: Any = parts._parameters if leaf in parts._parameters else parts._buffers  # noqa: SLF001
            table[leaf] = cast[name]
    return cast


_Owner = tuple[nn.Module, str, torch.Tensor, torch.UntypedStorage]


def _owners(traced: TracedModel) -> dict[str, _Owner]:
    """The module of each weight, its name there, and the weight itself, by all of its names in the tree."""
    owners = {}
    for name in chain(traced.recipes, traced.aliases):
        path, _, leaf = name.rpartition(".")
        module = traced.module.get_submodule(path)
        weight = getattr(module, leaf)
        owners[name] = (module, leaf, weight, weight.untyped_storage())
    return owners


def _renamed(
    traced: TracedModel, owners: Mapping[str, _Owner], folders: Sequence[AdapterFolder]
) -> TracedModel:
    """``traced`` with the names that its weights have now that modules were put around them."""
    paths: dict[int, str] = {id(part): path for path, part in traced.module.named_modules()}
    names = {}
    for name, (module, leaf, weight, storage) in owners.items():
        # Assigning to ``data`` leaves the parameter, and exchanges its memory.
        same = storage._cdata == weight.untyped_storage()._cdata  # noqa: SLF001
        if id(module) not in paths or getattr(module, leaf, None) is not weight or not same:
            raise _refusal(folders[0], f"{_REPLACED}, among them {name}", _OVER_DROP_IN)
        path = paths[id(module)]
        names[name] = f"{path}.{leaf}" if path else leaf
    return replace(
        traced,
        recipes=MappingProxyType(
            {
                names[name]: replace(recipe, name=names[name])
                for name, recipe in traced.recipes.items()
            }
        ),
        # A module that had several paths has one in this list.
        aliases=MappingProxyType(
            {
                names[alias]: names[name]
                for alias, name in traced.aliases.items()
                if names[alias] != names[name]
            }
        ),
    )


def _refusal(folder: AdapterFolder, fault: str, remedy: str) -> ModelError:
    return ModelError(f"adapter {folder.name!r} ({folder.path}): {fault}; {remedy}.")
