"""Measured sweeps over a model's weights, for ``layerstream profile``."""

import argparse
import asyncio
import importlib.util
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerstream.stages.errors import ModelError
from layerstream.stages.telemetry.forecast import (
    PredictionCheck,
    PredictionChecker,
    SweepPrediction,
)
from layerstream.stages.telemetry.spans import StageTimings
from layerstream.stages.telemetry.timings import Timings
from layerstream.tools.console.progress import late_progress, waiting
from layerstream.tools.running.adapters import adapter_size, open_options, request_options
from layerstream.tools.running.expert_profile import ExpertProfile, profile_experts

if TYPE_CHECKING:
    from layerstream.pipeline import Hardware, Plan
    from layerstream.pipeline.checkpoint.adapter_folder import Sources
    from layerstream.stages.compute import Batch

__all__ = ["Profile", "profile_model"]

_POLL_SECONDS = 0.5
# Large enough to measure a disk's rate, and read in a fraction of a second by most.
_SAMPLE_BYTES = 128 << 20
_SAMPLE_BLOCK_BYTES = 8 << 20
_SAMPLE_THREADS = (1, 2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The times of some sweeps, and of their stages."""

    plan: "Plan"
    prompt_tokens: int | None
    """Tokens of each forward pass; None if the weights were streamed without computation."""
    sweep_seconds: tuple[float, ...]
    """Seconds of each sweep, including the first."""
    timings: Timings
    """Timings of the whole run."""
    steady: Timings
    """Timings of the sweeps after the first, or of the first if it is the only one. In a long run only of the latest
    sweeps, whose spans were kept."""
    disk_ceiling_bytes_per_second: float | None
    """The disk's bandwidth; None if unknown."""
    link_ceiling_bytes_per_second: float | None
    """Bandwidth of the link to the device, as probed before the run; None without a link, or if unknown."""
    experts: ExpertProfile | None = None
    """Which experts were needed by tokens that were decoded after the sweeps; None if that was not asked for."""

    @property
    def steady_seconds(self) -> tuple[float, ...]:
        """Seconds of each sweep after the first, or of the first if it is the only one."""
        return self.sweep_seconds[1:] or self.sweep_seconds

    @property
    def predicted(self) -> SweepPrediction:
        """The plan's prediction for sweeps like these: its first, a prefill, or without computation a decoding step."""
        prediction = self.plan.prediction
        if len(self.sweep_seconds) == 1:
            return prediction.first
        return prediction.decode if self.prompt_tokens is None else prediction.prefill

    @property
    def forecast(self) -> PredictionCheck:
        """The steady sweeps compared with the plan's prediction."""
        predictions = PredictionChecker(on_gpu=not self.plan.on_cpu)
        for seconds in self.steady_seconds:
            predictions.count(self.predicted, seconds)
        # In a long run only the latest sweeps have timings by stage.
        scale = len(self.steady_seconds) / max(self.steady.sweeps, 1)
        busy = {f"{each.name}_seconds": each.busy_seconds * scale for each in self.steady.stages}
        return predictions.sums(**busy)

    def ceiling(self, stage: StageTimings) -> float | None:
        """The highest bytes per second that the hardware allows ``stage``; None if unknown."""
        return {
            "read": self.disk_ceiling_bytes_per_second,
            "transfer": self.link_ceiling_bytes_per_second,
        }.get(stage.name)

    def to_json(self) -> dict[str, Any]:
        """The profile as JSON data, with units in the keys."""
        steady, bottleneck = self.steady.to_dict(), self.steady.bottleneck()
        for stage, each in zip(self.steady.stages, steady["stages"], strict=True):
            each["bytes_per_second"] = stage.bytes_per_second
            each["ceiling_bytes_per_second"] = ceiling = self.ceiling(stage)
            each["share_of_ceiling"] = stage.bytes_per_second / ceiling if ceiling else None
        return {
            "device": self.plan.device,
            "reader": str(self.plan.reader),
            "layer_batches": len(self.plan.batches),
            "layer_batch_size": self.plan.layer_batch_size,
            "disk_bytes_per_sweep": self.plan.disk_bytes_per_sweep,
            "adapter_bytes": (self.plan.device_memory or self.plan.host_memory).adapter_bytes,
            "prompt_tokens": self.prompt_tokens,
            "first_sweep_seconds": self.sweep_seconds[0],
            "sweep_seconds": list(self.sweep_seconds),
            "median_sweep_seconds": statistics.median(self.steady_seconds),
            "least_sweep_seconds": min(self.steady_seconds),
            "most_sweep_seconds": max(self.steady_seconds),
            "predicted_sweep_seconds": self.predicted.seconds,
            "bottleneck": {
                "name": bottleneck.name,
                "share_of_time": bottleneck.share,
                "sentence": bottleneck.sentence,
            },
            "measured_sweeps": steady.pop("sweeps"),
            **steady,
            "forecast": self.forecast.to_dict(),
            "experts_on_demand": None if self.experts is None else self.experts.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Streamed:
    """An open pipeline, with or without a model around it."""

    plan: "Plan"
    hardware: "Hardware"
    prompt_tokens: int | None
    timings: Callable[[], Timings]
    sweep: Callable[[], Awaitable[object]]
    experts: Callable[[], Awaitable[ExpertProfile]] | None = None


async def profile_model(sources: "Sources", *, args: argparse.Namespace) -> Profile:
    """Open the model, with its adapters, and measure ``args.sweeps`` sweeps."""
    open_as = _open_model if _can_compute(sources.model, args) else _open_weights
    if args.experts is not None and open_as is _open_weights:
        raise ModelError(
            "--experts needs computation: leave out --no-compute, and install layerstream[hf]"
        )
    times: list[tuple[float, float]] = []
    async with AsyncExitStack() as stack:
        with waiting("opening the model"):
            opened = await stack.enter_async_context(open_as(sources, args))
        async with _progress_shown(opened, sweeps=args.sweeps):
            for _ in range(args.sweeps):
                began = time.perf_counter()
                await opened.sweep()
                times.append((began, time.perf_counter()))
        timings = opened.timings()
        experts = None
        if args.experts is not None and opened.experts is not None:
            with waiting("recording experts"):
                experts = await opened.experts()
    plan = opened.plan
    return Profile(
        plan=plan,
        prompt_tokens=opened.prompt_tokens,
        sweep_seconds=tuple(stop - start for start, stop in times),
        timings=timings,
        steady=_steady(timings, times),
        disk_ceiling_bytes_per_second=plan.throttle_bytes_per_second
        or (None if args.no_ceiling else await asyncio.to_thread(_disk_ceiling, plan)),
        link_ceiling_bytes_per_second=opened.hardware.h2d_bytes_per_second,
        experts=experts,
    )


def _can_compute(path: Path, args: argparse.Namespace) -> bool:
    from layerstream.tools.running.open_checkpoint import open_checkpoint

    return (
        not args.no_compute
        and open_checkpoint(path).config is not None
        and importlib.util.find_spec("transformers") is not None
    )


def _steady(timings: Timings, times: list[tuple[float, float]]) -> Timings:
    """Timings of the latest sweeps whose spans were all kept, without the first, which fills the pipeline."""
    since = timings.complete_since_seconds
    chosen = [each for each in times[1:] if each[0] >= since] or times[-1:]
    return timings.between(chosen[0][0], chosen[-1][1], sweeps=len(chosen))


# -- opening ---------------------------------------------------------------------------------------


@asynccontextmanager
async def _open_weights(sources: "Sources", args: argparse.Namespace) -> AsyncIterator[_Streamed]:
    from layerstream.pipeline import Budget, Checkpoint, Hardware, Pipeline, make_plan
    from layerstream.stages.process.headroom import host_available_bytes

    checkpoint = await Checkpoint.open_async(sources.model)
    budget = Budget(vram=args.vram, host=args.host)
    most_bytes = budget.host_bytes(host_available_bytes())
    hardware = await Hardware.probe(checkpoint, device=args.device, most_bytes=most_bytes)
    plan = make_plan(
        checkpoint,
        hardware,
        budget=budget,
        reader=args.reader,
        throttle_bytes_per_second=args.throttle,
        layer_batch_size=args.layer_batch_size,
        adapters=adapter_size(sources),
    )

    def count_tensors(batch: "Batch", seen: int) -> int:
        return seen + len(batch.tensors)

    async with Pipeline(plan) as pipeline:
        yield _Streamed(
            plan=plan,
            hardware=hardware,
            prompt_tokens=None,
            timings=pipeline.timings,
            sweep=lambda: pipeline.run(count_tensors, 0),
        )


@asynccontextmanager
async def _open_model(sources: "Sources", args: argparse.Namespace) -> AsyncIterator[_Streamed]:
    from layerstream.pipeline import Budget, StreamedModel, Workload

    async with StreamedModel.open(
        sources.source,
        device=args.device,
        budget=Budget(vram=args.vram, host=args.host),
        workload=Workload(
            batch_size=1, prompt_tokens=args.prompt_tokens, new_tokens=1 + (args.experts or 0)
        ),
        reader=args.reader,
        dtype=args.dtype,
        kernels=args.kernels,
        throttle_bytes_per_second=args.throttle,
        layer_batch_size=args.layer_batch_size,
        **open_options(args),
    ) as model:
        inputs = _forward_inputs(model.module, args.prompt_tokens)
        chosen = request_options(args)

        async def sweep() -> None:
            output = await model.forward(**inputs, **chosen)
            # A GPU has finished only when a value of the result is read, as decoding does too.
            await asyncio.to_thread(output[0].flatten()[-1].item)

        yield _Streamed(
            plan=model.plan,
            hardware=model.hardware,
            prompt_tokens=args.prompt_tokens,
            timings=model.timings,
            sweep=sweep,
            experts=lambda: profile_experts(
                model, prompt=inputs["input_ids"], tokens=args.experts, options=chosen
            ),
        )


def _forward_inputs(module: Any, tokens: int) -> dict[str, Any]:
    """Token ids for one forward pass; the values make no difference to streaming."""
    import torch

    if module.main_input_name != "input_ids":
        raise ModelError(
            f"the model takes {module.main_input_name}, not tokens; sweep its weights with --no-compute"
        )
    ids = (torch.arange(tokens) % module.get_input_embeddings().weight.shape[0]).unsqueeze(0)
    return {"input_ids": ids} | (
        {"decoder_input_ids": ids[:, :1]} if module.config.is_encoder_decoder else {}
    )


# -- progress, and the disk's ceiling --------------------------------------------------------------


@asynccontextmanager
async def _progress_shown(opened: _Streamed, *, sweeps: int) -> AsyncIterator[None]:
    """Show the progress of the sweeps while the block runs."""

    def computed_batches() -> int:
        return next(each.items for each in opened.timings().stages if each.name == "compute")

    before = computed_batches()

    async def watch(reach: Callable[[int], None]) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            reach(computed_batches() - before)

    with late_progress("sweeping, layer batches", sweeps * len(opened.plan.batches)) as reach:
        task = asyncio.create_task(watch(reach))
        try:
            yield
            reach(computed_batches() - before)
        finally:
            task.cancel()
            await asyncio.wait([task])


def _disk_ceiling(plan: "Plan") -> float | None:
    """The best bandwidth of raw direct reads of a sample of the files; None for other readers."""
    from layerstream.pipeline.planning.plan import ReaderKind
    from layerstream.tools.benchmarks.raw_read import raw_read

    if plan.reader is not ReaderKind.DIRECT:  # mapped files may come from the page cache
        return None
    paths = [Path(file.path) for file in plan.files]
    best = 0.0
    with late_progress("measuring the disk", len(_SAMPLE_THREADS)) as reach:
        for number, threads in enumerate(_SAMPLE_THREADS, start=1):
            try:
                rate = raw_read(
                    paths,
                    block_bytes=_SAMPLE_BLOCK_BYTES,
                    threads=threads,
                    limit_bytes=_SAMPLE_BYTES,
                )
            except OSError:  # a filesystem without direct reads
                return None
            best = max(best, rate)
            reach(number)
    return best or None
