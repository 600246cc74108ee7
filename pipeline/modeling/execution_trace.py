"""Traces of forward passes on the meta device: which modules are called, and when which weight is used.

No weight is read and no value is known: where a model depends on values, it gets arbitrary ones that let the pass go
on. So a trace shows the order in which layers are needed, which decides how fast they stream, and which weights
are used outside the calls of their own modules; it has no results.
"""

import inspect
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree

from layerstream.pipeline.modeling.activation_memory import PromptPass
from layerstream.pipeline.modeling.clone import clone_modules
from layerstream.pipeline.modeling.meta_pass import meta_pass
from layerstream.pipeline.modeling.wrapper_tensor import WrapperTensor

__all__ = ["ExecutionTrace", "ModuleCall", "WeightUse", "most_complete_first", "trace_execution"]

logger = logging.getLogger(__name__)

_aten = torch.ops.aten


class ModuleCall(NamedTuple):
    """The call of a module."""

    module: str
    within: tuple[str, ...]
    """The modules whose calls it is in, the outermost first."""


class WeightUse(NamedTuple):
    """An operation that computes with a parameter or buffer."""

    tensor: str
    within: tuple[str, ...]
    """The modules whose calls it is in, the outermost first."""
    looks_up: bool
    """Whether it looks up rows of an embedding table."""
    writes: bool
    """Whether it changes the tensor in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionTrace:
    """The module calls and weight uses of a forward pass, in order."""

    complete: bool
    """Whether the pass has reached its end."""
    written: frozenset[str]
    """Paths of the buffers without weights that it has changed in place."""
    events: tuple[ModuleCall | WeightUse, ...]

    @property
    def uses(self) -> list[WeightUse]:
        """The uses of weights."""
        return [event for event in self.events if isinstance(event, WeightUse)]


def trace_execution(
    model: Any, prompt_pass: PromptPass | None = None, streamed: Container[str] | None = None
) -> list[ExecutionTrace]:
    """Traces of forward passes of ``model``, a transformers model on the meta device; the most complete one first.

    The first pass is ``prompt_pass``, if given, which measures its memory too. Inputs of other passes are made up from
    the signature of the model's ``forward``. Without any, the list is empty. ``streamed`` are the names of the weights
    whose uses are recorded, if not all are.
    """
    traces = []
    first = [] if prompt_pass is None else [prompt_pass.run]
    others = (partial(meta_pass, inputs=inputs) for inputs in _dummy_inputs(model))
    runs: Iterable[Callable[[Any], object]] = chain(first, others)
    for run in runs:
        trace, has_unused = _trace_pass(model, run, streamed)
        traces.append(trace)
        if trace.complete and not has_unused:
            break
    if not any(trace.complete for trace in traces):
        logger.info("the order of layers is taken from their names, as far as no pass recorded it")
    return most_complete_first(traces)


def most_complete_first(traces: Iterable[ExecutionTrace]) -> list[ExecutionTrace]:
    """``traces`` in another order: first those that have reached their end, and used the most weights."""

    def completeness(trace: ExecutionTrace) -> tuple[bool, int]:
        return trace.complete, len({use.tensor for use in trace.uses})

    return sorted(traces, key=completeness, reverse=True)


def _trace_pass(
    root: Any, run: Callable[[Any], object], streamed: Container[str] | None
) -> tuple[ExecutionTrace, bool]:
    """The trace of the pass that ``run`` makes with a clone, and whether it has not used all weights."""
    clone = clone_modules(root)
    events: list[ModuleCall | WeightUse] = []
    weights, others = _install_tracing(clone, events, streamed)
    complete = True
    try:
        run(clone)
    except Exception as error:  # noqa: BLE001 - a model may raise anything for made-up inputs
        logger.debug("no forward pass on the meta device: %s", error)
        complete = False
    written = frozenset(path for path, tensor in others.items() if tensor._version)  # noqa: SLF001 - counts writes
    trace = ExecutionTrace(complete=complete, written=written, events=tuple(events))
    return trace, weights > len({use.tensor for use in trace.uses})


def _install_tracing(
    root: nn.Module, events: list[ModuleCall | WeightUse], streamed: Container[str] | None
) -> tuple[int, dict[str, torch.Tensor]]:
    """Record the calls and uses of ``root``, a clone, in ``events``.

    Returns:
        How many weights there are, and the meta tensors in place of what has values already, by their paths.
    """
    weights = 0
    others: dict[str, torch.Tensor] = {}
    call_stack = _record_calls(root, events)
    for path, module in root.named_modules():
        tables = {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}  # noqa: SLF001
        vars(module).update(tables)
        for table in tables.values():
            for name, tensor in table.items():
                if tensor is None:
                    continue
                full_name = f"{path}.{name}" if path else name
                if not tensor.is_meta:
                    table[name] = others[full_name] = tensor.to("meta")
                    continue
                if streamed is not None and full_name not in streamed:
                    continue

                def record_use(func: Any, is_written: bool, full_name: str = full_name) -> None:
                    events.append(
                        WeightUse(
                            tensor=full_name,
                            within=tuple(call_stack),
                            looks_up=func is _aten.embedding.default,
                            writes=is_written,
                        )
                    )

                table[name] = _TracingParameter(tensor, record_use)
                weights += 1
    return weights, others


def _record_calls(root: nn.Module, events: list[ModuleCall | WeightUse]) -> list[str]:
    """Record the calls of ``root``, a clone, in ``events``; returns the paths of the modules that are being called."""
    call_stack: list[str] = []
    for path, module in root.named_modules(remove_duplicate=False):

        def before(_module: nn.Module, _args: Any, path: str = path) -> None:
            events.append(ModuleCall(path, tuple(call_stack)))
            call_stack.append(path)

        def after(_module: nn.Module, _args: Any, _output: Any) -> None:
            call_stack.pop()

        # The hook tables are copies of the original's, so these hooks go with the clone.
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)
    return call_stack


class _TracingParameter(WrapperTensor, nn.Parameter):
    """A weight without data that records the operations that use it."""

    meta_tensor: torch.Tensor
    record_use: Callable[[Any, bool], None]
    """Takes an operation, and whether it changes the weight in place."""

    @staticmethod
    def __new__(
        cls: type[Self], tensor: torch.Tensor, record_use: Callable[[Any, bool], None]
    ) -> Self:
        """A parameter in place of ``tensor``, a meta tensor."""
        parameter = cls.without_memory(
            tensor.shape, strides=tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        parameter.meta_tensor, parameter.record_use = tensor.detach(), record_use
        return parameter

    def plain(self, func: Any, *, is_written: bool) -> torch.Tensor:
        """Record the operation, and compute with a plain meta tensor."""
        self.record_use(func, is_written)
        return self.meta_tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Let views record their uses, too."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.is_view and isinstance(args[0], cls) and result is not args[0]:
            # Computing with a view after the module that made it has returned needs the weight too.
            record_use = args[0].record_use
            return pytree.tree_map_only(torch.Tensor, lambda view: cls(view, record_use), result)
        return result


def _dummy_inputs(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs that a forward pass of ``model`` may accept, on the meta device; those with most arguments first."""
    config = model.config
    accepted = inspect.signature(model.forward).parameters
    vision = getattr(config, "vision_config", None) or config
    sizes = [getattr(vision, name, None) for name in ("image_size", "input_size", "img_size")]
    size = next((size for size in sizes if isinstance(size, (int, list, tuple))), 224)
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    channels = _int_setting(vision, "num_channels", 3)
    mel_bins = _int_setting(config, "num_mel_bins", 80)
    frames = 2 * _int_setting(config, "max_source_positions", 1500)
    shapes = {
        "pixel_values": (1, channels, height, width),
        "input_features": (1, mel_bins, frames),
        "input_values": (1, 16000),
    }
    tokens = torch.ones((1, 8), dtype=torch.long, device="meta")
    text = {"input_ids": tokens} if "input_ids" in accepted else {}
    decoder = {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        decoder = {"decoder_input_ids": tokens}
    media = {
        name: torch.ones(shape, dtype=model.dtype, device="meta")
        for name, shape in shapes.items()
        if name in accepted
    }
    seen = set()
    for inputs in (
        {**text, **decoder, **media},
        {**text, **decoder},
        {**media, **decoder},
        media,
        text,
        {**_to_meta(model.dummy_inputs), **decoder},
    ):
        if inputs and frozenset(inputs) not in seen:
            seen.add(frozenset(inputs))
            yield inputs


def _int_setting(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else default


def _to_meta(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: value.to("meta") for name, value in inputs.items() if isinstance(value, torch.Tensor)
    }
