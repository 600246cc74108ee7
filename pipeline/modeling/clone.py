"""Shallow clones of module trees, one for each forward pass."""

import copy
import types
from collections import OrderedDict
from collections.abc import MutableMapping
from collections.abc import Set as AbstractSet
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
    computed in another way than in prompts. Objects of the model's own code that are not modules (such as token maps)
    cache what they have computed, in a pass on the meta device too. Concurrent passes on one tree would use each
    other's values.
    """
    # Of modules, buffers, configs and such objects, by the ids of the originals.
    clones: dict[int, Any] = {}
    modules = list(root.modules())
    homes = {type(module).__module__ for module in modules}
    code = {home for home in homes if not home.startswith("torch.")}
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
                empty = kind in _TABLES and not value
                own[name] = kind() if empty else _cloned(value, clones, code)
    return clones[id(root)]


def _cloned(value: Any, clones: MutableMapping[int, Any], code: AbstractSet[str]) -> Any:
    """``value`` with modules and buffers replaced by their clones, and copies of what a pass may change.

    ``code`` names the Python modules that define the model's classes.
    """
    if isinstance(value, (nn.Module, torch.Tensor)):
        return clones.get(id(value), value)
    # What all configs of transformers have; and what else there is of the model's own.
    if hasattr(value, "get_text_config") or (
        type(value).__module__ in code and hasattr(value, "__dict__")
    ):
        return _own_copy(value, clones, code)
    if isinstance(value, types.MethodType) and id(value.__self__) in clones:
        return types.MethodType(value.__func__, clones[id(value.__self__)])
    if type(value) in (list, tuple, set):
        return type(value)(_cloned(each, clones, code) for each in list(value))
    if isinstance(value, dict):  # ordered and default dictionaries keep their kind
        copied = value.copy()
        for key, each in list(copied.items()):
            copied[key] = _cloned(each, clones, code)
        return copied
    return value


def _own_copy(value: Any, clones: MutableMapping[int, Any], code: AbstractSet[str]) -> Any:
    """A copy of ``value``, and of such objects in it; one for all modules that share it."""
    if id(value) not in clones:
        clones[id(value)] = own = copy.copy(value)
        for name, each in list(vars(own).items()):
            vars(own)[name] = _cloned(each, clones, code)
    return clones[id(value)]
