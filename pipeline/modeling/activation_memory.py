"""The memory that a workload takes in addition to the weights, counted in forward passes on the meta device.

No weight is read and nothing is computed: the bytes that are alive at any moment follow from shapes.
"""

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from layerstream.pipeline.modeling.call_arguments import CACHE_NAMES
from layerstream.pipeline.modeling.clone import clone_modules
from layerstream.pipeline.modeling.meta_pass import meta_pass
from layerstream.pipeline.planning.plan import Workload
from layerstream.pipeline.planning.workload_memory import WorkloadMemory

__all__ = ["LiveBytes", "PromptPass"]

logger = logging.getLogger(__name__)

# Blocks have 4 to 10 operations per module. A model that loops over its tokens has thousands, which take seconds.
_OPERATIONS_PER_MODULE = 40
_BASE_OPERATIONS = 2000

# The member of torch.nn.attention.SDPBackend that computes the scores of all queries and keys.
_MATH_BACKEND = 0


class PromptPass:
    """The forward pass that processes a workload's prompt, and its memory.

    Args:
        module: A transformers model on the meta device, whose weights and buffers are not counted.
        workload: Every sequence is as long as the prompt; with more than one, padding is assumed.
        device: The device that will compute it, which decides the memory of attention; the CPU by default.
    """

    def __init__(self, module: Any, workload: Workload, device: torch.device | None) -> None:
        self._module = module
        self._workload = workload
        self._live = LiveBytes(
            limit=_BASE_OPERATIONS + _OPERATIONS_PER_MODULE * sum(1 for _ in module.modules())
        )
        # Fake values are below these, and count nothing that they make.
        self._observers = (_FusedAttention(device or torch.device("cpu")), self._live)
        self._output: Any = None
        self._peak_bytes = 0

    @classmethod
    def of(
        cls, module: Any, workload: Workload, device: torch.device | None = None
    ) -> "PromptPass | None":
        """The pass; None if ``module`` does not generate text from text alone."""
        accepted = inspect.signature(module.forward).parameters
        can_generate = getattr(module, "can_generate", bool)()
        if not can_generate or module.config.is_encoder_decoder or "input_ids" not in accepted:
            return None
        return cls(module, workload, device)

    def run(self, clone: Any) -> None:
        """Process the prompt with ``clone``, one of the module."""
        tokens = self._workload.prompt_tokens
        self._output = self._pass(clone, self._inputs(tokens, tokens))
        self._peak_bytes = self._live.peak_bytes

    def memory(self) -> WorkloadMemory | None:
        """The memory of the workload, for which the last token's pass runs too; None if one of the two passes fails."""
        if self._output is None:
            return None
        try:
            return self._memory()
        except Exception as error:  # noqa: BLE001 - a model without values may raise anything
            logger.debug("the activations of a step were not measured: %s", error)
            return None

    def _memory(self) -> WorkloadMemory:
        workload = self._workload
        argument, cache = _cache_of(self._output)
        self._output = None
        prompt_bytes = _storage_bytes(cache)
        inputs = self._inputs(1, workload.prompt_tokens + workload.new_tokens)
        if argument:
            inputs[argument] = cache
        clone = clone_modules(self._module)  # its copies of buffers are not activations

        def step(**inputs: Any) -> Any:
            _extend_cache(cache, workload.new_tokens - 1)
            self._live.peak_bytes = self._live.now_bytes
            return clone(**inputs)

        _, cache_at_end = _cache_of(self._pass(step, inputs))
        kv_bytes = _storage_bytes(cache_at_end)
        return WorkloadMemory(
            kv_bytes=kv_bytes,
            # A sliding window may keep all of a long prompt until the next token; that memory is freed then.
            prefill_bytes=self._peak_bytes - min(prompt_bytes, kv_bytes),
            decode_bytes=self._live.peak_bytes - kv_bytes,
            measured=True,
        )

    def _pass(self, model: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        return meta_pass(
            model,
            inputs,
            observers=self._observers,
            then=lambda output: _sample_token(output.logits),
            padded=self._workload.batch_size > 1,
        )

    def _inputs(self, tokens: int, total_tokens: int) -> dict[str, Any]:
        """The inputs that generation passes for ``tokens`` new tokens of ``total_tokens``."""
        batch = self._workload.batch_size
        accepted = inspect.signature(self._module.forward).parameters
        inputs: dict[str, Any] = {
            "input_ids": torch.ones((batch, tokens), dtype=torch.long, device="meta"),
            "attention_mask": torch.ones((batch, total_tokens), dtype=torch.long, device="meta"),
            "use_cache": True,
            "logits_to_keep": 1,
        }
        return {name: value for name, value in inputs.items() if name in accepted}


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations have made and that are still alive. Views count once.

    Args:
        limit: How many operations may run; None for any number.

    Attributes:
        now_bytes: What is alive at present.
        peak_bytes: The most that was alive at any time; may be reset.
    """

    def __init__(self, *, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now_bytes = 0
        self.peak_bytes = 0
        self._operations_left = limit
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the tensors that ``func`` makes."""
        if self._operations_left is not None:
            self._operations_left -= 1
            if self._operations_left < 0:
                raise RuntimeError("the pass takes too many operations to be measured")
        result = func(*args, **(kwargs or {}))
        inputs: set[int] | None = None
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if type(tensor) is not torch.Tensor:
                continue
            storage = tensor.untyped_storage()
            if id(storage) in self._alive:
                continue
            if inputs is None:
                inputs = {id(each.untyped_storage()) for each in _tensors_in(args)}
            if id(storage) not in inputs:  # else a view of a weight or an input
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = id(storage), storage.nbytes()

        def forget(_: Any) -> None:
            del self._alive[key]
            self.now_bytes -= nbytes

        self._alive[key] = weakref.ref(storage, forget)
        self.now_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)


class _FusedAttention(TorchFunctionMode):
    """Makes attention on the meta device take the memory of the kernel that the real device would choose.

    torch's own attention on the meta device always computes all scores.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the tensors that a fused kernel makes, if the device would use one."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            result = self._fused(*args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)

    def _fused(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **options: Any
    ) -> torch.Tensor | None:
        """The result of attention; None if scores would be computed."""
        stand_ins = [
            each if each is None else self._stand_in(each)
            for each in (query, key, value, attn_mask)
        ]
        choose_backend: Callable[..., int] = torch._fused_sdp_choice  # noqa: SLF001 - no public way to ask
        if choose_backend(*stand_ins, *rest, **options) == _MATH_BACKEND:
            return None
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            # torch makes a mask of numbers from the negation of a boolean one.
            float_mask = torch.empty(attn_mask.shape, dtype=query.dtype)
            attn_mask.logical_not()
            attn_mask = float_mask
        *batch, heads, queries, _ = query.shape
        output = torch.empty((*batch, queries, heads, value.shape[-1]), dtype=query.dtype)
        # The sums of softmax, while the kernel runs.
        torch.empty((*batch, queries, heads), dtype=torch.float32)
        return output.transpose(-2, -3)

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the shape of ``tensor`` on the real device, in almost no memory."""
        row = torch.empty(tensor.shape[-1:], dtype=tensor.dtype, device=self._device)
        return row.expand(tensor.shape)


def _sample_token(logits: torch.Tensor) -> None:
    """Make the tensors of the most expensive way to choose a token: top-p sampling, as in transformers."""
    scores = logits[:, -1].to(torch.float32, copy=True)
    sorted_scores, _order = torch.sort(scores)
    sorted_scores.softmax(dim=-1).cumsum(dim=-1)


def _extend_cache(cache: Any, tokens: int) -> None:
    """Add ``tokens`` to each sequence in ``cache``."""
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


def _storage_bytes(cache: Any) -> int:
    """Bytes of the tensors in ``cache``, without its counters."""
    storages = [each.untyped_storage() for each in _tensors_in(cache) if each.dim()]
    return sum({id(storage): storage.nbytes() for storage in storages}.values())


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in ``value``: in lists, mappings and attributes."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors_in(each)
    elif isinstance(value, Mapping):
        yield from _tensors_in(list(value.values()))
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors_in(list(vars(value).values()))
