"""From a model's source to its plan: opens the checkpoint, traces the model on the meta device, probes the machine."""

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerstream.pipeline.checkpoint.adapter_folder import Sources, resolve_sources
from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.digests import FileDigests, recorded_digests
from layerstream.pipeline.checkpoint.quantization import refuse_packed_otherwise
from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.machine.probe_cache import user_cache_folder
from layerstream.pipeline.machine.probe_unpacking import encodings_of
from layerstream.pipeline.modeling.adapter_injection import add_adapters
from layerstream.pipeline.modeling.assembly import Assembly
from layerstream.pipeline.modeling.tracing import (
    TracedModel,
    config_of,
    resolve_model_class,
    trace_model,
)
from layerstream.pipeline.options import Options, as_budget
from layerstream.pipeline.planning.choices import PlanChoices
from layerstream.pipeline.planning.kernels import Kernels
from layerstream.pipeline.planning.plan import Budget, Plan, ReaderKind
from layerstream.pipeline.planning.planner import plan_model
from layerstream.stages.errors import DeviceError
from layerstream.stages.process.headroom import host_available_bytes
from layerstream.stages.process.libraries import limit_library_memory
from layerstream.stages.process.usage import anonymous_bytes
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.readahead import Readahead, fits_page_cache
from layerstream.stages.threads import finish_in_thread
from layerstream.stages.unpack.compiling import suggest_cache_folder
from layerstream.stages.unpack.samples import compile_kernels

__all__ = ["Opening", "open_model"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """A model that is planned, and ready to be started."""

    checkpoint: Checkpoint
    module: Any
    """The transformers model, without weights."""
    assembly: Assembly
    hardware: Hardware
    plan: Plan
    choices: PlanChoices
    make_plan: Callable[..., Plan]
    """The planner for this model; takes hardware, choices, and the running plan."""
    digests: Mapping[str, FileDigests] | None
    """Those that its files are to be checked against; None if they are not."""

    def replan(self, hardware: Hardware, budget: Budget, *, running: Plan) -> Plan:
        """``running`` with other residents, for ``hardware`` and ``budget``."""
        choices = replace(self.choices, budget=budget)
        return self.make_plan(hardware, choices, running=running)


async def open_model(options: Options, resources: AsyncExitStack, guard: ReadGuard) -> Opening:
    """Find the model, trace it, and plan it; ``resources`` stops what runs in the background."""
    initial_bytes = anonymous_bytes()
    on_cpu = await finish_in_thread(options.on_cpu)  # of a GPU, seconds for the first time
    mapped_from_bytes = limit_library_memory() if on_cpu else None  # before threads have heaps
    budget = as_budget(options.budget, on_cpu=on_cpu) or Budget()
    choices = replace(options.choices, budget=budget)
    # Not ``finish_in_thread``: a download cannot be interrupted, and nothing has to wait for its end.
    sources = await asyncio.to_thread(_find, options)
    # Not ``open_async``: cancelled, that leaves a file open until its thread has returned.
    checkpoint = await finish_in_thread(
        lambda: Checkpoint.open(sources.model, sources.weights, guard=guard), guard=guard
    )
    options.pretrained.refuse_remote_code(checkpoint)
    digests = await finish_in_thread(lambda: _digests(checkpoint, options))
    readahead = await finish_in_thread(
        lambda: _read_ahead(checkpoint, options, guard, on_cpu=on_cpu)
    )
    resources.push_async_callback(finish_in_thread, readahead.stop, without_thread=True)
    trace = functools.partial(
        _trace, mapped_from_bytes=mapped_from_bytes, left=lambda: _left_of(budget, initial_bytes)
    )
    traced, assembly = await finish_in_thread(
        lambda: trace(checkpoint, sources, options, on_cpu=on_cpu)
    )
    hardware = options.hardware or await Hardware.probe(
        checkpoint,
        device=options.pretrained.device,
        dtype=str(traced.module.dtype).removeprefix("torch."),
        measure=options.measure,
        most_bytes=_left_of(budget, initial_bytes),
    )
    # transformers' code for the model, and the module tree: 100 MB if this process had not loaded them before.
    held_bytes = _taken_since(initial_bytes)
    make_model_plan = functools.partial(
        plan_model,
        checkpoint,
        layers=assembly.planned(checkpoint),
        memory=assembly.memory,
        loaded_code_bytes=held_bytes,
        adapters=assembly.adapters.size,
    )
    loaded_bytes = 0 if options.hardware else held_bytes  # given ones were looked up before
    first_plan = functools.partial(
        make_model_plan,
        loaded_code_bytes=loaded_bytes,
        code_to_load_bytes=held_bytes - loaded_bytes,
    )
    plan = await finish_in_thread(lambda: first_plan(hardware, choices))
    _report(checkpoint, traced, assembly, hardware, options)
    return Opening(
        checkpoint=checkpoint,
        module=traced.module,
        assembly=assembly,
        hardware=hardware,
        plan=plan,
        choices=choices,
        make_plan=make_model_plan,
        digests=digests,
    )


def _left_of(budget: Budget, initial_bytes: int | None) -> int | None:
    """What opening has not yet taken of the host's budget; None if there is none."""
    held_bytes = _taken_since(initial_bytes)
    limit = budget.host_bytes(host_available_bytes() + held_bytes)
    return None if limit is None else max(0, limit - held_bytes)


def _taken_since(initial_bytes: int | None) -> int:
    return max(0, (anonymous_bytes() or 0) - (initial_bytes or 0))


def _digests(checkpoint: Checkpoint, options: Options) -> Mapping[str, FileDigests] | None:
    if options.verify is False:
        return None
    return recorded_digests(checkpoint, None if options.verify is True else Path(options.verify))


def _find(options: Options) -> Sources:
    given = options.pretrained
    return resolve_sources(given.source, given.lookup, base=given.base, adapters=given.adapters)


def _report(
    checkpoint: Checkpoint,
    traced: TracedModel,
    assembly: Assembly,
    hardware: Hardware,
    options: Options,
) -> None:
    """Log what users may not expect."""
    if assembly.memory is not None and assembly.memory.sizes_are_computed:
        logger.warning(
            "%s: how much memory a request takes depends on what the model computes; it may exceed the budget",
            checkpoint.path,
        )
    space = hardware.address_space_bytes
    if options.choices.reader is None and space is not None and space < checkpoint.total_bytes:
        logger.warning(
            "%s: the address space (ulimit -v) cannot hold a mapping of the files: they are read directly",
            checkpoint.path,
        )
    if traced.unused:
        logger.info(
            "%s: the model does not use %d tensors: %s",
            checkpoint.path,
            len(traced.unused),
            ", ".join(traced.unused[:8]),
        )


def _read_ahead(
    checkpoint: Checkpoint, options: Options, guard: ReadGuard, *, on_cpu: bool
) -> Readahead:
    """Start reading ahead while the model is traced, if its files will probably be mapped."""
    mapped = options.choices.reader in {None, ReaderKind.MMAP}
    readahead = Readahead([file.path for file in checkpoint.files], guard)
    if mapped and on_cpu and fits_page_cache(checkpoint.total_bytes):
        try:
            readahead.start()
        except DeviceError as error:
            logger.debug("nothing is read ahead: %s", error)
    return readahead


def _trace(
    checkpoint: Checkpoint,
    sources: Sources,
    options: Options,
    *,
    on_cpu: bool,
    mapped_from_bytes: int | None,
    left: Callable[[], int | None],
) -> tuple[TracedModel, Assembly]:
    given = options.pretrained
    refuse_packed_otherwise(checkpoint)
    config, unused = config_of(
        checkpoint,
        model_class=options.model_class,
        config=given.config,
        settings=given.settings,
    )
    model_class = resolve_model_class(config, options.model_class)
    traced = trace_model(
        checkpoint,
        config=config,
        model_class=model_class,
        dtype=given.dtype,
        generation_config=given.generation_config,
        generation_settings=given.settings,
        **given.loading,
        **given.init_arguments(model_class, unused),
    )
    traced, adapters = add_adapters(
        traced,
        checkpoint,
        sources.adapters,
        default=sources.default,
        autocast=given.autocast_adapter_dtype,
    )
    suggest_cache_folder(user_cache_folder() / "kernels")
    if on_cpu:
        exact = options.choices.kernels is Kernels.EXACT
        compile_kernels(encodings_of(checkpoint), traced.module.dtype, products=not exact)
    # A GPU gets whole layers of packed weights, which transformers' operations unpack: tiles in its memory are not implemented.
    return traced, Assembly(
        traced,
        checkpoint,
        options.choices.workload,
        adapters=adapters,
        experts_on_demand=True,
        unpacks_by_tiles=on_cpu,
        mapped_from_bytes=mapped_from_bytes,
        most_bytes=left(),
    )
