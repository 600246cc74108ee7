"""The memory that a request needs, estimated from its inputs before it begins.

KV caches and activations are estimated by the formula of the plan's reservation; see ``estimate_memory``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerstream.pipeline.modeling.call_arguments import (
    GenerationSettings,
    InputShape,
    by_name,
    given_cache,
    input_shape,
    is_encoder_decoder,
    kept_positions,
    reads_prompts_in_pieces,
    takes_criteria,
)
from layerstream.pipeline.modeling.config import text_config_of
from layerstream.pipeline.planning.overheads import overheads
from layerstream.pipeline.planning.plan import Plan, Workload
from layerstream.pipeline.planning.workload_memory import (
    WorkloadMemory,
    estimate_memory,
    has_sinks,
)
from layerstream.pipeline.scheduling.request_memory import RequestMemory
from layerstream.pipeline.scheduling.reserved_share import Parts, ReservedShare

__all__ = ["Estimator", "RequestCost"]

# In smaller pieces, a prompt would take too many sweeps.
_SMALLEST_CHUNK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCost:
    """The memory that a request needs, and the numbers of tokens that it depends on."""

    memory: RequestMemory
    sequences: int
    """Rows in the caller's batch."""
    prompt_tokens: int
    """Ids in each row, before the generated ones."""
    new_tokens: int
    chunk_tokens: int | None = None
    """Tokens in each piece, if the prompt has to be processed in pieces."""
    step_tokens: int = 0
    """Tokens in a pass after the prompt, over all rows."""
    step_bytes: int = 0
    """Bytes that it needs during such a pass in the memory that is shared with resident layers."""


class Estimator:
    """Estimates the memory of the requests of one model.

    Args:
        module: The transformers model.
        config: config.json; without one, nothing is known and nothing reserved.
        workload: The requests that the plan reserves memory for.
        memory: The memory for all requests together.
        on_cpu: Activations are in host memory, where libraries take memory for a request besides tensors.
        plan: The running plan; if the memory of ``workload`` was measured for it, estimates are scaled to that.
        measured: That memory.
        own_buffer_bytes: What each request takes for buffers of its own; part of the plan's memory for ``workload``.
    """

    def __init__(
        self,
        module: Any,
        config: Mapping[str, Any] | None,
        *,
        workload: Workload,
        memory: RequestMemory,
        on_cpu: bool = False,
        plan: Plan | None = None,
        measured: WorkloadMemory | None = None,
        own_buffer_bytes: int = 0,
    ) -> None:
        if measured is not None and measured.prompt_tokens is not None:
            workload = replace(workload, prompt_tokens=measured.prompt_tokens)
        self._module = module
        self._config = config
        self._workload = workload
        self._memory = memory
        own = workload.batch_size * own_buffer_bytes
        self._share = ReservedShare(
            config,
            workload=workload,
            sinks=has_sinks(name for name, _ in module.named_parameters()),
            reserved=None
            if plan is None
            else Parts(plan.kv_cache_bytes, plan.workload_bytes - own - plan.kv_cache_bytes),
            measured=measured,
        )
        self._share_on_device = 0.0
        if plan is not None and plan.kv_cache_bytes:
            self._share_on_device = plan.kv_cache_device_bytes / plan.kv_cache_bytes
        self._own_buffer_bytes = own_buffer_bytes
        self._on_cpu = on_cpu
        self._module_count = sum(1 for _ in module.modules())
        text = text_config_of(module.config) if hasattr(module, "config") else None
        has_head = hasattr(module, "get_output_embeddings") and module.get_output_embeddings()
        # What is reserved for a model that does not generate was measured with the logits of all tokens.
        counted = measured is not None and measured.measured and not module.can_generate()
        has_logits = has_head is not None and not counted
        self._vocabulary_size = getattr(text, "vocab_size", 0) if has_logits else 0
        self._item_bytes = getattr(module, "dtype", torch.float32).itemsize
        widths = (getattr(text, name, 0) for name in ("num_hidden_layers", "hidden_size"))
        layers, width = (each if isinstance(each, int) else 0 for each in widths)
        self._states_bytes = (layers + 1) * width * self._item_bytes  # of a token, if all are kept
        self._encoder_decoder = is_encoder_decoder(module)

    def resize(self, memory: RequestMemory) -> None:
        """Change the memory for all requests together."""
        self._memory = memory

    def forward(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> RequestCost:
        """What one forward pass needs: its cache, its activations, and logits for all positions.

        Raises:
            AdmissionError: More than there is for all requests together.
        """
        named = by_name(getattr(self._module, "forward", None), inputs, named)
        shape = input_shape(self._module, "forward", named)
        positions = kept_positions(named.get("logits_to_keep"), shape.length)
        # A loss is computed from logits in float32.
        logit_bytes = self._item_bytes + (8 if named.get("labels") is not None else 0)
        logits = shape.rows * (positions - 1) * self._vocabulary_size * logit_bytes
        if named.get("output_hidden_states"):
            logits += shape.rows * shape.length * self._states_bytes
        overhead = self._overhead_bytes(shape.rows * shape.length, logits=shape.rows * positions)
        memory = self._needed(
            shape,
            rows=shape.rows,
            pass_tokens=shape.length,
            cached_tokens=shape.length + shape.past + shape.decoder,
            more_bytes=logits + overhead,
        )
        return self._checked(
            f"a forward pass over {shape.rows} x {shape.length} tokens",
            shape,
            RequestCost(memory=memory, sequences=shape.rows, prompt_tokens=0, new_tokens=0),
        )

    def generation(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> RequestCost:
        """What a generation needs at its end, when its cache is full.

        A prompt whose activations do not fit in one piece gets a chunk size, if the generation strategy
        allows that.

        Raises:
            AdmissionError: More than there is for all requests together.
        """
        named = by_name(getattr(self._module, "generate", None), inputs, named)
        shape = input_shape(self._module, "generate", named)
        settings = GenerationSettings(self._module, named)
        # Ids that come with a cache usually include the tokens in the cache.
        prompt = shape.length if shape.length > shape.past else shape.length + shape.past
        new = settings.new_tokens(shape.decoder if self._encoder_decoder else shape.length)
        branches = max(settings.number("num_beams", 1), settings.number("num_return_sequences", 1))
        rows = shape.rows * branches
        candidates = settings.candidates()
        guided = settings.get("guidance_scale") not in (None, 1)
        rows *= 2 if guided else 1  # a second pass without the prompt, with its own cache
        # Logits, scores, softmax in float32; and the scores that are returned.
        returned = settings.number("output_scores", 0) + settings.number("output_logits", 0)
        other = rows * (candidates * 12 + returned * new * 4) * self._vocabulary_size
        other += self._assistant_bytes(named, rows=rows, tokens=prompt + new)

        def memory_with(pass_tokens: int, *, largest: int) -> RequestMemory:
            # What libraries keep after the largest pass, one over the prompt, stays until the end.
            kept = self._overhead_bytes(rows * largest, logits=rows * (1 + candidates))
            return self._needed(
                shape,
                rows=rows,
                pass_tokens=pass_tokens,
                cached_tokens=prompt + shape.decoder + new,
                more_bytes=other + kept,
                half_on_device=guided,
            )

        cached = settings.get("use_cache") is not False
        chunk = settings.get("prefill_chunk_size")
        first = min(shape.length, chunk) if isinstance(chunk, int) else shape.length
        memory = memory_with(max(first, candidates) if cached else prompt + new, largest=first)
        smaller = None
        fits = memory.fits(self._memory)
        if not fits and chunk is None and self._may_chunk(settings, named, shape):
            smaller = self._chunk_tokens(shape.length, lambda n: memory_with(n, largest=n))
            memory = memory if smaller is None else memory_with(smaller, largest=smaller)
        step = memory_with(1 + candidates, largest=smaller or first) if cached else memory
        return self._checked(
            f"generating {shape.rows} x ({prompt} + {new}) tokens",
            shape,
            RequestCost(
                memory=memory,
                sequences=shape.rows,
                prompt_tokens=shape.prefix,
                new_tokens=new,
                chunk_tokens=smaller,
                step_tokens=rows * (1 + candidates) if cached else 0,
                step_bytes=min(memory.shared_bytes, step.shared_bytes),
            ),
        )

    def _needed(
        self,
        shape: InputShape,
        *,
        rows: int,
        pass_tokens: int,
        cached_tokens: int,
        more_bytes: int,
        half_on_device: bool = False,
    ) -> RequestMemory:
        """KV cache for ``cached_tokens`` in each row, activations of a pass over ``pass_tokens`` of them, and more.

        ``half_on_device``: half of the rows have another cache, which the call makes itself on the device.
        """
        pass_tokens, cached_tokens = max(pass_tokens, 1), max(cached_tokens, shape.room)
        workload = Workload(
            batch_size=max(rows, 1),
            prompt_tokens=pass_tokens,
            new_tokens=max(cached_tokens - pass_tokens, 1),
        )
        cache, other = self._share.of(workload)
        cache = max(cache, shape.held_bytes)
        if not shape.is_known:
            reserved, batch_size = self._share.of(self._workload), self._workload.batch_size
            cache = max(cache, rows * reserved.cache // batch_size)
            other = max(other, rows * reserved.other // batch_size)
        other += more_bytes
        if not self._memory.is_split:
            return RequestMemory(shared_bytes=cache + other)
        on_host = cache // (2 if half_on_device else 1) if shape.on_host else 0
        in_vram = cache - on_host if shape.cached else 0
        moved = int(
            on_host * self._share_on_device
        )  # the layers that compute, of a cache in host RAM
        return RequestMemory(shared_bytes=other + in_vram + moved, cache_bytes=on_host)

    def _overhead_bytes(self, rows: int, *, logits: int) -> int:
        """Memory of a request for buffers of its own, and what libraries take besides tensors."""
        if not self._on_cpu:
            return self._own_buffer_bytes
        overhead = overheads(self._config, modules=self._module_count, rows=rows, logits=logits)
        return overhead.per_request_bytes + self._own_buffer_bytes

    @staticmethod
    def _assistant_bytes(named: Mapping[str, Any], *, rows: int, tokens: int) -> int:
        """The assistant's own KV cache and activations; its weights are the caller's."""
        config = getattr(named.get("assistant_model"), "config", None)
        workload = Workload(batch_size=rows, prompt_tokens=max(tokens, 1), new_tokens=1)
        memory = estimate_memory(config and config.to_dict(), workload)
        return memory.reserved_bytes if memory else 0

    def _may_chunk(
        self, settings: GenerationSettings, named: Mapping[str, Any], shape: InputShape
    ) -> bool:
        return (
            shape.is_known
            and takes_criteria(self._module)
            and reads_prompts_in_pieces(self._module)
            and settings.get("use_cache") is not False
            and not settings.candidates()
            and not {"inputs_embeds", "custom_generate"} & named.keys()
            and (given_cache(named) is None or (shape.on_host and not shape.past))
        )

    def _chunk_tokens(self, length: int, memory_with: Callable[[int], RequestMemory]) -> int | None:
        """The size of the largest piece of a prompt that fits: a half, a quarter and so on; None if none does."""
        pieces = 2
        while (chunk := -(-length // pieces)) >= _SMALLEST_CHUNK:
            if memory_with(chunk).fits(self._memory):
                return chunk
            pieces *= 2
        return None

    def _checked(self, request: str, shape: InputShape, cost: RequestCost) -> RequestCost:
        if cost.memory.fits(self._memory):
            return cost
        if not shape.is_known:
            # Inputs of unknown size: refuse nothing on a guess, but run it alone.
            alone = self._memory
            return replace(cost, memory=alone, chunk_tokens=None, step_tokens=0, step_bytes=0)
        raise cost.memory.refusal(request, self._memory)
