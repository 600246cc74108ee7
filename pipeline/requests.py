"""What a request needs of memory, told from its inputs before it boards.

KV caches and activations are priced by the formula that the plan reserves by; see ``workload_bytes``.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerstream.pipeline.admission import refusal
from layerstream.pipeline.overheads import overheads
from layerstream.pipeline.plan import Workload
from layerstream.pipeline.workload import workload_bytes

__all__ = ["Estimator", "Need", "by_name", "takes_criteria"]

# Below this, a prompt in pieces takes more sweeps than anybody would wait for.
_SMALLEST_CHUNK = 32
# What assisted generation looks ahead by default, and transformers' default for new tokens.
_CANDIDATES = 20
_NEW_TOKENS = 20
# Inputs that are not tokens: how many tokens a model makes of them is its own affair.
_OTHER_INPUTS = ("pixel_values", "input_features", "input_values")


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a request takes."""

    nbytes: int
    sequences: int  # rows of its batch, as the caller sees them
    prompt_tokens: int  # ids in each row that the generated ones come behind
    new_tokens: int
    chunk_tokens: int | None = None  # the prompt has to be read in pieces of so many tokens
    step_tokens: int = 0  # of a pass behind the prompt, over all rows
    step_bytes: int = 0  # what it takes while such passes are under way


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """How many tokens the inputs hold."""

    rows: int
    length: int  # new to the model
    past: int  # in the cache that comes with them
    decoder: int  # of an encoder-decoder's decoder
    prefix: int  # ids in each row that generated ones come behind
    told: bool  # False: there are inputs of which it is not known how many tokens they make


class Estimator:
    """Prices the requests of one model.

    Args:
        module: the transformers model.
        config: config.json; without one, nothing is known and nothing reserved.
        workload: what the plan reserves for.
        room_bytes: memory for all requests together.
        on_cpu: activations are in the host's memory, where a request also takes what is no tensor.
        reserved_bytes: what the plan reserves for ``workload``. Where it was measured, prices follow it.
    """

    def __init__(
        self,
        module: Any,
        config: Mapping[str, Any] | None,
        *,
        workload: Workload,
        room_bytes: int,
        on_cpu: bool = False,
        reserved_bytes: int | None = None,
    ) -> None:
        estimated = workload_bytes(config, workload)[0]
        self._scale = reserved_bytes / estimated if reserved_bytes and estimated else 1.0
        self._module = module
        self._config = config
        self._workload = workload
        self._room = room_bytes
        self._on_cpu = on_cpu
        self._modules = sum(1 for _ in module.modules())
        text = module.config.get_text_config() if hasattr(module, "config") else None
        has_head = hasattr(module, "get_output_embeddings") and module.get_output_embeddings()
        self._vocabulary = getattr(text, "vocab_size", 0) if has_head is not None else 0
        self._item = getattr(module, "dtype", torch.float32).itemsize

    def resize(self, room_bytes: int) -> None:
        """From now on there is so much for all requests together."""
        self._room = room_bytes

    def forward(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> Need:
        """What one forward pass takes: its caches, its activations, and logits for all positions.

        Raises:
            AdmissionError: more than there is for all requests together.
        """
        named = by_name(getattr(self._module, "forward", None), inputs, named)
        shape = self._shape(named)
        kept = named.get("logits_to_keep")
        positions = kept if isinstance(kept, int) and kept > 0 else shape.length
        nbytes = self._bytes(
            shape,
            rows=shape.rows,
            at_once=shape.length,
            tokens=shape.length + shape.past + shape.decoder,
        )
        # A loss is computed from logits in float32.
        item = self._item + (8 if named.get("labels") is not None else 0)
        nbytes += shape.rows * (positions - 1) * self._vocabulary * item
        nbytes += self._beside_bytes(shape.rows * shape.length, logits=shape.rows * positions)
        words = f"a forward pass over {shape.rows} x {shape.length} tokens"
        return self._checked(
            words, shape, Need(nbytes=nbytes, sequences=shape.rows, prompt_tokens=0, new_tokens=0)
        )

    def generation(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> Need:
        """What a generation takes at its end, when its caches are full.

        A prompt whose activations do not fit in one piece is given a chunk size, where the strategy of
        generation allows for that.

        Raises:
            AdmissionError: more than there is for all requests together.
        """
        named = by_name(getattr(self._module, "generate", None), inputs, named)
        shape = self._shape(named)
        setting = _Settings(self._module, named)
        # The ids that come with a cache usually hold the tokens that it was made of, too.
        prompt = shape.length if shape.length > shape.past else shape.length + shape.past
        new = self._new_tokens(setting, shape)
        branches = max(setting.number("num_beams", 1), setting.number("num_return_sequences", 1))
        rows = shape.rows * branches
        candidates = self._candidates(setting, named)
        if setting.get("guidance_scale") not in (None, 1):
            rows *= 2  # a second pass without the prompt, with a cache of its own

        def at_once(tokens: int) -> int:
            nbytes = self._bytes(
                shape, rows=rows, at_once=tokens, tokens=prompt + shape.decoder + new
            )
            # Logits, scores, softmax in float32.
            nbytes += rows * candidates * self._vocabulary * 12
            scores = setting.number("output_scores", 0) + setting.number("output_logits", 0)
            nbytes += scores * rows * new * self._vocabulary * 4
            nbytes += self._assistant_bytes(named, rows=rows, tokens=prompt + new)
            # What the pass over the prompt has made libraries keep stays to the end.
            return nbytes + self._beside_bytes(rows * shape.length, logits=rows * (1 + candidates))

        cached = setting.get("use_cache") is not False
        chunk = setting.get("prefill_chunk_size")
        first = min(shape.length, chunk) if isinstance(chunk, int) else shape.length
        need = at_once(max(first, candidates) if cached else prompt + new)
        smaller = None
        if need > self._room and chunk is None and self._may_chunk(setting, named, shape):
            smaller = self._chunk(shape.length, at_once)
            need = need if smaller is None else at_once(smaller)
        words = f"generating {shape.rows} x ({prompt} + {new}) tokens"
        return self._checked(
            words,
            shape,
            Need(
                nbytes=need,
                sequences=shape.rows,
                prompt_tokens=shape.prefix,
                new_tokens=new,
                chunk_tokens=smaller,
                step_tokens=rows * (1 + candidates) if cached else 0,
                step_bytes=min(need, at_once(1 + candidates)) if cached else need,
            ),
        )

    def _shape(self, named: Mapping[str, Any]) -> _Shape:
        given = dict(named)
        main = getattr(self._module, "main_input_name", "input_ids")
        if "inputs" in given:  # as generate calls it
            given.setdefault(main, given["inputs"])
        rows, length = _tokens(given, "input_ids", "inputs_embeds")
        decoder_rows, decoder = _tokens(given, "decoder_input_ids", "decoder_inputs_embeds")
        past: Any = given.get("past_key_values")
        cached = past.get_seq_length() if hasattr(past, "get_seq_length") else 0
        first = [
            value.shape[0]
            for value in given.values()
            if isinstance(value, torch.Tensor) and value.dim()
        ]
        ids = _tokens(given, "input_ids", "")[1]
        if getattr(getattr(self._module, "config", None), "is_encoder_decoder", False):
            ids = max(decoder, 1)  # it begins with a token of its own
        return _Shape(
            rows=max(rows, decoder_rows) or max(first, default=1),
            length=max(length, 1),
            past=int(cached),
            decoder=decoder,
            prefix=ids,
            told=bool(rows or decoder_rows) and not _others(given),
        )

    def _bytes(self, shape: _Shape, *, rows: int, at_once: int, tokens: int) -> int:
        """KV cache for ``tokens`` in each row, and activations for ``at_once`` of them."""
        at_once = max(at_once, 1)
        asked = Workload(
            batch_size=max(rows, 1), prompt_tokens=at_once, new_tokens=max(tokens - at_once, 1)
        )
        nbytes = int(self._scale * workload_bytes(self._config, asked)[0])
        if shape.told:
            return nbytes
        one = int(self._scale * workload_bytes(self._config, self._workload)[0])
        return max(nbytes, rows * one // self._workload.batch_size)

    def _beside_bytes(self, rows: int, *, logits: int) -> int:
        """What a request takes that is no tensor."""
        if not self._on_cpu:
            return 0
        beside = overheads(self._config, modules=self._modules, rows=rows, logits=logits)
        return beside.rider_bytes

    def _new_tokens(self, setting: "_Settings", shape: _Shape) -> int:
        if (new := setting.get("max_new_tokens")) is not None:
            return max(int(new), 1)
        if (length := setting.get("max_length")) is not None:
            begun = shape.decoder if self._module.config.is_encoder_decoder else shape.length
            return max(int(length) - begun, 1)
        return _NEW_TOKENS

    @staticmethod
    def _candidates(setting: "_Settings", named: Mapping[str, Any]) -> int:
        """How many tokens assisted generation verifies at once, beside the one that it is sure of."""
        if (looked_up := setting.number("prompt_lookup_num_tokens", 0)) > 0:
            return looked_up
        if named.get("assistant_model") is not None:
            return max(setting.number("num_assistant_tokens", _CANDIDATES), 1)
        return 0

    @staticmethod
    def _assistant_bytes(named: Mapping[str, Any], *, rows: int, tokens: int) -> int:
        """The assistant's own KV cache and activations; its weights are the caller's."""
        config = getattr(named.get("assistant_model"), "config", None)
        if config is None:
            return 0
        asked = Workload(batch_size=rows, prompt_tokens=max(tokens, 1), new_tokens=1)
        return workload_bytes(config.to_dict(), asked)[0]

    def _may_chunk(self, setting: "_Settings", named: Mapping[str, Any], shape: _Shape) -> bool:
        return (
            shape.told
            and takes_criteria(self._module)
            and not self._module.config.is_encoder_decoder
            and setting.get("use_cache") is not False
            and not self._candidates(setting, named)
            and not {"inputs_embeds", "custom_generate", "past_key_values"} & named.keys()
        )

    def _chunk(self, length: int, at_once: Any) -> int | None:
        """The largest piece of a prompt that fits, of halves, quarters and so on; None if none does."""
        pieces = 2
        while (chunk := -(-length // pieces)) >= _SMALLEST_CHUNK:
            if at_once(chunk) <= self._room:
                return chunk
            pieces *= 2
        return None

    def _checked(self, words: str, shape: _Shape, need: Need) -> Need:
        if need.nbytes <= self._room:
            return need
        if not shape.told:
            # A guess refuses nobody; it has all the memory to itself.
            return Need(
                nbytes=self._room,
                sequences=need.sequences,
                prompt_tokens=need.prompt_tokens,
                new_tokens=need.new_tokens,
            )
        raise refusal(what=words, need_bytes=need.nbytes, room_bytes=self._room)


class _Settings:
    """What a generation is asked for: by name, by the given generation config, by the model's own."""

    def __init__(self, module: Any, named: Mapping[str, Any]) -> None:
        self._named = named
        self._configs = (named.get("generation_config"), getattr(module, "generation_config", None))

    def get(self, name: str) -> Any:
        """The value of ``name``; None if nobody says."""
        if self._named.get(name) is not None:
            return self._named[name]
        values = (getattr(config, name, None) for config in self._configs)
        return next((value for value in values if value is not None), None)

    def number(self, name: str, default: int) -> int:
        """The same where it is a number."""
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


def _others(given: Mapping[str, Any]) -> bool:
    return any(given.get(name) is not None for name in _OTHER_INPUTS)


def _tokens(given: Mapping[str, Any], ids: str, embeds: str) -> tuple[int, int]:
    """Rows and tokens in each, of token ids or of their embeddings; zeros without any."""
    value = given.get(ids)
    if isinstance(value, torch.Tensor) and value.dim() and not value.is_floating_point():
        return (value.shape[0] if value.dim() > 1 else 1), value.shape[-1]
    value = given.get(embeds)
    if isinstance(value, torch.Tensor) and value.dim() > 1:
        return (value.shape[0] if value.dim() > 2 else 1), value.shape[-2]  # noqa: PLR2004 - rows, tokens, width
    return 0, 0
