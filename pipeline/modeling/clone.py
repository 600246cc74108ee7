"""Shallow clones of module trees, one for each request."""

import copy
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, MutableMapping
from collections.abc import Set as AbstractSet
from typing import Any, Self

import torch
from torch import nn

from layerstream.pipeline.modeling.own_buffers import is_small

__all__ = ["IMMUTABLE", "ModuleFunction", "OwnBuffersOf", "all_modules", "clone_modules"]

# Kinds of values that nothing changes.
IMMUTABLE = frozenset({bool, int, float, str, type(None), torch.dtype, type})
_COLLECTIONS = frozenset({dict, OrderedDict, list, set})

OwnBuffersOf = Callable[[Iterable[torch.Tensor]], dict[int, torch.Tensor]]
"""Makes the buffers of a clone, by the ids of those given."""


def all_modules(root: nn.Module) -> list[nn.Module]:
    """All modules of a tree, each once, ``root`` first.

    ``nn.Module.modules`` builds all their paths, which takes five times as long; each request goes through the tree.
    """
    found = {id(root): root}
    waiting = [root]
    while waiting:
        # list(): a thread without a clone may be changing the tree itself meanwhile.
        for child in list(waiting.pop()._modules.values()):  # noqa: SLF001
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


class ModuleFunction:
    """A function in the attributes of a module that stands for one of its methods; a clone has its own.

    It does not keep the module: a cycle would keep a request's clone, and its memory, until it is collected.
    """

    def __init__(self, module: weakref.ref[nn.Module]) -> None:
        self._module = module

    def module(self) -> nn.Module:
        """The module, through which the function is called."""
        module = self._module()
        assert module is not None  # noqa: S101 - see above
        return module

    def of(self, module: nn.Module) -> Self:
        """The same function of ``module``."""
        return type(self)(weakref.ref(module))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same function of the copy of the module."""
        return self.of(memo[id(self.module())])


def clone_modules(root: nn.Module, own_buffers: OwnBuffersOf | None = None) -> Any:
    """A shallow clone of a module tree, with the same parameter tables but its own buffers, attributes and configs.

    A forward pass writes to its modules: dynamic rotary embeddings keep their latest frequencies in buffers, some in
    place, and lengths in attributes. ``generate`` writes to the config: while it decodes on a GPU, experts are computed
    in another way than in prompts. Objects of the model's own code that are not modules (such as token maps) cache what
    they have computed, also in a pass on the meta device. Concurrent passes on one tree would use each other's values.

    Args:
        root: The module tree.
        own_buffers: ``OwnBuffers.of_clone`` of the tree; without it, the clone has copies of small buffers only, and
            shares the others.
    """
    # The clones of modules, buffers, configs and such objects, by the ids of the originals.
    clones: dict[int, Any] = {}
    modules = all_modules(root)
    module_names = {type(module).__module__ for module in modules}
    model_code = {name for name in module_names if not name.startswith("torch.")}
    buffers: list[torch.Tensor] = []
    for module in modules:
        clones[id(module)] = object.__new__(type(module))
        # Placeholders of streamed buffers are of another type. list(): see ``all_modules``.
        buffers += [each for each in list(module._buffers.values()) if type(each) is torch.Tensor]  # noqa: SLF001
    with torch.inference_mode(mode=False), torch.no_grad():
        clones |= (own_buffers or _copies_of_small)(buffers)
    for module in modules:
        # A copy first, for the same reason.
        attributes = vars(module).copy()
        for name, value in attributes.items():
            kind = type(value)
            # By far the most: a model has thousands of attributes, and each request begins with a clone.
            if kind in IMMUTABLE or name == "_parameters":
                continue
            is_empty = kind in _COLLECTIONS and not value
            attributes[name] = kind() if is_empty else _clone_value(value, clones, model_code)
        vars(clones[id(module)]).update(attributes)
    return clones[id(root)]


def _copies_of_small(buffers: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    return {id(buffer): buffer.clone() for buffer in buffers if is_small(buffer)}


def _clone_value(  # noqa: PLR0911 - one for each kind
    value: Any, clones: MutableMapping[int, Any], model_code: AbstractSet[str]
) -> Any:
    """``value`` with modules and buffers replaced by their clones, and copies of what a pass may change.

    ``model_code`` names the Python modules that define the model's classes.
    """
    if isinstance(value, (nn.Module, torch.Tensor)):
        return clones.get(id(value), value)
    if isinstance(value, ModuleFunction):
        return value.of(clones[id(value.module())])
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
