"""A transformers model on the meta device, and what each of its weights is made from.

transformers' own ``from_pretrained`` runs with ``Tracer``s in place of the checkpoint's tensors. So the module tree,
the renames and conversions of the checkpoint, the ties between parameters and the values that are not weights (rotary
frequencies, position ids) are exactly those of transformers, for every architecture, and no weights are read.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint, TensorInfo
from layerstream.pipeline.modeling.building import building_alone
from layerstream.pipeline.modeling.checkpoint_mismatch import refuse_mismatch
from layerstream.pipeline.modeling.config import (
    config_of,
    load_config,
    resolve_model_class,
    summary_of,
)
from layerstream.pipeline.modeling.gguf_weights import load_gguf_tracers
from layerstream.pipeline.modeling.quantized_loading import dequantized_config, recorded_unpacking
from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.tracer_tensor import Tracer
from layerstream.stages.errors import ModelError

__all__ = [
    "TracedModel",
    "config_of",
    "load_config",
    "resolve_model_class",
    "trace_model",
    "tracer_of",
]

# While it loads a model, from_pretrained replaces functions of torch and transformers. Two calls at once might leave
# each other's replacements in place for good.
_LOADING_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedModel:
    """A model without weights, and how to make them."""

    module: Any
    """The ``PreTrainedModel``, in eval mode. Tensors with a recipe are on the meta device; all others (buffers that are
    never stored, parameters that transformers computes) have their values, on the CPU.
    """
    recipes: Mapping[str, Recipe]
    """For each parameter and persistent buffer, under the first of its names in the module."""
    aliases: Mapping[str, str]
    """Further names of tied parameters, each with the name in ``recipes`` that it stands for."""
    unused: tuple[str, ...]
    """The checkpoint's tensors that the model does not use."""


def trace_model(
    checkpoint: Checkpoint,
    *,
    config: Any,
    model_class: type[Any],
    dtype: torch.dtype | str = "auto",
    generation_config: Any = None,
    generation_settings: Mapping[str, Any] = MappingProxyType({}),
    initialize_missing: bool = False,
    **kwargs: Any,
) -> TracedModel:
    """Build a model as ``model_class.from_pretrained(folder)`` would, without its weights.

    Args:
        checkpoint: The weight files; only their headers are needed.
        config: The model's config, from ``load_config``. It is not changed.
        model_class: From ``resolve_model_class``.
        dtype: As in from_pretrained; "auto" is the config's, else the checkpoint's.
        generation_config: Instead of the one in the files.
        generation_settings: What to set in that one: from_pretrained sets the attributes of a config there, too.
        initialize_missing: Have weights that the checkpoint lacks made new, as from_pretrained does.
        kwargs: Other arguments of from_pretrained, such as attn_implementation.

    Raises:
        ModelError: The checkpoint lacks tensors that the model needs, or has them in other shapes; or the model is
            quantised in a way that is not supported, or cannot be built.
    """
    config = dequantized_config(config, checkpoint.path)
    # In a caller's inference mode the parameters would be inference tensors for good; under a caller's default
    # device transformers would require accelerate.
    with torch.inference_mode(mode=False), torch.device("cpu"):
        module = _load_tracers(
            checkpoint,
            model_class,
            lambda module: _finish_loading(
                module, checkpoint, generation_config, generation_settings
            ),
            initialize_missing=initialize_missing,
            config=config,
            dtype=dtype,
            **kwargs,
        )
        recipes, aliases = _take_recipes(module)
    used = {source for recipe in recipes.values() for source in recipe.sources}
    return TracedModel(
        module=module,
        recipes=MappingProxyType(recipes),
        aliases=MappingProxyType(aliases),
        unused=tuple(name for name in checkpoint.tensors if name not in used),
    )


def _load_tracers(
    checkpoint: Checkpoint,
    model_class: type[Any],
    finish: Callable[[Any], None],
    *,
    initialize_missing: bool,
    **kwargs: Any,
) -> Any:
    """Let transformers load a model whose parameters are tracers; ``finish`` gets it."""
    with _LOADING_LOCK, _without_progress_bar(), building_alone():
        loader = _loader_class(model_class, checkpoint, initialize_missing=initialize_missing)
        try:
            if checkpoint.format == "GGUF":
                module = load_gguf_tracers(checkpoint, loader, **kwargs)
            else:
                module = _load_state_dict(checkpoint, loader, **kwargs)
            finish(module)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"transformers cannot build {model_class.__name__} for {checkpoint.path}: "
                f"{summary_of(error)}."
            ) from error
    module.__class__ = model_class
    return module


def _load_state_dict(checkpoint: Checkpoint, loader: type[Any], **kwargs: Any) -> Any:
    # If the config names no dtype, the first tensor's is used; transformers goes file by file.
    by_name = (
        checkpoint.format == "safetensors"
    )  # as its reader lists them; others as the file does
    infos = sorted(
        checkpoint.tensors.values(), key=lambda info: (info.file, info.name if by_name else "")
    )
    tracers = {info.name: tracer_of(info) for info in infos}
    with recorded_unpacking():
        return loader.from_pretrained(None, state_dict=tracers, **kwargs)


def tracer_of(info: TensorInfo) -> torch.Tensor:
    """The tracer of a tensor as it is loaded."""
    source = Tracer.source(info.name, shape=info.shape, dtype=getattr(torch, info.dtype))
    return source if info.strided is None else source.as_strided(*info.strided)


def _loader_class(
    model_class: type[Any], checkpoint: Checkpoint, *, initialize_missing: bool
) -> type[Any]:
    """A temporary subclass that refuses a wrong checkpoint before memory is allocated.

    from_pretrained calls ``_finalize_model_loading`` between matching names and allocating, initialising and tying what
    the checkpoint lacks; an override is the only place where a wrong checkpoint of 140 GB can be refused before 140 GB
    are allocated. transformers looks classes up by name and module (conversions, recorded outputs, custom code), so the
    subclass has those of the real class; afterwards the model becomes an instance of the real class.
    """
    original = getattr(model_class, "_finalize_model_loading", None)
    if original is None:
        raise ModelError(
            "This version of transformers loads models in a way that layerstream does not know; "
            "install one that layerstream's constraints name."
        )

    def check_and_finalize(model: Any, load_config: Any, loading_info: Any) -> Any:
        ignored = load_config.ignore_mismatched_sizes
        refuse_mismatch(
            loading_info,
            checkpoint,
            model,
            ignore_sizes=ignored,
            initialize_missing=initialize_missing,
        )
        # Tied here first, a parameter that is stored only under its other name is not allocated.
        model.tie_weights(missing_keys=loading_info.missing_keys, recompute_mapping=False)
        # transformers would log a table of what is in TracedModel.unused.
        loading_info.unexpected_keys.clear()
        return original(model, load_config, loading_info)

    names = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(
        model_class.__name__,
        (model_class,),
        {**names, "_finalize_model_loading": staticmethod(check_and_finalize)},
    )


def _finish_loading(
    module: Any,
    checkpoint: Checkpoint,
    generation_config: Any,
    generation_settings: Mapping[str, Any],
) -> None:
    """Do what from_pretrained does only for a folder: set the model's name, and read its generation config."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    is_gguf = checkpoint.format == "GGUF"  # of which transformers reads no generation config
    unnamed = module.name_or_path
    for part in module.modules() if not is_gguf else ():
        if getattr(part, "name_or_path", None) == unnamed:
            part.name_or_path = part.config.name_or_path = str(folder)
    has_config = not is_gguf and any(
        (folder / f"{kind}config.json").is_file() for kind in ("", "generation_")
    )
    if module.can_generate() and (has_config or generation_config is not None):
        module.adjust_generation_fn(
            generation_config,
            from_auto_class=False,
            from_pipeline=None,
            pretrained_model_name_or_path=str(folder),
            cache_dir=None,
            force_download=False,
            proxies=None,
            local_files_only=True,
            token=None,
            revision="main",
            subfolder="",
            trust_remote_code=False,
            **generation_settings,
        )


def _take_recipes(module: torch.nn.Module) -> tuple[dict[str, Recipe], dict[str, str]]:
    """Replace the tracers that loading has left by plain meta tensors; returns recipes and aliases."""
    recipes: dict[str, Recipe] = {}
    aliases: dict[str, str] = {}
    replaced: dict[int, tuple[str, torch.Tensor]] = {}
    named = chain(
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    )
    for name, tensor in list(named):
        if not isinstance(tensor, Tracer):
            if tensor.is_meta:
                raise ModelError(
                    f"transformers left {name} of {type(module).__name__} without values"
                )
            continue
        if id(tensor) in replaced:
            aliases[name], empty = replaced[id(tensor)]
        else:
            recipes[name] = Recipe.of(name, tensor)
            empty = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
            if isinstance(tensor, torch.nn.Parameter):
                empty = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
            replaced[id(tensor)] = name, empty
        owner, _, leaf = name.rpartition(".")
        # Not owner._parameters[leaf]: recurrent modules also keep a list of their parameters.
        setattr(module.get_submodule(owner), leaf, empty)
    return recipes, aliases


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Show no progress bar of this thread; other threads keep theirs."""
    from transformers.utils import logging

    thread = threading.get_ident()

    def draw(factory: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            return logging.EmptyTqdm(*args, **kwargs)  # type: ignore[no-untyped-call]
        return previous(factory, args, kwargs) if previous else factory(*args, **kwargs)

    previous = logging.set_tqdm_hook(draw)
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)
