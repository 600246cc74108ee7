"""What a call leaves on modules: it belongs to the cache that the call returns, and is there when that comes back.

Some models keep a part of a sequence's state in attributes or buffers of a module: Qwen2-VL the offset of its positions,
dynamic rotary embeddings their latest frequencies. In a request these are attributes of a clone, which ends with the
request. The cache holds the rest of that state, and tells which calls belong together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from layerstream.pipeline.modeling.call_arguments import CACHE_NAMES, by_name, given_cache
from layerstream.pipeline.modeling.edits import streams

__all__ = ["CallState", "call_with_state"]

_MACHINERY = frozenset(vars(nn.Module()))
_COLLECTIONS = (dict, list, set)
# Copied with the cache, if that is copied.
_ATTRIBUTE = "layerstream_module_state"

# Values of attributes, or of buffers, by the path of their module and their name.
_State = dict[tuple[str, str], Any]


class CallState:
    """The state of a module tree during one call.

    Args:
        root: The module tree. It gets what earlier calls have left with ``cache``.
        cache: What the call brings; None without one.
    """

    def __init__(self, root: nn.Module, cache: Any) -> None:
        self._root = root
        self._carried: _State = dict(getattr(cache, _ATTRIBUTE, None) or {})
        for (path, name), value in self._carried.items():
            module = root.get_submodule(path)
            # Not setattr, by which a module would register what it gets.
            table = module._buffers if name in module._buffers else vars(module)  # noqa: SLF001
            table[name] = value
        self._before = {key: _frozen(value) for key, value in _state_of(root)}

    def keep(self, result: Any) -> None:
        """Give what the call has changed to the caches in its result."""
        missing = object()
        changed = {
            key: value
            for key, value in _state_of(self._root)
            if not _is_same(self._before.get(key, missing), value)
        }
        state = self._carried | changed
        for cache in _caches_in(result) if state else ():
            vars(cache)[_ATTRIBUTE] = state


def call_with_state(
    call: Callable[..., Any], root: nn.Module, inputs: Sequence[Any], named: Mapping[str, Any]
) -> Any:
    """The result of ``call``, which computes with ``root``: it finds what earlier calls have left with its cache."""
    function = getattr(call, "forward", call)
    state = CallState(root, given_cache(by_name(function, inputs, named)))
    result = call(*inputs, **named)
    state.keep(result)
    return result


def _state_of(root: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """All attributes and buffers that a call may leave something in."""
    for path, module in root.named_modules():
        for name, value in vars(module).items():
            if name not in _MACHINERY and not isinstance(value, nn.Module) and not callable(value):
                yield (path, name), value
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is None or not streams(buffer):
                yield (path, name), buffer


def _frozen(value: Any) -> tuple[Any, Any]:
    """``value``, and what shows that it was changed in place."""
    if isinstance(value, torch.Tensor):
        return value, None if value.is_inference() else value._version  # noqa: SLF001 - autograd's own
    return value, type(value)(value) if type(value) in _COLLECTIONS else None


def _is_same(before: Any, value: Any) -> bool:
    if not isinstance(before, tuple) or before[0] is not value:
        return False
    kept, now = before[1], _frozen(value)[1]
    if type(value) not in _COLLECTIONS:
        return bool(kept == now)
    if len(kept) != len(now):
        return False
    if isinstance(value, dict):
        return all(key in kept and kept[key] is each for key, each in now.items())
    return isinstance(value, set) or all(one is other for one, other in zip(kept, now, strict=True))


def _caches_in(result: Any) -> list[Any]:
    """The KV caches and recurrent states in what a call returns."""
    if isinstance(result, Mapping):
        found = [result.get(name) for name in CACHE_NAMES]
    else:
        each = result if isinstance(result, tuple | list) else [result]
        found = [value for value in each if hasattr(value, "get_seq_length")]
    return [cache for cache in found if hasattr(cache, "__dict__")]
