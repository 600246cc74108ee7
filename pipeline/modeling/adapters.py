"""Adapters over one base model: each request computes with one of them, or with none.

The weights of adapters are resident. Those of the base stream as ever, under the names that they have inside PEFT's
modules (``q_proj.base_layer.weight``). Which adapter is active is an attribute of those modules, so that requests, which
have clones of the module tree, choose independently of one another and share sweeps.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from layerstream.pipeline.modeling.adapter_weights import AdapterTensor
from layerstream.pipeline.planning.adapter_size import AdapterSize
from layerstream.stages.errors import ModelError

__all__ = ["Adapters"]

_Call = Callable[[Any], Any]


class Adapters:
    """The adapters of one model.

    Args:
        keys: What PEFT calls each of them, by its name.
        default: The one that applies if a request chooses none; None for the base model.
        tensors: What has to be loaded.
        size: What they take.
    """

    def __init__(
        self,
        keys: Mapping[str, str],
        *,
        default: str | None = None,
        tensors: Sequence[AdapterTensor] = (),
        size: AdapterSize | None = None,
    ) -> None:
        self._keys = keys
        self._tensors = tensors
        self.default = default
        self.size = size or AdapterSize()

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which requests choose."""
        return tuple(self._keys)

    def load(self) -> None:
        """Read the weights of all into the module tree, on the CPU."""
        for tensor in self._tensors:
            tensor.load()

    def check(self, name: str | None) -> None:
        """Raise a ModelError if there is no adapter of this name; None is the base model."""
        if name is not None and name not in self._keys:
            names = ", ".join(map(repr, self._keys)) or "none"
            raise ModelError(
                f"there is no adapter {name!r}; this model has {names}, and None is the base model"
            )

    def activate(self, root: nn.Module, name: str | None) -> None:
        """Have ``root``, the module tree or a clone, compute with one adapter, or without any."""
        self.check(name)
        self._set(root, [] if name is None else [self._keys[name]])

    def without_choice(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """``named`` without the adapter that it chooses, if it does; raises a ModelError if there is none of that name."""
        self.check(named.get("adapter"))
        return {name: value for name, value in named.items() if name != "adapter"}

    def refuse_choice(self, named: Mapping[str, Any]) -> None:
        """Raise a ModelError if ``named`` chooses an adapter, in a call of the module tree that threads share."""
        if "adapter" in named:
            raise ModelError(
                "adapter= is for forward and generate of the streamed model, and for what load_streamed returns: they "
                "compute with a module tree of their own"
            )

    def chosen(self, call: _Call, named: dict[str, Any]) -> _Call:
        """``call``, which takes a clone of the module tree, for the adapter that ``named`` chooses, if it does.

        Takes that argument out of ``named``.
        """
        if "adapter" not in named:
            return call
        name = named.pop("adapter")
        self.check(name)

        def activate_and_call(clone: nn.Module) -> Any:
            self.activate(clone, name)
            return call(clone)

        return activate_and_call

    def uses(self, root: nn.Module) -> list[Callable[[], None]]:
        """What makes ``root`` compute in all ways that matter for its weights and its memory: without any, and with all.

        With all at once, each layer computes one after the other: in the memory of the largest.
        """
        if not self._keys:
            return [lambda: None]
        return [lambda: self._set(root, []), lambda: self._set(root, list(self._keys.values()))]

    def _set(self, root: nn.Module, keys: list[str]) -> None:
        if not self._keys:
            return
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        for module in root.modules():
            if isinstance(module, BaseTunerLayer):
                active = keys
            elif isinstance(module, AuxiliaryTrainingWrapper):  # which has one at most
                active = [key for key in keys if key in module._adapters][:1] or keys[:1]  # noqa: SLF001
            else:
                continue
            # Not PEFT's methods, which change requires_grad of parameters that all clones share.
            vars(module).update(_disable_adapters=not keys, _active_adapter=list(active))
