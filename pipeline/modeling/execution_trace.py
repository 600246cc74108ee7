"""Traces of forward passes on the meta device: which modules are called, and when which weight is used.

No weight is read and no value is known: where a model depends on values, it gets arbitrary ones that let the pass go
on. So a trace shows the order in which layers are needed, which decides how fast they stream, and which weights
are used outside the calls of their own modules; it has no results.
"""

import logging
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree

from layerstream.pipeline.modeling.activation_memory import PromptPass
from layerstream.pipeline.modeling.clone import clone_modules
from layerstream.pipeline.modeling.made_up_inputs import made_up_inputs
from layerstream.pipeline.modeling.meta_pass import meta_pass, put_on_meta
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

    The first passes are those of ``prompt_pass``, if given, which measures their memory too. Inputs of others are made up
    from the signature of the model's ``forward``. Without any, the list is empty. ``streamed`` are the names of the weights
    whose uses are recorded, if not all are.
    """
    traces = []
    first = [] if prompt_pass is None else prompt_pass.runs()
    others = (partial(meta_pass, inputs=inputs) for inputs in made_up_inputs(model))
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
    others = put_on_meta(root)
    call_stack = _record_calls(root, events)
    for path, module in root.named_modules():
        for table in (module._parameters, module._buffers):  # noqa: SLF001 - the clone's own
            for name, tensor in table.items():
                full_name = f"{path}.{name}" if path else name
                if tensor is None or full_name in others:
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
