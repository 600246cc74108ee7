"""Weight files that shrink, are replaced or overwritten while they are streamed."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import CPU, GPU, arranged, plan_for, write_checkpoint
from support.fake_device import FakeDevice
from support.leaks import mappings_of, nothing_left_behind
from support.loop import run
from support.sweeping import visited, wrong_tensors

from layerstream.pipeline import CheckpointError, Pipeline, Plan, ReadError

BLOCKS = 6
BATCHES = BLOCKS + 2  # the embedding before the blocks, the head behind them


@pytest.fixture
def checkpoint(tmp_path):
    """The folder of a small checkpoint, and its tensors by name."""
    return tmp_path, write_checkpoint(tmp_path, blocks=BLOCKS)


@pytest.mark.parametrize("reader", ["direct", "mmap", "throttled"])
@pytest.mark.parametrize("hardware", [CPU, GPU], ids=["cpu", "fake"])
def test_a_file_that_shrinks_while_it_is_streamed_raises_and_never_yields_zeros(
    tmp_path, reader, hardware
):
    write_checkpoint(tmp_path, blocks=BLOCKS, rows=100)
    plan = arranged(plan_for(tmp_path, hardware, reader=reader), slots=1)
    last = plan.files[-1]  # too far away to have been read when the first batch arrives

    async def main():
        device = None if hardware is CPU else FakeDevice()
        async with Pipeline(plan, device=device) as pipeline:
            sweep = pipeline.sweep()
            assert (await anext(sweep)).index == 0
            os.truncate(last.path, 4096)
            with pytest.raises(ReadError) as caught:
                await visited(sweep)
        return caught.value

    with nothing_left_behind():
        error = run(main())
        assert f"{last.path}: holds 4096 bytes now" in str(error)
        assert f"in the read stage, at layer batch {BATCHES - 1}" in error.__notes__[0]
        del error
    assert mappings_of(tmp_path) == []


def replaced(path):
    """Replace ``path`` by another file of the same size, as downloads are put in place."""
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes()[::-1])
    other.replace(path)


def overwritten(path):
    """Overwrite the last bytes of ``path`` in place."""
    with path.open("r+b") as stream:
        stream.seek(-16, os.SEEK_END)
        stream.write(bytes(16))


@pytest.mark.parametrize("reader", ["direct", "mmap", "throttled"])
@pytest.mark.parametrize(
    ("change", "says"),
    [(replaced, "was replaced by another file"), (overwritten, "was written to")],
)
def test_a_file_that_changed_after_its_header_was_read_is_refused_when_it_is_opened(
    tmp_path, reader, change, says
):
    write_checkpoint(tmp_path, blocks=BLOCKS)
    plan = plan_for(tmp_path, CPU, reader=reader)
    if reader == "throttled":
        plan = replace(plan, throttle_bytes_per_second=1e9)
    change(Path(plan.files[3].path))

    async def main(plan):
        async with Pipeline(plan):
            pass

    for each in (plan, Plan.from_json(plan.to_json())):
        with nothing_left_behind(), pytest.raises(CheckpointError, match=says) as caught:
            run(main(each))
        assert plan.files[3].path in str(caught.value)
        del caught


async def sweep_right(pipeline, expected):
    async for batch in pipeline.sweep():
        assert wrong_tensors(batch, expected) == []


@pytest.mark.parametrize("reader", ["direct", "mmap", "throttled"])
def test_a_file_that_is_overwritten_while_it_is_streamed_raises_before_anybody_gets_its_bytes(
    tmp_path, reader
):
    expected = write_checkpoint(tmp_path, blocks=BLOCKS, rows=100)
    plan = arranged(plan_for(tmp_path, CPU, reader=reader), slots=1)
    last = Path(plan.files[-1].path)  # too far away to have been read when the first batch arrives

    async def main():
        async with Pipeline(plan) as pipeline:
            overwritten(last)
            with pytest.raises(ReadError, match="was written to") as caught:
                await sweep_right(pipeline, expected)
        assert str(last) in str(caught.value)

    run(main())


def test_a_file_that_is_replaced_while_it_is_streamed_is_read_as_it_was(checkpoint):
    folder, expected = checkpoint
    plan = arranged(plan_for(folder, CPU), slots=1)

    async def main():
        async with Pipeline(plan) as pipeline:
            for file in plan.files:
                replaced(Path(file.path))
            await sweep_right(pipeline, expected)

    run(main())
