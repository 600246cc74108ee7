"""Plans as JSON: frozen dataclasses, written and read back with every type checked."""

import json
import types
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import StrEnum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from layerstream.stages.errors import PlanError

__all__ = ["dump", "load"]

P = TypeVar("P")


def dump(plan: Any, *, version: int) -> str:
    """``plan`` and the version of its format as JSON."""
    return json.dumps({"version": version, **asdict(plan)})


def load(kind: type[P], text: str, *, version: int) -> P:
    """The plan of type ``kind`` that ``dump`` wrote.

    Raises:
        PlanError: The text is not a plan, or was written in another version of the format.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"this is not a plan: it is not JSON ({error})") from error
    if not isinstance(raw, dict) or "version" not in raw:
        raise PlanError("this is not a plan: it has no version")
    if repr(raw.pop("version")) != repr(version):  # True and 1.0 equal 1 too
        raise PlanError(
            f"the plan was written by another version; this one reads version {version}"
        )
    try:
        plan: P = _decode(kind, raw)
    except (TypeError, ValueError, KeyError) as error:
        raise PlanError(f"this is not a plan: {error}") from error
    return plan


def _decode(kind: Any, raw: Any) -> Any:
    """``raw`` JSON as a value of type ``kind``, one of the types that plans consist of; checked."""
    if get_origin(kind) in (Union, types.UnionType):
        return _decode_union(get_args(kind), raw)
    if get_origin(kind) is tuple:
        if not isinstance(raw, list):
            raise TypeError(f"expected a list, got {raw!r}")
        return tuple(_decode(get_args(kind)[0], each) for each in raw)
    if is_dataclass(kind):
        return _decode_dataclass(kind, raw)
    if issubclass(kind, StrEnum):
        return kind(raw)
    if kind is float and type(raw) is int:
        return float(raw)
    if type(raw) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {raw!r}")
    return raw


def _decode_union(kinds: tuple[Any, ...], raw: Any) -> Any:
    if raw is None and type(None) in kinds:
        return None
    rest = [kind for kind in kinds if kind is not type(None)]
    if len(rest) == 1:
        return _decode(rest[0], raw)
    if type(raw) not in rest:
        raise TypeError(f"{raw!r} is not one of {rest}")
    return raw


def _decode_dataclass(kind: Any, raw: Any) -> Any:
    if not isinstance(raw, Mapping):
        raise TypeError(f"expected {kind.__name__}, got {raw!r}")
    hints = get_type_hints(kind)
    if unknown := raw.keys() - hints.keys():
        raise KeyError(f"unknown {', '.join(sorted(unknown))} in {kind.__name__}")
    return kind(**{name: _decode(hints[name], value) for name, value in raw.items()})
