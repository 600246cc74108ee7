"""The memory that a workload takes in addition to the weights, counted in forward passes on the meta device.

No weight is read and nothing is computed: the bytes that are alive at any moment follow from shapes.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from layerstream.pipeline.modeling.call_arguments import CACHE_NAMES
from layerstream.pipeline.modeling.clone import clone_modules
from layerstream.pipeline.modeling.computed_sizes import ComputedSizes
from layerstream.pipeline.modeling.fused_attention import FusedAttention
from layerstream.pipeline.modeling.live_bytes import LiveBytes, tensors_in
from layerstream.pipeline.modeling.meta_pass import meta_pass, put_on_meta
from layerstream.pipeline.modeling.prompt_inputs import PromptInputs
from layerstream.pipeline.planning.plan import Workload
from layerstream.pipeline.planning.workload_memory import WorkloadMemory

__all__ = ["PromptPass", "measure_memory"]

logger = logging.getLogger(__name__)

# Blocks have 4 to 10 operations per module. A model that loops over its tokens has thousands, which take seconds.
_OPERATIONS_PER_MODULE = 40
_BASE_OPERATIONS = 2000


def measure_memory(
    module: Any,
    workload: Workload,
    device: torch.device | None = None,
    *,
    mapped_from_bytes: int | None = None,
) -> WorkloadMemory | None:
    """The memory of ``workload`` in ``module``; None if it cannot be measured. Arguments: see ``PromptPass``."""
    prompt_pass = PromptPass.of(module, workload, device, mapped_from_bytes=mapped_from_bytes)
    if prompt_pass is None:
        return None
    for run in prompt_pass.runs():
        clone = clone_modules(module)  # outside: its copies of buffers are not activations
        put_on_meta(clone)
        try:
            run(clone)
        except Exception as error:  # noqa: BLE001 - a model without values may raise anything
            logger.debug("the prompt's activations were not measured: %s", error)
        else:
            break
    return prompt_pass.memory()


class PromptPass:
    """The forward pass that processes a workload's prompt, with an image or sound for each sequence, and its memory.

    Args:
        module: A transformers model on the meta device, whose weights and buffers are not counted.
        workload: Every sequence is as long as the prompt; with more than one, padding is assumed.
        device: The device that will compute it, which decides the memory of attention; the CPU by default.
        mapped_from_bytes: The size from which the C library maps blocks one by one; None if it keeps all that are freed.
    """

    def __init__(
        self,
        module: Any,
        workload: Workload,
        device: torch.device | None = None,
        *,
        mapped_from_bytes: int | None = None,
    ) -> None:
        self._module = module
        self._workload = workload
        self._generates = bool(getattr(module, "can_generate", bool)())
        self._device = device or torch.device("cpu")
        # The rows may come in requests of their own, whose blocks are as much smaller.
        self._mapped_from_bytes = mapped_from_bytes and workload.batch_size * mapped_from_bytes
        self._choices = PromptInputs.choices(module, workload)
        self._measured: PromptInputs | None = None
        self._output: Any = None
        self._live = LiveBytes()
        self._sizes = ComputedSizes()
        self._cached: list[int] | None = None
        self._peak_bytes = self._peak_taken_bytes = 0

    @classmethod
    def of(
        cls,
        module: Any,
        workload: Workload,
        device: torch.device | None = None,
        *,
        mapped_from_bytes: int | None = None,
    ) -> "PromptPass | None":
        """The pass; None if ``module`` takes neither text nor images nor sounds."""
        made = cls(module, workload, device, mapped_from_bytes=mapped_from_bytes)
        return made if made._choices else None

    def runs(self) -> list[Callable[[Any], None]]:
        """Ways to process the prompt with a clone of the module without values; the first that succeeds is measured.

        Those with most inputs come first.
        """
        return [partial(self._run, inputs) for inputs in self._choices]

    def memory(self) -> WorkloadMemory | None:
        """The memory of the workload, for which the last token's pass runs too; None if the prompt's has failed."""
        if self._measured is None:
            return None
        try:
            memory = self._memory(self._measured)
        except Exception as error:  # noqa: BLE001 - a model without values may raise anything
            logger.debug("the activations of a step were not measured: %s", error)
            if self._cached is None:
                return None
            memory = self._memory_of_prompt(self._measured.workload, self._cached)
        tokens = self._measured.workload.prompt_tokens
        return replace(
            memory,
            prompt_tokens=None if tokens == self._workload.prompt_tokens else tokens,
            sizes_are_computed=self._sizes.found,
        )

    def _run(self, inputs: PromptInputs, clone: Any) -> None:
        live = LiveBytes(
            limit=_BASE_OPERATIONS
            + _OPERATIONS_PER_MODULE * sum(1 for _ in self._module.modules()),
            mapped_from_bytes=self._mapped_from_bytes,
            device=self._device,
        )
        output = self._pass(clone, inputs.prompt(), live, answer=inputs.answer)
        if self._measured is None:
            self._measured, self._output, self._live = inputs, output, live
            self._peak_bytes, self._peak_taken_bytes = live.peak_bytes, live.peak_taken_bytes

    def _memory(self, made: PromptInputs) -> WorkloadMemory:
        output, self._output = self._output, None
        argument, cache = _cache_of(output)
        encoded = getattr(output, "encoder_last_hidden_state", None)
        del output
        self._cached = prompt = _storages((cache, encoded))
        clone = clone_modules(self._module)  # its copies of buffers are not activations
        put_on_meta(clone)

        def step(**inputs: Any) -> Any:
            _extend_cache(cache, made.workload.new_tokens - 1)
            self._live.reset_peak()
            return clone(**inputs) if self._generates else None

        inputs = made.step(argument, cache, encoded)
        output = self._pass(step, inputs, self._live, answer=made.answer)
        if self._generates:
            _, cache = _cache_of(output)
        cached = _storages((cache, encoded)) if self._generates else []
        kv_bytes, kv_taken = sum(cached), sum(map(self._live.taken, cached))
        # A sliding window may keep all of a long prompt until the next token; that memory is freed then.
        prefill = self._peak_bytes - min(sum(prompt), kv_bytes)
        decode = self._live.peak_bytes - kv_bytes
        prefill_taken = self._peak_taken_bytes - min(sum(map(self._live.taken, prompt)), kv_taken)
        return WorkloadMemory(
            kv_bytes=kv_bytes,
            prefill_bytes=prefill,
            decode_bytes=decode,
            measured=True,
            # The cache counts once: what was alive before it was complete may be more than what is taken beside it.
            prefill_taken_bytes=max(prefill, prefill_taken),
            decode_taken_bytes=max(decode, self._live.peak_taken_bytes - kv_taken),
        )

    def _memory_of_prompt(self, workload: Workload, storages: list[int]) -> WorkloadMemory:
        """The memory of the workload if all tokens cache as much as those of the prompt, and a step takes no more than it."""
        cached, tokens = sum(storages), workload.prompt_tokens
        prefill = self._peak_bytes - cached
        taken = max(prefill, self._peak_taken_bytes - sum(map(self._live.taken, storages)))
        return WorkloadMemory(
            kv_bytes=-(-cached * (tokens + workload.new_tokens) // tokens),
            prefill_bytes=prefill,
            decode_bytes=prefill,
            measured=True,
            prefill_taken_bytes=taken,
            decode_taken_bytes=taken,
        )

    def _pass(
        self, model: Callable[..., Any], inputs: Mapping[str, Any], live: LiveBytes, *, answer: bool
    ) -> Any:
        return meta_pass(
            model,
            inputs,
            # Fake values are below these, and count nothing that they make.
            observers=(FusedAttention(self._device), self._sizes, live),
            then=self._sample,
            padded=self._workload.batch_size > 1,
            answer=answer,
        )

    def _sample(self, output: Any) -> None:
        if self._generates:
            _sample_token(output.logits)


def _sample_token(logits: torch.Tensor) -> None:
    """Make the tensors of the most expensive way to choose a token: top-p sampling, as in transformers."""
    scores = logits[:, -1].to(torch.float32, copy=True)
    sorted_scores, _order = torch.sort(scores)
    sorted_scores.softmax(dim=-1).cumsum(dim=-1)


def _extend_cache(cache: Any, tokens: int) -> None:
    """Add ``tokens`` to each sequence in ``cache``."""
    cache = getattr(cache, "self_attention_cache", cache)  # of an encoder-decoder
    for layer in getattr(cache, "layers", ()):
        pair = [getattr(layer, name, None) for name in ("keys", "values")]
        # Of shape (batch, heads, tokens, size); a recurrent layer has none.
        states = [each for each in pair if isinstance(each, torch.Tensor) and each.dim() == 4]  # noqa: PLR2004
        if tokens and len(states) == len(pair):
            layer.update(
                *(each.new_empty((*each.shape[:2], tokens, each.shape[3])) for each in states)
            )


def _cache_of(output: Any) -> tuple[str, Any]:
    """The name of the argument by which a model gets its cache at the next step, and the cache."""
    fields = vars(output)  # attributes of a ModelOutput warn of old names
    for name in (*CACHE_NAMES, "state"):
        if fields.get(name) is not None:
            return name, fields[name]
    return "", None


def _storages(cache: Any) -> list[int]:
    """Bytes of each of the tensors in ``cache``, without its counters."""
    storages = [each.untyped_storage() for each in tensors_in(cache) if each.dim()]
    return list({id(storage): storage.nbytes() for storage in storages}.values())
