"""Puts a KV cache back as it was before a forward pass that failed half-way, so that the pass can be made again."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["CacheMark"]

# Exactly these, not what is derived from them: what they hold is ``keys`` and ``values``, of which a pass never writes to
# those that are there, but puts longer ones in their place.
_GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")
_STATES = ("keys", "values")
# Only ever replaced, by the same number on another device.
_CONSTANTS = ("_sliding_window_tensor",)


class CacheMark:
    """What a cache holds now, without keeping any of its tensors: for one more copy there is no memory.

    Args:
        cache: Any cache or state that a pass gets; None without one.
    """

    def __init__(self, cache: Any) -> None:
        parts = list(_parts_of(cache))
        self._known = all(_is_known(part) for part in parts)
        self._tables = [_Table(part) for part in parts if self._known]
        self._layers = [
            (part.layers, [(layer, _LayerMark(layer)) for layer in part.layers])
            for part in parts
            if self._known and hasattr(part, "layers")
        ]

    def restore(self) -> bool:
        """Put everything back; False, and nothing is changed, if that cannot be done."""
        marks = [mark for _, layers in self._layers for _, mark in layers]
        if not self._known or not all(mark.can_restore() for mark in marks):
            return False
        for table in self._tables:
            table.restore()
        for held, layers in self._layers:
            held[:] = [layer for layer, _ in layers]
        for mark in marks:
            mark.restore()
        return True


def _parts_of(cache: Any) -> Iterator[Any]:
    if cache is not None:
        yield cache
        for name in ("self_attention_cache", "cross_attention_cache"):
            if (part := getattr(cache, name, None)) is not None:
                yield part


def _is_known(cache: Any) -> bool:
    names = {each.__name__ for each in type(cache).__mro__[:-1]}
    known = type(cache).__name__ in {"DynamicCache", "EncoderDecoderCache"} or (
        getattr(cache, "on_host", False) and "DynamicCache" in names
    )
    # An offloading cache moves the next layer while this one computes.
    return known and not getattr(cache, "offloading", False)


class _Table:
    """The attributes of an object, without tensors."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._values = {name: _copied(value) for name, value in vars(owner).items()}

    def restore(self) -> None:
        vars(self._owner).clear()
        vars(self._owner).update(self._values)


def _copied(value: Any) -> Any:
    # A list of layers stays the same object, of which the caller restores the content.
    return value.copy() if isinstance(value, dict | set) else value


class _LayerMark:
    """What one layer of a cache holds."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._states = {
            name: _Length(state)
            for name in _STATES
            if isinstance(state := vars(layer).get(name), torch.Tensor)
        }
        others = {
            name: value
            for name, value in vars(layer).items()
            if name not in self._states and name not in _CONSTANTS
        }
        self._holds_others = any(map(_holds_tensors, others.values()))
        self._values = {name: _copied(value) for name, value in others.items()}

    def can_restore(self) -> bool:
        if self._holds_others:
            return False
        if not self._states:  # it was empty, and is emptied
            return True
        kind = type(self._layer)
        if kind.__name__ not in _GROWING or kind.__module__ != "transformers.cache_utils":
            return False
        counted = getattr(self._layer, "cumulative_length", None)
        return all(
            length.is_in(vars(self._layer)[name], counted=counted)
            for name, length in self._states.items()
        )

    def restore(self) -> None:
        now = dict(vars(self._layer))
        constants = {name: now[name] for name in _CONSTANTS if name in now}
        states = {name: length.taken_from(now[name]) for name, length in self._states.items()}
        vars(self._layer).clear()
        vars(self._layer).update({**self._values, **constants, **states})


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor)


class _Length:
    """How many tokens a tensor ``[batch, heads, tokens, size]`` has, and where it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._device = tensor.device
        self._empty = tensor.numel() == 0  # of one dimension: no token has come yet
        self._tokens = 0 if self._empty else tensor.shape[-2]

    def is_in(self, tensor: torch.Tensor, *, counted: int | None) -> bool:
        """Whether the first tokens of ``tensor`` are still those, of ``counted`` that its layer has got."""
        return self._tensor() is tensor or counted is None or counted <= tensor.shape[-2]

    def taken_from(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._tensor() is tensor or tensor.numel() == 0:
            return tensor
        kept = tensor.new_empty(0) if self._empty else tensor[..., : self._tokens, :]
        return kept.to(self._device)
