"""Shallow clones of module trees, one for each request."""

import copy
import types
from collections import OrderedDict
from collections.abc import MutableMapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import nn

__all__ = ["clone_modules"]

# Larger buffers are masks and tables, which are never written to: copies would only take memory.
_MAX_COPIED_BYTES = 1 << 20
_IMMUTABLE = frozenset({bool, int, float, str, type(None), torch.dtype, type})
_COLLECTIONS = frozenset({dict, OrderedDict, list, set})


def clone_modules(root: nn.Module) -> Any:
    """A shallow clone of a module tree, with the same parameter tables but its own buffers, attributes and configs.

    A forward pass writes to its modules: dynamic rotary embeddings keep their latest frequencies in buffers, some in
    place, and lengths in attributes. ``generate`` writes to the config: while it decodes on a GPU, experts are computed
    in another way than in prompts. Objects of the model's own code that are not modules (such as token maps) cache what
    they have computed, also in a pass on the meta device. Concurrent passes on one tree would use each other's values.
    """
    # The clones of modules, buffers, configs and such objects, by the ids of the originals.
    clones: dict[int, Any] = {}
    modules = list(root.modules())
    module_names = {type(module).__module__ for module in modules}
    model_code = {name for name in module_names if not name.startswith("torch.")}
    for module in modules:
        clones[id(module)] = object.__new__(type(module))
        for buffer in list(module._buffers.values()):  # noqa: SLF001
            # Placeholders of streamed buffers are of another type.
            if type(buffer) is torch.Tensor and buffer.nbytes <= _MAX_COPIED_BYTES:
                with torch.inference_mode(mode=False), torch.no_grad():
                    clones[id(buffer)] = buffer.clone()
    for module in modules:
        attributes = vars(clones[id(module)])
        # list(): a thread without a clone may be changing the tree itself meanwhile.
        for name, value in list(vars(module).items()):
            kind = type(value)
            # By far the most: a model has thousands of attributes, and each request begins with a clone.
            if kind in _IMMUTABLE or name == "_parameters":
                attributes[name] = value
            else:
                is_empty = kind in _COLLECTIONS and not value
                attributes[name] = kind() if is_empty else _clone_value(value, clones, model_code)
    return clones[id(root)]


def _clone_value(value: Any, clones: MutableMapping[int, Any], model_code: AbstractSet[str]) -> Any:
    """``value`` with modules and buffers replaced by their clones, and copies of what a pass may change.

    ``model_code`` names the Python modules that define the model's classes.
    """
    if isinstance(value, (nn.Module, torch.Tensor)):
        return clones.get(id(value), value)
    # All configs of transformers have this method; the other objects are of the model's own classes.
    if hasattr(value, "get_text_config") or (
        type(value).__module__ in model_code and hasattr(value, "__dict__")
    ):
        return _copy_object(value, clones, model_code)
    if isinstance(value, types.MethodType) and id(value.__self__) in clones:
        return types.MethodType(value.__func__, clones[id(value.__self__)])
    if type(value) in (list, tuple, set):
        return type(value)(_clone_value(each, clones, model_code) for each in list(value))
    if isinstance(value, dict):  # ordered and default dictionaries keep their kind
        copied = value.copy()
        for key, each in list(copied.items()):
            copied[key] = _clone_value(each, clones, model_code)
        return copied
    return value


def _copy_object(value: Any, clones: MutableMapping[int, Any], model_code: AbstractSet[str]) -> Any:
    """A copy of ``value`` and of such objects in it; modules that share it share its copy."""
    if id(value) not in clones:
        clones[id(value)] = copied = copy.copy(value)
        for name, each in list(vars(copied).items()):
            vars(copied)[name] = _clone_value(each, clones, model_code)
    return clones[id(value)]
