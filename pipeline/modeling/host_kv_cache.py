"""A KV cache in host RAM: a layer's keys and values are on the device only while that layer computes."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from layerstream.pipeline.modeling.call_arguments import (
    CACHE_NAMES,
    GenerationSettings,
    by_name,
    cache_argument,
    given_cache,
    wants_cache,
)
from layerstream.stages.errors import PlanError

__all__ = ["check_host_cache", "with_host_cache"]

# ``generate`` takes this kind of cache, which checkpoints of models with sliding windows name, for unset.
_UNSET_IMPLEMENTATIONS = ("hybrid",)


@functools.cache
def _host_cache_class() -> Any:
    from transformers import DynamicCache

    class HostCache(DynamicCache):
        """transformers' cache of growing tensors, whose layers are on the device one at a time.

        transformers has an offloaded cache of its own. It waits for the device's default stream, while a request of
        ours may compute on another; that of 5.17 may overwrite prefetched tensors while they are read (5.23 waits);
        and it keeps what it offloads in page-locked blocks, each rounded up to a power of two. So here the computing
        thread moves a layer, on its own stream, from and to memory of exactly the size that is reserved. It waits for
        the copies: a step takes longer by twice the cache over the bandwidth of pageable copies.
        """

        on_host = True
        """Tells the estimate of a request's memory where its cache is."""

        def update(
            self,
            key_states: torch.Tensor,
            value_states: torch.Tensor,
            layer_idx: int,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """The layer's keys and values with the new ones, on their device; the cache keeps them on the host."""
            layers: list[Any] = self.layers
            for layer in layers[layer_idx : layer_idx + 1]:
                if layer.is_initialized:
                    _move_layer(layer, key_states.device)
            states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            _move_layer(layers[layer_idx], torch.device("cpu"))
            return states

    return HostCache


def _move_layer(layer: Any, device: torch.device) -> None:
    layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)


def check_host_cache(module: Any) -> None:
    """Refuse a model whose cache cannot live on the host.

    Raises:
        PlanError: Its cache is of another kind, or has a part that its layers do not get by ``update``.
    """
    config: Any = getattr(module, "config", None)
    supports = getattr(module, "_supports_default_dynamic_cache", lambda: False)()
    if (
        not supports
        or config.is_encoder_decoder
        or any(_host_cache_class()(config=config).is_linear)
    ):
        raise PlanError(
            f"the VRAM budget cannot hold the KV cache, and that of {type(module).__name__} cannot live on the "
            "host (it is no cache of attention alone); raise the VRAM budget, or ask for fewer tokens at a time"
        )


def with_host_cache(
    module: Any, method: str, inputs: Sequence[Any], named: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments of a call, with a cache in host RAM unless they name another cache or none.

    Args:
        module: The transformers model.
        method: "forward" or "generate".
        inputs: Positional arguments.
        named: Keyword arguments.
    """
    given = by_name(getattr(module, method, None), inputs, named)
    by_position = any(name in given and name not in named for name in CACHE_NAMES)
    implementations = (
        GenerationSettings(module, given).values_of("cache_implementation")
        if method == "generate"
        else []
    )
    names_other = any(each not in _UNSET_IMPLEMENTATIONS for each in implementations)
    brings_cache = given_cache(given) is not None
    if by_position or names_other or brings_cache or not wants_cache(module, method, given):
        return dict(named)
    # A None under one of the other names would be a second cache.
    rest = {name: value for name, value in named.items() if name not in CACHE_NAMES}
    return {**rest, cache_argument(module): _host_cache_class()(config=module.config)}
