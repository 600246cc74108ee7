"""The arguments of a call to ``forward`` or ``generate``, by name and with the defaults of the configs."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerstream.pipeline.modeling.config import text_config_of

__all__ = [
    "CACHE_NAMES",
    "GenerationSettings",
    "InputShape",
    "by_name",
    "cache_argument",
    "count_tokens",
    "given_cache",
    "input_shape",
    "is_encoder_decoder",
    "kept_positions",
    "reads_prompts_in_pieces",
    "takes_criteria",
    "wants_cache",
]

# What transformers calls a KV cache or recurrent state: "cache" from 5.24 on, where the others are deprecated.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")

# How many tokens a model makes of these inputs is not known here.
_NON_TOKEN_INPUTS = ("pixel_values", "input_features", "input_values")

# transformers' defaults: new tokens, and candidate tokens of assisted generation.
_DEFAULT_NEW_TOKENS = 20
_DEFAULT_CANDIDATES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class InputShape:
    """How many tokens the inputs hold."""

    rows: int
    length: int
    """New tokens in each row."""
    past: int
    """Tokens in the cache that is passed with them."""
    room: int
    """Tokens that this cache has room for from the beginning, if its size is fixed."""
    held_bytes: int
    """What this cache holds, of whatever kind it is."""
    decoder: int
    """Tokens of an encoder-decoder's decoder."""
    prefix: int
    """Ids in each row, before the generated ones."""
    cached: bool
    """Whether a KV cache is made, or passed with them."""
    on_host: bool
    """Whether that cache is in host RAM, while the model computes on a GPU."""
    is_known: bool
    """Whether it is known how many tokens the model makes of the inputs; images and sounds are not counted."""


class GenerationSettings:
    """The settings of a generation: from its arguments, else its generation config, else the model's."""

    def __init__(self, module: Any, named: Mapping[str, Any]) -> None:
        self._named = named
        self._configs = (named.get("generation_config"), getattr(module, "generation_config", None))

    def get(self, name: str) -> Any:
        """The value of ``name``; None if it is not set."""
        return next(iter(self.values_of(name)), None)

    def values_of(self, name: str) -> list[Any]:
        """All values set for ``name``, the one in effect first."""
        values = (getattr(config, name, None) for config in self._configs)
        return [value for value in (self._named.get(name), *values) if value is not None]

    def number(self, name: str, default: int) -> int:
        """The value of ``name`` if it is a number, else ``default``."""
        value = self.get(name)
        return int(value) if isinstance(value, (int, float)) else default

    def new_tokens(self, prompt_tokens: int) -> int:
        """How many tokens are generated in each row at most, after ``prompt_tokens``."""
        if (new_tokens := self.get("max_new_tokens")) is not None:
            return max(int(new_tokens), 1)
        if (length := self.get("max_length")) is not None:
            return max(int(length) - prompt_tokens, 1)
        return _DEFAULT_NEW_TOKENS

    def candidates(self) -> int:
        """How many candidate tokens assisted generation verifies in one pass."""
        if (lookup_tokens := self.number("prompt_lookup_num_tokens", 0)) > 0:
            return lookup_tokens
        if self._named.get("assistant_model") is not None:
            return max(self.number("num_assistant_tokens", _DEFAULT_CANDIDATES), 1)
        return 0


def by_name(function: Any, inputs: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name; positional ones without a name in ``function`` are left out."""
    parameters = inspect.signature(function).parameters.values() if function is not None else ()
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    return {**dict(zip(names, inputs, strict=False)), **named}


def cache_argument(module: Any) -> str:
    """The name by which ``forward`` and ``generate`` of a transformers model take a KV cache."""
    functions = (module.forward, getattr(module, "prepare_inputs_for_generation", None))
    accepted = [name for each in functions if each for name in inspect.signature(each).parameters]
    return next((name for name in CACHE_NAMES if name in accepted), CACHE_NAMES[0])


def given_cache(named: Mapping[str, Any]) -> Any:
    """The KV cache or recurrent state that a call brings, under any of its names; None without one."""
    return next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)


def takes_criteria(module: Any) -> bool:
    """Whether the model's ``generate`` takes stopping criteria by name."""
    generate = getattr(module, "generate", None)
    return generate is not None and "stopping_criteria" in inspect.signature(generate).parameters


def count_tokens(inputs: Sequence[Any], named: Mapping[str, Any]) -> int | None:
    """The tokens in a call of ``forward``; None if its inputs do not show them."""
    ids = named.get("input_ids", inputs[0] if inputs else None)
    if isinstance(ids, torch.Tensor) and not ids.is_floating_point():
        return ids.numel()
    embeds = named.get("inputs_embeds")
    return embeds.shape[:-1].numel() if isinstance(embeds, torch.Tensor) else None


def is_encoder_decoder(module: Any) -> bool:
    """Whether the model's config says that it has an encoder and a decoder."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def reads_prompts_in_pieces(module: Any) -> bool:
    """Whether the model's ``generate`` can process a prompt in pieces.

    It asks the cache how many tokens it holds, which a recurrent state alone does not count; caches of other kinds than
    transformers' own are not handed from piece to piece.
    """
    supports = getattr(module, "_supports_default_dynamic_cache", None)
    takes_cache = {*CACHE_NAMES} & inspect.signature(module.forward).parameters.keys()
    if supports is None or not supports() or not takes_cache or is_encoder_decoder(module):
        return False
    import transformers

    recurrent = transformers.DynamicCache(config=module.config).is_linear
    return not (recurrent and all(recurrent))


def kept_positions(kept: Any, length: int) -> int:
    """Of how many of ``length`` positions a forward pass computes logits, by its ``logits_to_keep``."""
    if isinstance(kept, torch.Tensor):
        return min(kept.numel(), length) if kept.dim() else 1
    if isinstance(kept, slice):
        return len(range(*kept.indices(length)))
    return min(kept, length) if isinstance(kept, int) and kept > 0 else length


def wants_cache(module: Any, method: str, named: Mapping[str, Any]) -> bool:
    """Whether a call makes a KV cache. By default a generation does; for a forward pass the model's config decides.

    Args:
        module: The transformers model.
        method: "forward" or "generate".
        named: All arguments, by name.
    """
    if method == "generate":
        return GenerationSettings(module, named).get("use_cache") is not False
    wants = named.get("use_cache")
    if wants is None and hasattr(module, "config"):
        wants = getattr(text_config_of(module.config), "use_cache", None)
    return bool(wants)


def input_shape(module: Any, method: str, named: Mapping[str, Any]) -> InputShape:
    """How many tokens a call of ``method``, "forward" or "generate", has; ``named`` are all its arguments."""
    given = dict(named)
    main = getattr(module, "main_input_name", "input_ids")
    if "inputs" in given:  # generate's name for it
        given.setdefault(main, given["inputs"])
    rows, length = _rows_and_tokens(given, "input_ids", "inputs_embeds")
    decoder_rows, decoder = _rows_and_tokens(given, "decoder_input_ids", "decoder_inputs_embeds")
    cache = given_cache(given)
    past = _cached_tokens(cache)
    first_dims = [
        value.shape[0]
        for value in given.values()
        if isinstance(value, torch.Tensor) and value.dim()
    ]
    ids = _rows_and_tokens(given, "input_ids", "")[1]
    if is_encoder_decoder(module):
        ids = max(decoder, 1)  # the decoder starts with one token
    return InputShape(
        rows=max(rows, decoder_rows) or max(first_dims, default=1),
        length=max(length, 1),
        past=past,
        room=max((getattr(each, "max_cache_len", 0) for each in _parts_of(cache)), default=0),
        held_bytes=_held_bytes(cache),
        decoder=decoder,
        prefix=ids,
        cached=past > 0 or wants_cache(module, method, named),
        on_host=getattr(cache, "on_host", False),
        is_known=bool(rows or decoder_rows) and not _has_non_token_inputs(given),
    )


def _cached_tokens(cache: Any) -> int:
    try:
        return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    except ValueError:  # a recurrent state counts no tokens
        return 0


def _held_bytes(cache: Any) -> int:
    storages = {}
    for each in _parts_of(cache):
        if isinstance(each, torch.Tensor) and not each.is_meta:
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _parts_of(cache: Any) -> Iterator[Any]:
    """All that a cache consists of, itself included: its layers, other caches in it, and their tensors."""
    seen: set[int] = set()
    rest = [cache]
    while rest:
        part = rest.pop()
        if id(part) in seen or isinstance(part, str | int | float | type | None):
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, Mapping):
            rest += part.values()
        elif isinstance(part, list | tuple):
            rest += part
        elif not isinstance(part, torch.Tensor) and not hasattr(part, "get_text_config"):
            rest += vars(part).values() if hasattr(part, "__dict__") else ()


def _has_non_token_inputs(given: Mapping[str, Any]) -> bool:
    return any(given.get(name) is not None for name in _NON_TOKEN_INPUTS)


def _rows_and_tokens(given: Mapping[str, Any], ids: str, embeds: str) -> tuple[int, int]:
    """Rows, and tokens in each, of token ids or their embeddings; zeros if there are neither."""
    value = given.get(ids)
    if isinstance(value, torch.Tensor) and value.dim() and not value.is_floating_point():
        return (value.shape[0] if value.dim() > 1 else 1), value.shape[-1]
    value = given.get(embeds)
    if isinstance(value, torch.Tensor) and value.dim() > 1:
        return (value.shape[0] if value.dim() > 2 else 1), value.shape[-2]  # noqa: PLR2004 - rows, tokens, width
    return 0, 0
