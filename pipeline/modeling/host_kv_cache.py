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

# What says nothing: checkpoints of models with sliding windows ask for the last, which ``generate`` takes for unset.
_NO_OTHER = ("hybrid",)


@functools.cache
def _kind() -> Any:
    from transformers import DynamicCache

    class HostCache(DynamicCache):
        """transformers' cache of growing tensors, whose layers come to the device and go again, one at a time.

        transformers has an offloaded cache of its own. It waits for the device's default stream, where a request of
        ours may compute on another; that of 5.17 may overwrite prefetched tensors while they are read (5.23 waits);
        and it keeps what it offloads in page-locked blocks, each rounded up to a power of two. So a layer is moved
        here by the thread that computes, on its own stream, from and to memory of just the size that is priced. It
        waits for that: a step takes longer by twice the cache over the bandwidth of pageable copies.
        """

        on_host = True  # by which requests are priced

        def update(
            self,
            key_states: torch.Tensor,
            value_states: torch.Tensor,
            layer_idx: int,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """The keys and values of the layer with the new ones, on their device; what is kept is on the host."""
            layers: list[Any] = self.layers
            for layer in layers[layer_idx : layer_idx + 1]:
                if layer.is_initialized:
                    _move(layer, key_states.device)
            states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            _move(layers[layer_idx], torch.device("cpu"))
            return states

    return HostCache


def _move(layer: Any, device: torch.device) -> None:
    layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)


def check_host_cache(module: Any) -> None:
    """Refuse a model whose cache cannot live on the host.

    Raises:
        PlanError: It has one of another kind, or a part that its layers do not ask for by ``update``.
    """
    config: Any = getattr(module, "config", None)
    supports = getattr(module, "_supports_default_dynamic_cache", lambda: False)()
    if not supports or config.is_encoder_decoder or any(_kind()(config=config).is_linear):
        raise PlanError(
            f"the VRAM budget cannot hold the KV cache, and that of {type(module).__name__} cannot live on the "
            "host (it is no cache of attention alone); raise the VRAM budget, or ask for fewer tokens at a time"
        )


def with_host_cache(
    module: Any, what: str, inputs: Sequence[Any], named: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments of a call with a cache in host RAM, unless it brings one, or wants none or another.

    Args:
        module: The transformers model.
        what: "forward" or "generate".
        inputs: Positional arguments.
        named: Keyword arguments.
    """
    given = by_name(getattr(module, what, None), inputs, named)
    by_place = any(name in given and name not in named for name in CACHE_NAMES)
    kinds = (
        GenerationSettings(module, given).said("cache_implementation") if what == "generate" else []
    )
    other = any(kind not in _NO_OTHER for kind in kinds)
    brings = given_cache(given) is not None
    if by_place or other or brings or not wants_cache(module, what, given):
        return dict(named)
    # A None under one of the other names would be a second cache.
    rest = {name: value for name, value in named.items() if name not in CACHE_NAMES}
    return {**rest, cache_argument(module): _kind()(config=module.config)}
