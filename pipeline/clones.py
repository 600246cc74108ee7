"""Shallow clones of module trees, one for each forward pass."""

import types
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["clone_modules"]


def clone_modules(root: nn.Module) -> Any:
    """A shallow clone of a module tree: the same parameter tables, but buffers and attributes of its own.

    A forward pass writes to its modules: dynamic rotary embeddings keep their latest frequencies in buffers
    and lengths in attributes. Passes that run side by side on one tree take each other's.
    """
    clones: dict[int, nn.Module] = {}
    for module in root.modules():
        clone = object.__new__(type(module))
        clones[id(module)] = clone
    for module in root.modules():
        vars(clones[id(module)]).update(
            (name, value if name == "_parameters" else _cloned(value, clones))
            for name, value in vars(module).items()
        )
    return clones[id(root)]


def _cloned(value: Any, clones: Mapping[int, nn.Module]) -> Any:
    """``value`` with modules replaced by their clones, and tables that a pass may write to copied."""
    if isinstance(value, nn.Module):
        return clones.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in clones:
        return types.MethodType(value.__func__, clones[id(value.__self__)])
    if type(value) in (dict, list, tuple, set):
        if isinstance(value, dict):
            return {key: _cloned(each, clones) for key, each in value.items()}
        return type(value)(_cloned(each, clones) for each in value)
    if isinstance(value, dict):  # ordered and default dictionaries keep their kind
        copied = value.copy()
        for key, each in value.items():
            copied[key] = _cloned(each, clones)
        return copied
    return value
