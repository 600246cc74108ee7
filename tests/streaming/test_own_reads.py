"""Embedding rows and experts, which a pass reads for itself: a disk that fails for a while fails no request that may wait."""

import asyncio
import errno
import logging
import os
import threading
from functools import partial

import pytest
import torch
from support.faults import Gate
from support.leaks import nothing_left_behind
from support.loop import happens, run, turns
from support.models import inputs_for, save_model
from support.streaming import open_streaming

from layerstream.pipeline import ClosedError, ReadError
from layerstream.pipeline.checkpoint.source_reader import SourceReader
from layerstream.pipeline.modeling.gathered_table import TableSource
from layerstream.stages.experts.expert_reads import ExpertReads
from layerstream.stages.readers import guard as guard_module

GREEDY = {"max_new_tokens": 8, "do_sample": False}
KINDS = pytest.mark.parametrize("kind", ["rows", "experts"])
READS = {"rows": (TableSource, "llama"), "experts": (ExpertReads, "mixtral")}


class Disk:
    """A disk that can fail for the reads of passes, while those of layers succeed."""

    def __init__(self, monkeypatch, kind):
        self.broken, self.attempts = False, 0
        owner, _ = READS[kind]
        preadv, reads, within = os.preadv, owner._read, threading.local()

        def read(*given):
            within.own = True
            try:
                return reads(*given)
            finally:
                within.own = False

        def fail(*given):
            if self.broken and getattr(within, "own", False):
                self.attempts += 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(*given)

        monkeypatch.setattr(owner, "_read", read)
        monkeypatch.setattr(os, "preadv", fail)
        monkeypatch.setattr(guard_module, "_PAUSES_SECONDS", (0.001,))

    async def has_failed(self, attempts):
        while self.attempts < attempts:
            await turns(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small model for each kind of reads."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(folder / name, name) for kind, (_, name) in READS.items()}


def opened(models, kind, **options):
    return open_streaming(models[kind], reader="direct", measure=False, **options)


def inputs_of(kind):
    return inputs_for(READS[kind][1])


@KINDS
def test_own_reads_are_repeated_until_the_disk_works_again_with_equal_results(
    models, kind, monkeypatch, caplog
):
    monkeypatch.setattr(guard_module, "_FIRST_PATIENT_PAUSE_SECONDS", 0.001)
    disk = Disk(monkeypatch, kind)
    caplog.set_level(logging.WARNING)

    async def main():
        async with await opened(models, kind, reopened_within_seconds=60.0) as model:
            expected = await model.generate(**inputs_of(kind), **GREEDY)
            disk.broken = True
            request = asyncio.create_task(model.generate(**inputs_of(kind), **GREEDY))
            await disk.has_failed(6)  # more often than a single read is attempted
            disk.broken = False
            assert torch.equal(await request, expected)
            assert model.failure is None
            assert model._guard.stopped._done_callbacks == []  # a request leaves nothing there
            assert all(not part.stopped._done_callbacks for part in model._guard._parts)
            assert any(
                "Input/output error" in r.message and "read again in" in r.message
                for r in caplog.records
            )

    with nothing_left_behind():
        run(main(), seconds=60)


@KINDS
@pytest.mark.parametrize("ends", ["cancelled", "closed"])
def test_a_request_whose_own_reads_are_waited_for_ends_when_it_is_told_to(
    models, kind, ends, monkeypatch
):
    monkeypatch.setattr(guard_module, "_FIRST_PATIENT_PAUSE_SECONDS", 600.0)
    monkeypatch.setattr(guard_module, "_LONGEST_PATIENT_PAUSE_SECONDS", 600.0)
    disk = Disk(monkeypatch, kind)

    async def main():
        async with await opened(models, kind, reopened_within_seconds=600.0) as model:
            disk.broken = True
            request = asyncio.create_task(model.generate(**inputs_of(kind), **GREEDY))
            await disk.has_failed(2)
            if ends == "cancelled":
                request.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await request
        if ends == "closed":
            with pytest.raises((ClosedError, ReadError)):
                await request

    with nothing_left_behind():
        run(main(), seconds=60)


@KINDS
def test_own_reads_that_fail_without_patience_fail_their_request_alone(models, kind, monkeypatch):
    disk = Disk(monkeypatch, kind)

    async def main():
        async with await opened(models, kind) as model:
            disk.broken = True
            with pytest.raises(ReadError, match="Input/output error"):
                await model.generate(**inputs_of(kind), **GREEDY)
            disk.broken = False
            assert model.failure is None
            assert torch.is_tensor(await model.generate(**inputs_of(kind), **GREEDY))

    with nothing_left_behind():
        run(main(), seconds=60)


@pytest.mark.parametrize("what", ["save", "resize"])
def test_reads_of_a_save_or_a_resize_are_watched_and_repeated_as_the_models_are(
    models, what, tmp_path, monkeypatch
):
    monkeypatch.setattr(guard_module, "_FIRST_PATIENT_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(guard_module, "_PAUSES_SECONDS", ())
    reads, failing, gate = SourceReader.read_extent, [2], Gate()

    def read(*given):
        if failing[0]:
            failing[0] -= 1
            raise ReadError("broken") from OSError(errno.EIO, "broken")
        reads(*given)

    def slow(descriptor, *given, preadv=os.preadv):
        gate()
        return preadv(descriptor, *given)

    async def main():
        options = {"hanging_read_seconds": 0.01, "reopened_within_seconds": 60.0}
        async with await opened(models, "rows", **options) as model:
            monkeypatch.setattr(SourceReader, "read_extent", read)
            monkeypatch.setattr(os, "preadv", slow)
            call = (
                partial(model.module.save_pretrained, tmp_path / "saved")
                if what == "save"
                else partial(model.module.resize_token_embeddings, 101)
            )
            with gate:
                calling = asyncio.create_task(asyncio.to_thread(call))
                await happens(gate.reached)
                while not model.stats().hanging_reads:
                    await turns(1)
            await calling
            assert failing == [0]

    run(main(), seconds=60)
