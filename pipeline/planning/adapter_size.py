"""The memory of adapters, which change what a model computes. Pure."""

from dataclasses import dataclass

__all__ = ["AdapterSize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSize:
    """What the adapters of a model take together."""

    nbytes: int = 0
    """Of their weights."""
    modules: int = 0
    """By how many modules the model has more."""
