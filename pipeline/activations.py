"""What a workload takes beside the weights, counted in forward passes on the meta device.

No weight is read and nothing is computed: shapes alone tell how many bytes are alive at any moment.
"""

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from layerstream.pipeline.answers import Answers
from layerstream.pipeline.clones import clone_modules
from layerstream.pipeline.plan import Workload
from layerstream.pipeline.rehearsal import on_meta
from layerstream.pipeline.workload import WorkloadMemory

__all__ = ["LiveBytes", "PromptPass", "measure_memory"]

logger = logging.getLogger(__name__)

# Blocks take 4 to 10 operations per module. A model that loops over its tokens takes thousands, for seconds.
_OPERATIONS_PER_MODULE = 40
_LEAST_OPERATIONS = 2000

# Of torch.nn.attention.SDPBackend: the one that makes the scores of all queries and keys.
_MATH = 0


def measure_memory(
    module: Any, workload: Workload, device: torch.device | None = None
) -> WorkloadMemory | None:
    """What ``workload`` takes in ``module``, a transformers model on the meta device; None where it won't tell.

    Args:
        module: its weights and buffers are not counted.
        workload: every sequence is as long as the prompt; more than one are taken to be padded.
        device: where it will be computed, which decides what attention takes; the CPU by default.
    """
    prompt = PromptPass.of(module, workload, device)
    if prompt is None:
        return None
    clone = clone_modules(module)  # with copies of buffers, which are no activations
    try:
        with torch.no_grad(), prompt.watched():
            prompt.done(clone(**prompt.inputs))
    except Exception as error:  # noqa: BLE001 - whatever a model does without values
        logger.debug("the prompt's activations were not measured: %s", error)
    return prompt.memory()


class PromptPass:
    """The forward pass in which a workload's prompt is processed, and what it took."""

    inputs: Mapping[str, Any]

    def __init__(self, module: Any, workload: Workload, device: torch.device | None = None) -> None:
        self._module = module
        self._workload = workload
        self._live = LiveBytes(
            limit=_LEAST_OPERATIONS + _OPERATIONS_PER_MODULE * sum(1 for _ in module.modules())
        )
        self._modes = (
            _FusedAttention(device or torch.device("cpu")),
            Answers(padded=workload.batch_size > 1),
            self._live,
        )
        self._output: Any = None
        self._peak_bytes = 0
        self.inputs = self._inputs(workload.prompt_tokens, workload.prompt_tokens)

    @classmethod
    def of(
        cls, module: Any, workload: Workload, device: torch.device | None = None
    ) -> "PromptPass | None":
        """The pass; None if ``module`` does not generate text from text alone."""
        accepted = inspect.signature(module.forward).parameters
        able = getattr(module, "can_generate", bool)()
        if not able or module.config.is_encoder_decoder or "input_ids" not in accepted:
            return None
        return cls(module, workload, device)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count what is alive while the block runs, all of it on the meta device."""
        with ExitStack() as entered:
            entered.enter_context(on_meta())
            for mode in self._modes:
                entered.enter_context(mode)
            yield

    def done(self, output: Any) -> None:
        """Take what the pass returned. Call it while watched."""
        _sample(output.logits)
        self._output = output
        self._peak_bytes = self._live.peak_bytes

    def memory(self) -> WorkloadMemory | None:
        """What the workload takes; passes the last token to know. None if the pass failed, or that does."""
        if self._output is None:
            return None
        try:
            return self._memory()
        except Exception as error:  # noqa: BLE001 - whatever a model does without values
            logger.debug("the activations of a step were not measured: %s", error)
            return None

    def _memory(self) -> WorkloadMemory:
        workload = self._workload
        name, cache = _cache_of(self._output)
        self._output = None
        prompt_bytes = _storage_bytes(cache)
        inputs = self._inputs(1, workload.prompt_tokens + workload.new_tokens)
        if name:
            inputs[name] = cache
        clone = clone_modules(self._module)
        with torch.no_grad(), self.watched():
            _grow(cache, workload.new_tokens - 1)
            self._live.peak_bytes = self._live.now_bytes
            output = clone(**inputs)
            _sample(output.logits)
        _, cache = _cache_of(output)
        kv_bytes = _storage_bytes(cache)
        return WorkloadMemory(
            kv_bytes=kv_bytes,
            # A sliding window may keep all of a long prompt until the next token comes: that goes again.
            prefill_bytes=self._peak_bytes - min(prompt_bytes, kv_bytes),
            decode_bytes=self._live.peak_bytes - kv_bytes,
            measured=True,
        )

    def _inputs(self, tokens: int, seen: int) -> dict[str, Any]:
        """What generation gives for ``tokens`` new ones of ``seen``."""
        batch = self._workload.batch_size
        accepted = inspect.signature(self._module.forward).parameters
        inputs: dict[str, Any] = {
            "input_ids": torch.ones((batch, tokens), dtype=torch.long, device="meta"),
            "attention_mask": torch.ones((batch, seen), dtype=torch.long, device="meta"),
            "use_cache": True,
            "logits_to_keep": 1,
        }
        return {name: value for name, value in inputs.items() if name in accepted}


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations have made and that are still alive. Views count once.

    Attributes:
        now_bytes: alive at present.
        peak_bytes: the most that was alive at a time; may be set back.
    """

    def __init__(self, *, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now_bytes = 0
        self.peak_bytes = 0
        self._left = limit
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what ``func`` makes."""
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise RuntimeError("the pass takes too many operations to be worth its while")
        result = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if type(tensor) is not torch.Tensor:
                continue
            storage = tensor.untyped_storage()
            if id(storage) in self._alive:
                continue
            if given is None:
                given = {id(each.untyped_storage()) for each in _tensors_in(args)}
            if id(storage) not in given:  # else a view of a weight or an input
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = id(storage), storage.nbytes()

        def gone(_: Any) -> None:
            del self._alive[key]
            self.now_bytes -= nbytes

        self._alive[key] = weakref.ref(storage, gone)
        self.now_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)


class _FusedAttention(TorchFunctionMode):
    """Has attention on the meta device take what the kernel takes that the real device would choose.

    The meta device itself always makes all scores.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make what a fused kernel makes, where there would be one."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            made = self._fused(*args, **kwargs)
            if made is not None:
                return made
        return func(*args, **kwargs)

    def _fused(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **options: Any
    ) -> torch.Tensor | None:
        """The attention's result; None where scores would be made."""
        stand_ins = [
            each if each is None else self._stand_in(each)
            for each in (query, key, value, attn_mask)
        ]
        choose: Callable[..., int] = torch._fused_sdp_choice  # noqa: SLF001 - no public way to ask
        if choose(*stand_ins, *rest, **options) == _MATH:
            return None
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            # It is turned into numbers, where it does not hold.
            numbers = torch.empty(attn_mask.shape, dtype=query.dtype)
            attn_mask.logical_not()
            attn_mask = numbers
        *batch, heads, queries, _ = query.shape
        attended = torch.empty((*batch, queries, heads, value.shape[-1]), dtype=query.dtype)
        torch.empty((*batch, queries, heads), dtype=torch.float32)  # sums, while it runs
        return attended.transpose(-2, -3)

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the shape of ``tensor`` on the real device, in no memory worth mentioning."""
        row = torch.empty(tensor.shape[-1:], dtype=tensor.dtype, device=self._device)
        return row.expand(tensor.shape)


def _sample(logits: torch.Tensor) -> None:
    """Make what choosing the next token of each sequence takes at most: top-p sampling, as transformers does it."""
    scores = logits[:, -1].to(torch.float32, copy=True)
    best, _order = torch.sort(scores)
    best.softmax(dim=-1).cumsum(dim=-1)


def _grow(cache: Any, tokens: int) -> None:
    """Have ``cache`` take ``tokens`` more per sequence."""
    for layer in getattr(cache, "layers", ()):
        held = [getattr(layer, name, None) for name in ("keys", "values")]
        # Of shape (batch, heads, tokens, size); a recurrent layer has none.
        states = [each for each in held if isinstance(each, torch.Tensor) and each.dim() == 4]  # noqa: PLR2004
        if tokens and len(states) == len(held):
            layer.update(
                *(each.new_empty((*each.shape[:2], tokens, each.shape[3])) for each in states)
            )


def _cache_of(output: Any) -> tuple[str, Any]:
    """What a model hands on to its next step, and the name by which it takes it."""
    for name in ("past_key_values", "cache_params", "state"):
        cache = getattr(output, name, None)
        if cache is not None:
            return name, cache
    return "", None


def _storage_bytes(cache: Any) -> int:
    """Bytes of memory that ``cache`` keeps alive; its counters do not count."""
    storages = [each.untyped_storage() for each in _tensors_in(cache) if each.dim()]
    return sum({id(storage): storage.nbytes() for storage in storages}.values())


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that ``value`` holds: in lists, mappings and attributes."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors_in(each)
    elif isinstance(value, Mapping):
        yield from _tensors_in(list(value.values()))
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors_in(list(vars(value).values()))
