"""The JSON of a safetensors header: parsed as strictly as safetensors does, within bounds of memory."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from layerstream.pipeline.checkpoint.formats.format import quoted
from layerstream.stages.errors import CheckpointError

__all__ = ["check_values", "decode_json"]

# safetensors refuses JSON that nests deeper; Python's parser goes on for as long as its stack lasts.
_MAX_DEPTH = 127

# Numbers, arrays and objects of a header beyond 16 for each tensor. Python's parser keeps the GIL and takes a few
# gigabytes for a hundred megabytes of empty arrays; the JSON that some put into __metadata__ has far fewer.
_MAX_SURPLUS_VALUES = 1_000_000

_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def check_values(header: bytes, path: Path) -> None:
    """Refuse a header that has far more values than its tensors need."""
    values = sum(map(header.count, (b"{", b"[", b",")))
    if values > 16 * header.count(b'"data_offsets"') + _MAX_SURPLUS_VALUES:
        raise CheckpointError(
            f"{path} has a header of {values:,} values, far more than its tensors need: it is "
            "corrupt, or not a safetensors file; download it again."
        )


def decode_json(header: bytes, path: Path) -> dict[str, Any]:
    """Parse an object; what describes a tensor becomes a tuple of dtype, shape and data_offsets.

    Raises:
        CheckpointError: safetensors would refuse it.
    """
    try:
        entries = json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_json_object,
            parse_int=_json_integer if b"-0" in header else int,
            parse_constant=_refuse_constant,
        )
        if b"\\u" in header:  # an unpaired surrogate parses, but cannot be encoded as a name
            json.dumps(entries, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a header that is not valid JSON ({error}): it is corrupt, or not a "
            "safetensors file; download it again."
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"{path} has a header that is a JSON {type(entries).__name__}, not an object of "
            "tensors: it is not a safetensors file; download it again."
        )
    # A regular header has three brackets for each tensor, and is not searched for deep ones.
    brackets = header.count(b"{") + header.count(b"[")
    if brackets > 3 * len(entries) + 100 and _depth(header) > _MAX_DEPTH:
        raise CheckpointError(
            f"{path} has a header that nests deeper than {_MAX_DEPTH} levels, which safetensors "
            "refuses: it is corrupt; download it again."
        )
    return entries


def _depth(header: bytes) -> int:
    """How deep the objects and arrays of valid JSON nest."""
    structure = re.sub(rb'"[^"\\]*(?:\\.[^"\\]*)*"', b"", header, flags=re.DOTALL)
    brackets = structure.translate(bytes.maketrans(b"[{]}", b"\1\1\xff\xff"), _NO_BRACKETS)
    return int(np.frombuffer(brackets, dtype=np.int8).cumsum(dtype=np.int32).max(initial=0))


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | tuple[Any, ...]:
    """Build a JSON object without duplicate keys, of which json itself silently keeps the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        duplicate = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"key {quoted(duplicate)} occurs twice in one object")
    shape, offsets = result.get("shape"), result.get("data_offsets")
    if type(shape) is list and type(offsets) is list and "dtype" in result:
        # The garbage collector stops tracking tuples of numbers; with 100,000 dicts of lists it would take
        # more time than all the parsing.
        return result["dtype"], tuple(shape), tuple(offsets)
    return result


def _json_integer(text: str) -> int:
    # "-0" is a float to safetensors, which refuses it. As a negative number it is refused here too.
    return -1 if text == "-0" else int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
