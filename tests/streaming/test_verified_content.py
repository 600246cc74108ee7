"""``verify``: the content of weight files is checked beside the requests, against recorded digests."""

import asyncio
import hashlib
import logging

import pytest
import torch
import transformers
from support.faults import Gate
from support.leaks import nothing_left_behind, our_tasks
from support.loop import happens, run, turns
from support.models import inputs_for, save_model
from support.streaming import open_streaming

from layerstream.pipeline import (
    Checkpoint,
    CheckpointError,
    LayerstreamError,
    ReadError,
    StreamedModel,
)
from layerstream.pipeline.checkpoint.digests import RECORD_FILE
from layerstream.pipeline.scheduling.scheduler import SweepScheduler
from layerstream.pipeline.verifying import ContentCheck
from layerstream.pipeline.weight_stream import WeightStream
from layerstream.stages.batch import Residence
from layerstream.stages.readers.throttled import Throttle
from layerstream.tools.cli import main

GREEDY = {"max_new_tokens": 3, "do_sample": False}


def record(folder):
    assert main(["verify", str(folder), "--record"]) == 0


def sha256sums(folder):
    path = folder.parent / "SHA256SUMS"
    lines = (
        f"{hashlib.sha256(each.read_bytes()).hexdigest()}  {each.name}\n"
        for each in sorted(folder.glob("*.safetensors"))
    )
    path.write_text("".join(lines))
    return path


def flip_byte(folder, tensor):
    """Change a byte in the middle of ``tensor``; returns its file and offset."""
    checkpoint = Checkpoint.open(folder)
    info = checkpoint.tensors[tensor]
    path = checkpoint.files[info.file].path
    content = bytearray(path.read_bytes())
    content[info.offset + info.nbytes // 2] ^= (
        4  # a bit of a mantissa: what is computed seems right
    )
    path.write_bytes(content)
    return path, info.offset


@pytest.fixture
def folder(tmp_path, capsys):
    """A llama in several files, whose digests are recorded."""
    folder = save_model(tmp_path / "model", "llama", num_hidden_layers=4, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    record(folder)
    capsys.readouterr()
    return folder


@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_good_files_are_verified_beside_the_requests(folder, caplog, reader):
    caplog.set_level(logging.INFO, "layerstream.pipeline.verifying")
    inputs = inputs_for("llama")

    async def use():
        async with await open_streaming(folder, reader=reader, verify=True) as model:
            tokens = await model.generate(**inputs, **GREEDY)
            await model.verified()
            return tokens

    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with nothing_left_behind():
        assert torch.equal(run(use()), reference.generate(**inputs, **GREEDY))
    (said,) = {each.getMessage() for each in caplog.records}
    assert "equals the recorded digests" in said


CASES = {
    "a layer": ("llama", "model.layers.2.mlp.up_proj.weight"),
    "a gathered table": ("llama", "model.embed_tokens.weight"),
    "experts on demand": ("qwen3-moe", "model.layers.1.mlp.experts.3.down_proj.weight"),
}


@pytest.mark.parametrize("reader", ["direct", "mmap"])
@pytest.mark.parametrize("residence", ["streamed", "resident"])
@pytest.mark.parametrize("case", CASES)
def test_a_flipped_bit_is_found_wherever_it_is_and_file_tensor_and_offset_are_named(
    tmp_path, capsys, case, residence, reader
):
    kind, tensor = CASES[case]
    folder = save_model(tmp_path / "model", kind, num_hidden_layers=4, max_shard_size="40KB")
    record(folder)
    capsys.readouterr()
    path, offset = flip_byte(folder, tensor)

    async def use():
        if residence == "streamed":
            model = await open_streaming(folder, reader=reader, verify=True)
        else:
            model = StreamedModel.open(folder, device="cpu", reader=reader, verify=True)
        async with model:
            if reader == "direct" and residence == "resident":
                assert any(b.residence is not Residence.STREAMED for b in model.plan.batches)
            with pytest.raises(CheckpointError) as caught:
                await model.verified()
            message = str(caught.value)
            del caught
            with pytest.raises(Exception, match="is corrupt"):
                await model.generate(**inputs_for(kind), **GREEDY)
            with pytest.raises(CheckpointError, match="is corrupt"):  # the files are as they were
                await model.reopen()
            assert "is corrupt" in str(model.failure)
        return message

    with nothing_left_behind():
        message = run(use())
    for part in (str(path), repr(tensor), f"offset {offset:,}", "download the file again"):
        assert part in message


def test_digests_of_whole_files_do_as_well(folder):
    (folder / RECORD_FILE).unlink()
    sums = sha256sums(folder)

    async def use():
        async with await open_streaming(folder, verify=sums) as model:
            await model.verified()
        path, _ = flip_byte(folder, "model.layers.2.mlp.up_proj.weight")
        async with await open_streaming(folder, verify=sums) as model:
            with pytest.raises(CheckpointError, match="is corrupt") as caught:
                await model.verified()
            assert str(path) in str(caught.value)

    run(use())


def test_a_header_that_was_changed_is_found(folder, capsys):
    """Two sizes that change places leave the file valid, and every tensor's bytes as they were."""
    path = next(folder.glob("*.safetensors"))
    content = path.read_bytes()
    assert b"[64,32]" in content
    path.write_bytes(content.replace(b"[64,32]", b"[32,64]"))
    assert main(["verify", str(folder)]) == 1
    said = capsys.readouterr().err
    assert f"{path} is corrupt" in said
    assert "at offset 0," in said


def test_without_digests_opening_is_refused_and_names_the_files(folder):
    (folder / RECORD_FILE).unlink()

    async def use():
        async with StreamedModel.open(folder, device="cpu", verify=True):
            pass

    with nothing_left_behind(), pytest.raises(CheckpointError) as caught:
        run(use())
    assert "no SHA-256 digest is recorded of model-00001" in str(caught.value)
    assert "--record" in str(caught.value)


def test_a_file_of_another_size_than_recorded_is_refused_at_once(folder):
    path = min(folder.glob("*.safetensors"))
    record_path = folder / RECORD_FILE
    size = path.stat().st_size
    record_path.write_text(
        record_path.read_text().replace(f'"size_bytes": {size}', '"size_bytes": 7')
    )

    async def use():
        async with StreamedModel.open(folder, device="cpu", verify=True):
            pass

    with pytest.raises(CheckpointError, match=r"digests cover .* of 7 bytes"):
        run(use())


@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_requests_do_not_wait_for_the_check_and_closing_ends_it(folder, monkeypatch, reader):
    inputs = inputs_for("llama")

    async def use():
        model = await open_streaming(
            folder, reader=reader, verify=True
        )  # opens it, to see what it needs
        with Gate() as gate:
            hashes = ContentCheck._hash
            monkeypatch.setattr(ContentCheck, "_hash", lambda *given: gate() or hashes(*given))
            async with model:
                await happens(gate.reached)
                for _ in range(3):
                    await model.generate(**inputs, **GREEDY)
                waiting = asyncio.create_task(model.verified())
                await turns()
                assert not waiting.done()
                closing = asyncio.create_task(model.aclose())
                await turns()
                gate.open()
                await closing
            with pytest.raises(Exception, match="closed"):
                await waiting
        assert our_tasks() == []

    run(use())


def test_requests_under_way_fail_when_the_check_does(folder, monkeypatch):
    flip_byte(folder, "model.layers.2.mlp.up_proj.weight")

    async def use():
        model = await open_streaming(folder, verify=True)
        gate, hashes = Gate(), ContentCheck._hash
        monkeypatch.setattr(ContentCheck, "_hash", lambda *given: gate() or hashes(*given))
        async with model:
            with gate:
                stream = model.stream(**inputs_for("llama"), max_new_tokens=300, do_sample=False)
                await anext(stream)
            with pytest.raises(LayerstreamError, match="is corrupt"):
                [token async for token in stream]

    with nothing_left_behind():
        run(use())


def test_a_file_that_cannot_be_read_for_a_while_is_verified_after_reopening(folder, monkeypatch):
    works = ContentCheck._hash

    def broken(*_):
        raise ReadError("broken") from OSError(5, "broken")

    async def use():
        model = await open_streaming(folder, verify=True)
        monkeypatch.setattr(ContentCheck, "_hash", broken)
        async with model:
            with pytest.raises(ReadError, match="broken"):
                await model.verified()
            await model.generate(**inputs_for("llama"), **GREEDY)  # it has its own reads
            assert model.failure is None
            monkeypatch.setattr(ContentCheck, "_hash", works)
            monkeypatch.setattr(SweepScheduler, "_sweep", broken)
            with pytest.raises(ReadError):
                await model.generate(**inputs_for("llama"), **GREEDY)
            monkeypatch.undo()
            await model.reopen()
            await model.verified()
            await model.generate(**inputs_for("llama"), **GREEDY)

    with nothing_left_behind():
        run(use())


def test_the_check_has_no_throttled_disk_of_its_own(folder, monkeypatch):
    made = []
    works = Throttle.__init__

    def make(throttle, rate):
        made.append(throttle)
        works(throttle, rate)

    throttled = {"reader": "throttled", "throttle_bytes_per_second": 1e9}

    async def use():
        model = await open_streaming(folder, verify=True, **throttled)
        monkeypatch.setattr(Throttle, "__init__", make)
        async with model:
            await model.generate(**inputs_for("llama"), **GREEDY)
            await model.verified()

    with nothing_left_behind():
        run(use())
    assert len(made) == 1


def test_what_is_found_while_the_model_is_reopened_keeps_it_closed(folder, monkeypatch):
    flip_byte(folder, "model.layers.2.mlp.up_proj.weight")
    reopens = WeightStream.reopen

    def broken(*_):
        raise ReadError("broken") from OSError(5, "broken")

    async def use():
        model = await open_streaming(folder, verify=True)
        gate, hashes = Gate(), ContentCheck._hash
        monkeypatch.setattr(ContentCheck, "_hash", lambda *given: gate() or hashes(*given))

        async def reopen(stream, plan):
            await reopens(stream, plan)
            gate.open()
            with pytest.raises(CheckpointError):
                await model.verified()

        async with model:
            with gate, monkeypatch.context() as patch:
                patch.setattr(SweepScheduler, "_sweep", broken)
                patch.setattr(WeightStream, "reopen", reopen)
                with pytest.raises(ReadError):
                    await model.generate(**inputs_for("llama"), **GREEDY)
                with pytest.raises(CheckpointError, match="is corrupt"):
                    await model.reopen()
            with pytest.raises(LayerstreamError, match="is corrupt"):
                await model.generate(**inputs_for("llama"), **GREEDY)

    with nothing_left_behind():
        run(use())
