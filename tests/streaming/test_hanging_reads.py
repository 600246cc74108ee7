"""A read that never returns holds up nobody for ever: not a request that is cancelled, nor opening, nor closing."""

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.checkpoints import CPU, arranged, plan_for, write_checkpoint
from support.faults import Gate
from support.leaks import nothing_left_behind
from support.loop import happens, run
from support.models import inputs_for, save_model
from support.streaming import SMALL, open_streaming

from layerstream.pipeline import CheckpointError, ClosedError, Pipeline, ReadError, StreamedModel
from layerstream.pipeline.checkpoint import checkpoint as checkpoint_module
from layerstream.pipeline.modeling.gathered_table import TableSource
from layerstream.stages.experts.expert_reads import ExpertReads
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.mapped import MmapReader

LIMIT = 0.5  # seconds
GREEDY = {"max_new_tokens": 8, "do_sample": False}
INPUTS = inputs_for("llama")
SAYS = r"safetensors: a read at offset \d+ has not returned for .* is not waited for"


def hanging(monkeypatch, kind, gate):
    """From here on, reads of one kind hang until ``gate`` is opened."""
    preadv, populate = os.preadv, MmapReader._populate
    rows, experts = TableSource._read, ExpertReads._read
    where = threading.local()

    def within(call, value):
        def entered(*given):
            where.kind = value
            try:
                return call(*given)
            finally:
                where.kind = "layers"

        return entered

    def hang(*given):
        if getattr(where, "kind", "layers") == kind:
            gate()
        return preadv(*given)

    monkeypatch.setattr(TableSource, "_read", within(rows, "rows"))
    monkeypatch.setattr(ExpertReads, "_read", within(experts, "experts"))
    monkeypatch.setattr(os, "preadv", hang)
    if kind == "mapped":
        monkeypatch.setattr(MmapReader, "_populate", lambda *given: gate() or populate(*given))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "mixtral", "mixtral")


@contextmanager
def model_of(kind, llama, mixture):
    yield (
        (mixture if kind == "experts" else llama),
        {
            "reader": "mmap" if kind == "mapped" else "direct",
            "hanging_read_seconds": LIMIT,
            **({} if kind != "experts" else {"measure": False}),
        },
    )


KINDS = ["rows", "layers", "experts", "mapped"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", ["cancelled", "deadline"])
def test_a_request_that_waits_for_a_read_that_hangs_ends_when_it_is_told_to(
    kind, ends, llama, mixture, monkeypatch
):
    async def main():
        with model_of(kind, llama, mixture) as (folder, options), Gate() as gate:
            async with await open_streaming(folder, **options) as model:
                if kind == "experts" and model._running.stream.pipeline.experts is None:
                    pytest.fail("nothing is read on demand")
                hanging(monkeypatch, kind, gate)
                request = asyncio.create_task(model.forward(**INPUTS))
                await happens(gate.reached)
                if ends == "cancelled":
                    request.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await request
                else:
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(request, 0.05)
                gate.open()
                assert (await model.forward(**INPUTS)).logits.isfinite().all()

    with nothing_left_behind():
        run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_closing_gives_a_read_that_hangs_up_and_leaves_it_what_it_needs_until_it_returns(
    kind, llama, mixture, monkeypatch, caplog
):
    requests = []

    async def main(gate):
        with model_of(kind, llama, mixture) as (folder, options):
            async with await open_streaming(folder, **options) as model:
                hanging(monkeypatch, kind, gate)
                requests.append(asyncio.create_task(model.forward(**INPUTS)))
                await happens(gate.reached)
            with pytest.raises((ClosedError, ReadError)):
                await requests[0]

    with nothing_left_behind():
        with Gate() as gate:
            run(main(gate))
            (given_up,) = [r.message for r in caplog.records if "is not waited" in r.message]
            assert str(Path(given_up.split(": ")[0]).name) == "model.safetensors"
            left = [t for t in threading.enumerate() if t.name.startswith("layerstream")]
            assert left
            assert all(thread.daemon for thread in left)
        requests.clear()
        for thread in left:
            thread.join(20)


@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_closing_a_pipeline_does_not_wait_for_a_read_that_hangs(reader, tmp_path, monkeypatch):
    write_checkpoint(tmp_path)
    plan = arranged(plan_for(tmp_path, CPU, reader=reader), slots=2)

    async def main(gate):
        guard = ReadGuard(LIMIT)
        async with Pipeline(plan, guard=guard) as pipeline:
            sweep = aiter(pipeline.sweep())
            next_batch = asyncio.ensure_future(anext(sweep))
            await happens(gate.reached)
        with pytest.raises((ClosedError, ReadError)):
            await next_batch
        guard.close()

    with nothing_left_behind():
        with Gate() as gate:
            hanging(monkeypatch, "mapped" if reader == "mmap" else "layers", gate)
            run(main(gate))
            left = [t for t in threading.enumerate() if t.name.startswith("layerstream")]
        for thread in left:
            thread.join(20)


@pytest.mark.parametrize("ends", ["by itself", "cancelled"])
def test_opening_gives_a_header_up_whose_read_hangs(ends, llama, monkeypatch):
    open_file = Path.open

    async def main(gate):
        def hang(path, *given, **named):
            if path.suffix == ".safetensors":
                gate()
            return open_file(path, *given, **named)

        monkeypatch.setattr(checkpoint_module.Path, "open", hang)
        model = StreamedModel.open(llama, workload=SMALL, hanging_read_seconds=LIMIT)
        opening = asyncio.create_task(model.__aenter__())
        await happens(gate.reached)
        if ends == "cancelled":
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
        else:
            with pytest.raises(CheckpointError, match=SAYS):
                await opening

    with nothing_left_behind():
        with Gate() as gate:
            run(main(gate))
            left = [t for t in threading.enumerate() if t.name.startswith("layerstream")]
        for thread in left:
            thread.join(20)


def test_a_read_that_hangs_does_not_keep_the_interpreter_from_its_exit(llama):
    script = textwrap.dedent(f"""
        import asyncio, os, threading
        from layerstream.pipeline import StreamedModel, Workload
        preadv, hangs = os.preadv, threading.Event()

        async def main():
            model = StreamedModel.open({str(llama)!r}, budget="1GiB", workload={{"prompt_tokens": 8}},
                                       device="cpu", reader="direct", hanging_read_seconds=0.3)
            async with model:
                def hang(*given):
                    hangs.set()
                    threading.Event().wait()
                os.preadv = hang
                import torch
                request = asyncio.create_task(model.forward(input_ids=torch.tensor([[1, 2]])))
                await asyncio.to_thread(hangs.wait)
            print("closed", flush=True)

        asyncio.run(main())
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.stdout, done.returncode) == ("closed\n", 0), done.stderr
