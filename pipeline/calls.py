"""What a call of ``forward`` or ``generate`` asks for: its arguments by name, and what holds where it says nothing."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Settings", "by_name", "takes_criteria", "wants_cache"]


class Settings:
    """What a generation is asked for: by name, by the given generation config, by the model's own."""

    def __init__(self, module: Any, named: Mapping[str, Any]) -> None:
        self._named = named
        self._configs = (named.get("generation_config"), getattr(module, "generation_config", None))

    def get(self, name: str) -> Any:
        """The value of ``name``; None if nobody says."""
        return next(iter(self.said(name)), None)

    def said(self, name: str) -> list[Any]:
        """All values of ``name`` that somebody says, the one that holds first."""
        values = (getattr(config, name, None) for config in self._configs)
        return [value for value in (self._named.get(name), *values) if value is not None]

    def number(self, name: str, default: int) -> int:
        """The same as ``get`` where it is a number."""
        value = self.get(name)
        return int(value) if isinstance(value, (int, float)) else default


def by_name(function: Any, inputs: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names, as far as ``function`` has names for them."""
    parameters = inspect.signature(function).parameters.values() if function is not None else ()
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    return {**dict(zip(names, inputs, strict=False)), **named}


def takes_criteria(module: Any) -> bool:
    """Whether the model's ``generate`` is one that takes stopping criteria by name."""
    generate = getattr(module, "generate", None)
    return generate is not None and "stopping_criteria" in inspect.signature(generate).parameters


def wants_cache(module: Any, what: str, named: Mapping[str, Any]) -> bool:
    """Whether a call keeps a KV cache. A forward pass goes by the model's config, which generation does not ask.

    Args:
        module: the transformers model.
        what: "forward" or "generate".
        named: all arguments, by name.
    """
    if what == "generate":
        return Settings(module, named).get("use_cache") is not False
    wants = named.get("use_cache")
    if wants is None and hasattr(module, "config"):
        wants = getattr(module.config.get_text_config(), "use_cache", None)
    return bool(wants)
