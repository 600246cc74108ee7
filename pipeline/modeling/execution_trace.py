"""A forward pass on the meta device: which modules it calls, and when it computes with which weight.

No weight is read and no value is known: where a model depends on values, it gets arbitrary ones that let the pass go
on. So a trace shows the order in which layers are needed, which decides how fast they stream, and where weights
are used outside the calls of their own modules; it shows no results.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree

from layerstream.pipeline.modeling.activation_memory import PromptPass
from layerstream.pipeline.modeling.clone import clone_modules
from layerstream.pipeline.modeling.fake_values import FakeValues
from layerstream.pipeline.modeling.meta_pass import on_meta

__all__ = ["ExecutionTrace", "ModuleCall", "WeightUse", "trace_execution"]

logger = logging.getLogger(__name__)

_aten = torch.ops.aten


class ModuleCall(NamedTuple):
    """A module is called."""

    module: str
    within: tuple[str, ...]
    """Modules that are being called, the outermost one first."""


class WeightUse(NamedTuple):
    """An operation computes with a parameter or buffer."""

    tensor: str
    within: tuple[str, ...]
    """Modules that are being called, the outermost one first."""
    looks_up: bool
    """It looks up rows of an embedding table."""
    writes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionTrace:
    """The calls and uses of one forward pass, as far as it got."""

    complete: bool
    events: tuple[ModuleCall | WeightUse, ...]

    @property
    def uses(self) -> list[WeightUse]:
        """The uses of weights."""
        return [event for event in self.events if isinstance(event, WeightUse)]


def trace_execution(model: Any, prompt: PromptPass | None = None) -> list[ExecutionTrace]:
    """Recordings of forward passes of ``model``, a transformers model on the meta device; the most complete one first.

    The first pass is ``prompt``, if given, which then has its memory measured. Inputs of other passes are made up from
    the signature of the model's ``forward``. If none works, the list may be empty.
    """
    traces = []
    passes: list[PromptPass | dict[str, torch.Tensor]] = [] if prompt is None else [prompt]
    for inputs in chain(passes, _dummy_inputs(model)):
        trace, missed = _recorded(model, inputs)
        traces.append(trace)
        if trace.complete and not missed:
            break
    if not any(trace.complete for trace in traces):
        logger.info("the order of layers is taken from their names, as far as no pass recorded it")
    traces.sort(key=lambda r: (r.complete, len({use.tensor for use in r.uses})), reverse=True)
    return traces


def _recorded(
    root: Any, inputs: PromptPass | dict[str, torch.Tensor]
) -> tuple[ExecutionTrace, bool]:
    """A trace of the pass with ``inputs``, and whether it left out any weight."""
    clone = clone_modules(root)
    events: list[ModuleCall | WeightUse] = []
    tracing = _with_tracing_parameters(clone, events)
    complete = True
    try:
        if isinstance(inputs, PromptPass):
            with torch.no_grad(), inputs.watched():
                inputs.done(clone(**inputs.inputs))
        else:
            with torch.no_grad(), on_meta(), FakeValues():
                clone(**inputs)
    except Exception as error:  # noqa: BLE001 - whatever a model does with inputs made up for it
        logger.debug("no forward pass on the meta device: %s", error)
        complete = False
    trace = ExecutionTrace(complete=complete, events=tuple(events))
    return trace, tracing > len({use.tensor for use in trace.uses})


def _with_tracing_parameters(root: nn.Module, events: list[ModuleCall | WeightUse]) -> int:
    """Record calls and uses of ``root``, a clone, in ``events``; returns how many weights there are."""
    under_way: list[str] = []
    tracing = 0
    for path, module in root.named_modules(remove_duplicate=False):

        def before(_module: nn.Module, _args: Any, path: str = path) -> None:
            events.append(ModuleCall(path, tuple(under_way)))
            under_way.append(path)

        def after(_module: nn.Module, _args: Any, _output: Any) -> None:
            under_way.pop()

        # The hook tables are copies of the original's, so these hooks go with the clone.
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)
    for path, module in root.named_modules():
        tables = {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}  # noqa: SLF001
        vars(module).update(tables)
        for table in tables.values():
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if not tensor.is_meta:
                    table[name] = tensor.to("meta")
                    continue

                def touched(
                    func: Any, first: bool, tensor: str = f"{path}.{name}" if path else name
                ) -> None:
                    events.append(
                        WeightUse(
                            tensor=tensor,
                            within=tuple(under_way),
                            looks_up=func is _aten.embedding.default,
                            writes=first and func._schema.is_mutable,  # noqa: SLF001 - no public way to ask
                        )
                    )

                table[name] = _TracingParameter(tensor, touched)
                tracing += 1
    return tracing


class _TracingParameter(nn.Parameter):
    """A weight without data that records what computes with it."""

    twin: torch.Tensor
    touched: Callable[[Any, bool], None]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001

    @staticmethod
    def __new__(
        cls: type[Self], tensor: torch.Tensor, touched: Callable[[Any, bool], None]
    ) -> Self:
        """A stand-in for ``tensor``, a meta tensor."""
        spy: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - torch's own idiom
            cls, tensor.shape, strides=tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        spy.twin, spy.touched = tensor.detach(), touched
        return spy

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Record the operation, and compute with plain meta tensors."""
        if func in {_aten.detach.default, _aten.alias.default}:
            return args[0]

        def unwrapped(leaf: Any) -> Any:
            if not isinstance(leaf, cls):
                return leaf
            leaf.touched(func, leaf is args[0])
            return leaf.twin

        result = func(*pytree.tree_map(unwrapped, args), **pytree.tree_map(unwrapped, kwargs or {}))
        if func.is_view and isinstance(args[0], cls):
            # Computing with a view after the module that made it has returned needs the weight too.
            touched = args[0].touched
            return pytree.tree_map_only(torch.Tensor, lambda view: cls(view, touched), result)
        return result


def _dummy_inputs(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs that a forward pass of ``model`` may accept, on the meta device; the fullest first."""
    config = model.config
    accepted = inspect.signature(model.forward).parameters
    vision = getattr(config, "vision_config", None) or config
    sizes = [getattr(vision, name, None) for name in ("image_size", "input_size", "img_size")]
    size = next((size for size in sizes if isinstance(size, (int, list, tuple))), 224)
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    channels = _number(vision, "num_channels", 3)
    mel = _number(config, "num_mel_bins", 80)
    frames = 2 * _number(config, "max_source_positions", 1500)
    shapes = {
        "pixel_values": (1, channels, height, width),
        "input_features": (1, mel, frames),
        "input_values": (1, 16000),
    }
    tokens = torch.ones((1, 8), dtype=torch.long, device="meta")
    text = {"input_ids": tokens} if "input_ids" in accepted else {}
    decoder = {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        decoder = {"decoder_input_ids": tokens}
    signals = {
        name: torch.ones(shape, dtype=model.dtype, device="meta")
        for name, shape in shapes.items()
        if name in accepted
    }
    seen = set()
    for inputs in (
        {**text, **decoder, **signals},
        {**text, **decoder},
        {**signals, **decoder},
        signals,
        text,
        {**_on_meta(model.dummy_inputs), **decoder},
    ):
        if inputs and frozenset(inputs) not in seen:
            seen.add(frozenset(inputs))
            yield inputs


def _number(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else default


def _on_meta(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {k: v.to("meta") for k, v in inputs.items() if isinstance(v, torch.Tensor)}
