"""The memory of a workload besides the weights, counted in forward passes on the meta device.

No weight is read and nothing is computed: the bytes that are alive at any moment follow from shapes.
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

from layerstream.pipeline.modeling.call_arguments import CACHE_NAMES
from layerstream.pipeline.modeling.clone import clone_modules
from layerstream.pipeline.modeling.fake_values import FakeValues
from layerstream.pipeline.modeling.meta_pass import on_meta
from layerstream.pipeline.planning.plan import Workload
from layerstream.pipeline.planning.workload_memory import WorkloadMemory

__all__ = ["LiveBytes", "PromptPass", "measure_memory"]

logger = logging.getLogger(__name__)

# Blocks have 4 to 10 operations per module. A model that loops over its tokens has thousands, which take seconds.
_OPERATIONS_PER_MODULE = 40
_LEAST_OPERATIONS = 2000

# Of torch.nn.attention.SDPBackend: the one that computes the scores of all queries and keys.
_MATH = 0


def measure_memory(
    module: Any, workload: Workload, device: torch.device | None = None
) -> WorkloadMemory | None:
    """The memory of ``workload`` in ``module``, a transformers model on the meta device; None if it cannot be measured.

    Args:
        module: Its weights and buffers are not counted.
        workload: Every sequence is as long as the prompt; with more than one, padding is assumed.
        device: Where it will be computed, which decides the memory of attention; the CPU by default.
    """
    prompt = PromptPass.of(module, workload, device)
    if prompt is None:
        return None
    clone = clone_modules(module)  # its copies of buffers are no activations
    try:
        with torch.no_grad(), prompt.watched():
            prompt.done(clone(**prompt.inputs))
    except Exception as error:  # noqa: BLE001 - whatever a model does without values
        logger.debug("the prompt's activations were not measured: %s", error)
    return prompt.memory()


class PromptPass:
    """The forward pass that processes a workload's prompt, and its memory."""

    inputs: Mapping[str, Any]

    def __init__(self, module: Any, workload: Workload, device: torch.device | None = None) -> None:
        self._module = module
        self._workload = workload
        self._live = LiveBytes(
            limit=_LEAST_OPERATIONS + _OPERATIONS_PER_MODULE * sum(1 for _ in module.modules())
        )
        self._modes = (
            _FusedAttention(device or torch.device("cpu")),
            FakeValues(padded=workload.batch_size > 1),
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
        """Take the output of the pass. To be called inside ``watched``."""
        _sample(output.logits)
        self._output = output
        self._peak_bytes = self._live.peak_bytes

    def memory(self) -> WorkloadMemory | None:
        """The memory of the workload; makes a pass with the last token. None if that or the prompt's pass fails."""
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
            # A sliding window may keep all of a long prompt until the next token; that memory is freed then.
            prefill_bytes=self._peak_bytes - min(prompt_bytes, kv_bytes),
            decode_bytes=self._live.peak_bytes - kv_bytes,
            measured=True,
        )

    def _inputs(self, tokens: int, seen: int) -> dict[str, Any]:
        """The inputs that generation passes for ``tokens`` new ones of ``seen``."""
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
        now_bytes: Alive at present.
        peak_bytes: The most that was alive at any time; may be reset.
    """

    def __init__(self, *, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now_bytes = 0
        self.peak_bytes = 0
        self._left = limit
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the tensors that ``func`` makes."""
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
    """Makes attention on the meta device take the memory of the kernel that the real device would choose.

    The meta device itself always computes all scores.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the tensors that a fused kernel makes, if the device would use one."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            made = self._fused(*args, **kwargs)
            if made is not None:
                return made
        return func(*args, **kwargs)

    def _fused(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **options: Any
    ) -> torch.Tensor | None:
        """The result of attention; None if scores would be computed."""
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
        """A tensor of the shape of ``tensor`` on the real device, in almost no memory."""
        row = torch.empty(tensor.shape[-1:], dtype=tensor.dtype, device=self._device)
        return row.expand(tensor.shape)


def _sample(logits: torch.Tensor) -> None:
    """Make the tensors of the most expensive choice of the next token: top-p sampling, as in transformers."""
    scores = logits[:, -1].to(torch.float32, copy=True)
    best, _order = torch.sort(scores)
    best.softmax(dim=-1).cumsum(dim=-1)


def _grow(cache: Any, tokens: int) -> None:
    """Add ``tokens`` per sequence to ``cache``."""
    for layer in getattr(cache, "layers", ()):
        held = [getattr(layer, name, None) for name in ("keys", "values")]
        # Of shape (batch, heads, tokens, size); a recurrent layer has none.
        states = [each for each in held if isinstance(each, torch.Tensor) and each.dim() == 4]  # noqa: PLR2004
        if tokens and len(states) == len(held):
            layer.update(
                *(each.new_empty((*each.shape[:2], tokens, each.shape[3])) for each in states)
            )


def _cache_of(output: Any) -> tuple[str, Any]:
    """The cache that a model passes to its next step, and the name of the argument."""
    fields = vars(output)  # attributes of a ModelOutput warn of old names
    for name in (*CACHE_NAMES, "state"):
        if fields.get(name) is not None:
            return name, fields[name]
    return "", None


def _storage_bytes(cache: Any) -> int:
    """Bytes of memory that ``cache`` keeps alive, without its counters."""
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
