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
from layerstream.pipeline.modeling.clone import IMMUTABLE, all_modules
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
        self._before = [(module, table, _Snapshot(table)) for module, table in _tables_of(root)]

    def keep(self, result: Any) -> None:
        """Give what the call has changed to the caches in its result."""
        caches = _caches_in(result)
        if not caches:
            return
        state = self._carried | self._changed()
        for cache in caches if state else ():
            vars(cache)[_ATTRIBUTE] = state

    def has_changed(self) -> bool:
        """Whether the call has changed anything until now."""
        return bool(self._changed())

    def _changed(self) -> _State:
        changed = [
            (module, name, value)
            for module, table, before in self._before
            for name, value in before.changed(table)
        ]
        if not changed:
            return {}
        paths = {module: path for path, module in self._root.named_modules()}
        return {(paths[module], name): value for module, name, value in changed if module in paths}


def call_with_state(
    call: Callable[..., Any],
    root: nn.Module,
    inputs: Sequence[Any],
    named: Mapping[str, Any],
    *,
    on_begin: Callable[[CallState], None] = lambda _: None,
) -> Any:
    """The result of ``call``, which computes with ``root``: it finds what earlier calls have left with its cache.

    ``on_begin`` gets the state before it.
    """
    function = getattr(call, "forward", call)
    state = CallState(root, given_cache(by_name(function, inputs, named)))
    on_begin(state)
    result = call(*inputs, **named)
    state.keep(result)
    return result


def _tables_of(root: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """All tables of attributes and of buffers that a call may leave something in, with their modules."""
    for module in all_modules(root):
        yield module, vars(module)
        if module._buffers:  # noqa: SLF001
            yield module, module._buffers  # noqa: SLF001


class _Snapshot:
    """The values in ``table`` before a call. Thousands, for each request: most are compared by identity alone."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._values = dict(table)
        self._contents = {
            name: _contents(value)
            for name, value in table.items()
            if name not in _MACHINERY and type(value) not in IMMUTABLE and _has_contents(value)
        }

    def changed(self, table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """What ``table`` has now that it did not have, except modules, functions and weights that stream."""
        for name, value in table.items():
            if name in _MACHINERY or (
                self._values.get(name, self) is value
                and (name not in self._contents or _is_same(self._contents[name], value))
            ):
                continue
            if not (callable(value) or streams(value)):  # modules can be called
                yield name, value


def _has_contents(value: Any) -> bool:
    return type(value) in _COLLECTIONS or isinstance(value, torch.Tensor)


def _contents(value: Any) -> Any:
    """What shows that ``value`` was changed in place."""
    if isinstance(value, torch.Tensor):
        return None if value.is_inference() else value._version  # noqa: SLF001 - autograd's own
    return type(value)(value)


def _is_same(kept: Any, value: Any) -> bool:
    now = _contents(value)
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
        found = [result[name] for name in result if name in CACHE_NAMES]
    else:
        each = result if isinstance(result, tuple | list) else [result]
        found = [value for value in each if hasattr(value, "get_seq_length")]
    return [cache for cache in found if hasattr(cache, "__dict__")]
