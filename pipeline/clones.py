"""Shallow clones of module trees, one for each forward pass."""

import copy
import types
from collections import OrderedDict
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import nn

__all__ = ["clone_modules"]

# Larger buffers are masks and tables, which are never written to, so copies would only take memory.
_COPIED_BYTES = 1 << 20
_PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype, type})
_TABLES = frozenset({dict, OrderedDict, list, set})


def clone_modules(root: nn.Module) -> Any:
    """A shallow clone of a module tree, with the same parameter tables but its own buffers, attributes and configs.

    A forward pass writes to its modules: dynamic rotary embeddings keep their latest frequencies in buffers,
    some in place, and lengths in attributes. ``generate`` writes to the config: while it decodes on a GPU, experts are
    computed in another way than in prompts. Concurrent passes on one tree would use each other's values.
    """
    clones: dict[int, Any] = {}  # of modules, buffers and configs, by the ids of the originals
    modules = list(root.modules())
    for module in modules:
        clones[id(module)] = object.__new__(type(module))
        for buffer in list(module._buffers.values()):  # noqa: SLF001
            # Placeholders of streamed buffers are of another type.
            if type(buffer) is torch.Tensor and buffer.nbytes <= _COPIED_BYTES:
                with torch.inference_mode(mode=False), torch.no_grad():
                    clones[id(buffer)] = buffer.clone()
    for module in modules:
        own = vars(clones[id(module)])
        # list(): a thread without a clone may be changing the tree itself meanwhile.
        for name, value in list(vars(module).items()):
            kind = type(value)
            # By far the most attributes; a model has thousands, and each request begins with a clone.
            if kind in _PLAIN or name == "_parameters":
                own[name] = value
            else:
                own[name] = kind() if kind in _TABLES and not value else _cloned(value, clones)
    return clones[id(root)]


def _cloned(value: Any, clones: MutableMapping[int, Any]) -> Any:
    """``value`` with modules and buffers replaced by their clones, and copies of containers that a pass may change."""
    if isinstance(value, (nn.Module, torch.Tensor)):
        return clones.get(id(value), value)
    if hasattr(value, "get_text_config"):  # what all configs of transformers have
        return _own_config(value, clones)
    if isinstance(value, types.MethodType) and id(value.__self__) in clones:
        return types.MethodType(value.__func__, clones[id(value.__self__)])
    if type(value) in (list, tuple, set):
        return type(value)(_cloned(each, clones) for each in list(value))
    if isinstance(value, dict):  # ordered and default dictionaries keep their kind
        copied = value.copy()
        for key, each in list(copied.items()):
            copied[key] = _cloned(each, clones)
        return copied
    return value


def _own_config(config: Any, clones: MutableMapping[int, Any]) -> Any:
    """A copy of a transformers config and of those in it: one for all modules that share it."""
    if id(config) not in clones:
        clones[id(config)] = own = copy.copy(config)
        for name, value in list(vars(own).items()):
            vars(own)[name] = _cloned(value, clones)
    return clones[id(config)]
