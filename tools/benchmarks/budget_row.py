"""One row of the budget benchmark: a process that streams one model within one budget, and what it took in memory.

The parent samples the anonymous memory of the process as the kernel counts it, from the time at which all code is loaded and
no model is open.
"""

import asyncio
import ctypes
import gc
import json
import os
import random
import re
import select
import signal
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from layerstream.stages.process.usage import anonymous_bytes
from layerstream.tools.compare.cgroups import MemoryCgroup, memory_cgroup

__all__ = ["BudgetRow", "run_row"]

_SAMPLE_SECONDS = 0.001
_NEW_TOKENS = 4
# Names of the most tokens that a model has positions for.
_POSITIONS = (
    *("max_position_embeddings", "n_positions", "max_target_positions", "max_sequence_length"),
    *("max_seq_len", "max_source_positions"),
)
_PRESENT_BIT = 63  # of a page, in /proc/self/pagemap
_SPARE_POSITIONS = 8  # some models number positions from 2 on

Tell = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetRow:
    """What one process does."""

    folder: str
    model: str
    """The class of transformers."""
    batch: int
    prompt: int
    reader: str
    factor: float
    """The budget, in times of the least one."""
    concurrent: bool = False
    """Eight requests at once, some of which are cancelled, instead of one of exactly the workload."""
    measure: bool = False
    """Whether the machine is probed, with an empty cache; then the budget must be known before."""
    budget_bytes: int | None = None
    """None: ``factor`` times the least one, which is only known when the model is traced."""
    kernels: str = "exact"
    dtype: str | None = None
    """What it is computed in; None: as it is stored."""
    encodings: tuple[str, ...] = ()
    """Of packed weights, whose kernels are loaded before."""
    cgroup: bool = False
    """In a memory cgroup that has no more than what is taken before a model is opened, and the budget."""


def run_row(row: BudgetRow, *, seconds: float) -> dict[str, Any]:
    """Run ``row`` in a process forked from this one, which has loaded the libraries; returns what it told, and its peaks.

    After ``seconds`` it is killed.
    """
    if row.measure and row.budget_bytes is None:
        found = run_row(replace(row, measure=False), seconds=seconds)
        if "budget_bytes" not in found:
            return found
        told = run_row(replace(row, budget_bytes=found["budget_bytes"]), seconds=seconds)
        return {"least_bytes": found["least_bytes"], **told}
    with memory_cgroup() if row.cgroup else nullcontext() as group:
        return _run_in(group, row, seconds)


def _run_in(group: MemoryCgroup | None, row: BudgetRow, seconds: float) -> dict[str, Any]:
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(row, group, sending)
    os.close(sending)
    told: dict[str, Any] = {"status": "killed"}
    peaks: dict[str, int] = {}
    deadline, text = time.monotonic() + seconds, b""
    while True:
        ready, _, _ = select.select([receiving], [], [], _SAMPLE_SECONDS)
        if ready:
            if not (piece := os.read(receiving, 1 << 16)):
                break
            text += piece
            *lines, text = text.split(b"\n")
            for line in lines:
                told |= json.loads(line)
        if "phase" in told:
            now = _anonymous_bytes_of(child) - told["idle_bytes"]
            peaks[told["phase"]] = max(peaks.get(told["phase"], 0), now)
        if time.monotonic() > deadline:
            told["status"] = "took too long"
            os.kill(child, signal.SIGKILL)
            deadline = float("inf")
    os.close(receiving)
    os.waitpid(child, 0)
    return {**told, "peaks": peaks, "peak_bytes": max(peaks.values(), default=0)}


def _be_child(row: BudgetRow, group: MemoryCgroup | None, sending: int) -> None:
    """Run ``row`` and end this process."""
    try:
        with os.fdopen(sending, "wb", buffering=0) as pipe:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)

            def tell(what: Mapping[str, Any]) -> None:
                pipe.write(json.dumps(what).encode() + b"\n")

            _stream_row(row, group, tell)
    finally:
        os._exit(0)


def _stream_row(row: BudgetRow, group: MemoryCgroup | None, tell: Tell) -> None:
    """Do what ``row`` says in this process, and ``tell`` phases and results."""
    import torch
    import transformers
    import transformers.generation

    try:
        model_class = getattr(transformers, row.model)
        if group is not None:
            group.join()
            _own_pages()
        torch.nn.Linear(64, 64)(torch.ones(1, 64))
        from layerstream.pipeline.machine.probe_cache import user_cache_folder
        from layerstream.stages.unpack.compiling import suggest_cache_folder
        from layerstream.stages.unpack.samples import compile_kernels

        suggest_cache_folder(user_cache_folder() / "kernels")
        compile_kernels(row.encodings, getattr(torch, row.dtype or "float32"), products=True)
        gc.collect()
        tell({"idle_bytes": anonymous_bytes()})
        if row.budget_bytes is None:
            _plan_within(row.factor, group, tell)
        else:
            tell({"budget_bytes": row.budget_bytes})
            if group is not None:
                group.limit(group.uncached_bytes() + row.budget_bytes)
        tell({"phase": "opening"})
        with tempfile.TemporaryDirectory() as cache:
            if row.measure:  # what was measured before is not known
                os.environ["XDG_CACHE_HOME"] = cache
            asyncio.run(_stream(row, tell, model_class))
    except Exception as error:  # noqa: BLE001 - it is told
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        tell({"status": type(error).__name__, "why": f"{error} ({where})"[:400]})


def _own_pages() -> None:
    """Write to all pages that are shared with the parent since the fork: a copy would be charged to the cgroup when that happens."""
    size = os.sysconf("SC_PAGESIZE")
    ranges = [
        tuple(int(each, 16) for each in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.split()[1] == "rw-p"
    ]
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        for begin, end in ranges:
            pagemap.seek(begin // size * 8)
            for number, (entry,) in enumerate(
                struct.iter_unpack("Q", pagemap.read((end - begin) // size * 8))
            ):
                if entry >> _PRESENT_BIT:
                    ctypes.memmove(begin + number * size, begin + number * size, 1)


def _plan_within(factor: float, group: MemoryCgroup | None, tell: Tell) -> None:
    """Have models planned within ``factor`` times the least budget, which is only known when they are traced.

    From then on, ``group`` has no more than what it has taken when this is called, and that budget.
    """
    from layerstream.pipeline import Budget, PlanError, opening

    idle_bytes = 0 if group is None else group.uncached_bytes()
    module: Any = opening

    plan_model = module.plan_model

    def plan(checkpoint: Any, hardware: Any, choices: Any, **named: Any) -> Any:
        def within(budget_bytes: int) -> Any:
            chosen = replace(choices, budget=Budget(host=budget_bytes))
            return plan_model(checkpoint, hardware, chosen, **named)

        least = None
        try:
            within(1)
        except PlanError as error:
            least = error.needed_bytes
        if least is None:
            raise ValueError("there is no least budget")
        budget = int(factor * least)
        tell({"least_bytes": least, "budget_bytes": budget})
        if group is not None:
            group.limit(idle_bytes + budget)
        return within(budget)

    module.plan_model = plan


async def _stream(row: BudgetRow, tell: Tell, model_class: type[Any]) -> None:
    import torch

    from layerstream.pipeline import AdmissionError, Budget, StreamedModel, Workload

    async with StreamedModel.open(
        row.folder,
        device="cpu",
        budget=None if row.budget_bytes is None else Budget(host=row.budget_bytes),
        workload=Workload(batch_size=row.batch, prompt_tokens=row.prompt, new_tokens=_NEW_TOKENS),
        reader=row.reader,
        model_class=model_class,
        measure=row.measure,
        kernels=row.kernels,
        dtype=getattr(torch, row.dtype) if row.dtype else "auto",
    ) as model:
        plan = model.plan
        tell(
            {
                "workload_bytes": plan.workload_bytes,
                "kv_bytes": plan.kv_cache_bytes,
                "overhead_bytes": plan.overhead_bytes,
                "planned_bytes": plan.host_memory.used_bytes,
                "memory": asdict(plan.host_memory),
                "decode_residents": len(plan.decode_residents),
                "unpacked_bytes": sum(batch.unpacked_bytes for batch in plan.batches),
                "tile_bytes": max(batch.scratch_bytes for batch in plan.batches),
                "notes": list(plan.notes),
            }
        )
        inputs = _inputs(model.module, row)
        if row.concurrent:
            tell({"phase": "eight at once"})
            await _eight_at_once(model, row)
        elif "input_ids" in inputs and model.module.can_generate():
            tell({"phase": "generate"})
            await model.generate(**inputs, max_new_tokens=_NEW_TOKENS, num_beams=1, do_sample=False)
        if not row.concurrent:
            tell({"phase": "forward"})
            try:
                await model.forward(**inputs)
            except AdmissionError as error:
                tell({"refused": str(error)[:200]})
        tell({"phase": "closing"})
    tell({"status": "done", "left_bytes": anonymous_bytes()})


def _inputs(module: Any, row: BudgetRow) -> dict[str, Any]:
    """The inputs of a request of exactly the workload."""
    import inspect

    import torch

    from layerstream.pipeline.modeling.made_up_inputs import media_inputs

    accepted = inspect.signature(module.forward).parameters
    text = _tokens(module, row.batch, row.prompt) if "input_ids" in accepted else {}
    if text and module.can_generate():
        return text
    media = media_inputs(module, rows=row.batch, tokens=row.prompt)
    made = {name: torch.randn(value.shape).to(value.dtype) for name, value in media.items()}
    if getattr(module.config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        made["decoder_input_ids"] = torch.ones((row.batch, 4), dtype=torch.long)
    return {name: value for name, value in text.items() if name in accepted} | made


def _tokens(module: Any, rows: int, tokens: int, seed: int = 0) -> dict[str, Any]:
    import torch

    text = module.config.get_text_config()
    length = _fitting(tokens, text)
    generator = torch.Generator().manual_seed(seed)
    words = min(getattr(text, "vocab_size", 0) or 100, 1000)
    ids = torch.randint(3, words, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _config_of(folder: str) -> Any:
    import transformers

    return transformers.AutoConfig.from_pretrained(folder).get_text_config()


def _fitting(tokens: int, config: Any) -> int:
    """The length of a prompt of ``tokens``, or of as many as the model has positions for."""
    values = [getattr(config, name, None) for name in _POSITIONS]
    taken = _SPARE_POSITIONS + _NEW_TOKENS
    most = [value - taken for value in values if isinstance(value, int) and value > taken]
    return min([tokens, *most])


async def _eight_at_once(model: Any, row: BudgetRow) -> None:
    """Requests of several lengths, a third of which are cancelled when they have run for a while."""
    rng = random.Random(7)

    async def one(number: int) -> None:
        length = rng.randint(max(8, row.prompt // 4), row.prompt)
        inputs = _tokens(model.module, 1, length, seed=number)
        inputs |= {"max_new_tokens": _NEW_TOKENS, "num_beams": 1, "do_sample": False}
        request = asyncio.ensure_future(model.generate(**inputs))
        if number % 3 == 0:
            await asyncio.wait([request], timeout=rng.random())
            request.cancel()
        await asyncio.gather(request, return_exceptions=number % 3 == 0)

    await asyncio.gather(*map(one, range(8)))


def _anonymous_bytes_of(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:  # it has ended
        return 0
    return 1024 * sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", text)))
