"""The fault matrix of reads: each fault of a file, at each moment in the life of a pipeline, with each reader.

After a fault that passes, the same pipeline yields right bytes. After one that lasts, the caller has the error, with the file, in
the sweep that needs the bytes; and in either case closing leaves nothing behind.
"""

import errno
import os
from pathlib import Path

import pytest
from support.checkpoints import CPU, arranged, plan_for, write_checkpoint
from support.leaks import nothing_left_behind
from support.loop import run, turns
from support.sweeping import wrong_tensors

from layerstream.pipeline import CheckpointError, Pipeline, ReadError
from layerstream.stages.readers import guard as guard_module
from layerstream.stages.readers.mapped import MmapReader

BLOCKS = 6
BATCHES = BLOCKS + 2
READERS = ["direct", "buffered", "mmap"]


class FaultyFiles:
    """The system calls of readers, for one file of which something goes wrong from a chosen moment on."""

    def __init__(self, monkeypatch, *, direct):
        self.file = None
        self.fault = None
        self.left = 0  # calls that are still to fail
        self._preadv, self._open, self._populate = os.preadv, os.open, MmapReader._populate
        self._direct = direct
        monkeypatch.setattr(guard_module, "_PAUSES_SECONDS", (0.0, 0.0, 0.0))
        monkeypatch.setattr(os, "preadv", self.preadv)
        monkeypatch.setattr(os, "open", self.open)
        faulty = self

        def populate(reader, extent):
            faulty.populate(reader, extent)

        monkeypatch.setattr(MmapReader, "_populate", populate)

    def _fails(self, path):
        fails = self.left > 0 and path == self.file
        self.left -= fails
        return fails

    def open(self, path, flags):
        if flags & os.O_DIRECT and not self._direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if self.fault == "open" and self._fails(str(path)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._open(path, flags)

    def preadv(self, descriptor, buffers, offset):
        fails = self._fails(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115 - of a descriptor
        if fails and isinstance(self.fault, int):
            raise OSError(self.fault, os.strerror(self.fault))
        got = self._preadv(descriptor, buffers, offset)
        return got - got // 2 if fails and self.fault == "short" else 0 if fails else got

    def populate(self, reader, extent):
        if isinstance(self.fault, int) and self._fails(str(reader._files.paths[extent.file])):
            raise OSError(self.fault, os.strerror(self.fault))
        self._populate(reader, extent)


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def overwritten(path):
    with path.open("r+b") as stream:
        stream.write(b"12345678")


def replaced(path):
    other = path.with_suffix(".new")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


# What happens to a file, and whether the pipeline survives it: as it was opened, in this sweep and in all later ones.
PASSING = {
    **{errno.errorcode[code]: (code, 2) for code in (errno.EIO, errno.EAGAIN, errno.ETIMEDOUT)},
    "short": ("short", 2),
    "deleted": (Path.unlink, 0),
    "replaced": (replaced, 0),
}  # fmt: skip
LASTING = {
    "EIO for ever": (errno.EIO, 1000),
    "EACCES": (errno.EACCES, 1),
    "ends early": ("early", 1000),
    "truncated": (truncated, 0),
    "overwritten": (overwritten, 0),
}
# The file of the fault, and how many batches have been computed with by then.
MOMENTS = {
    "first batch": (0, 0),
    "middle": (4, 2),
    "last batch": (BATCHES - 1, 3),
    "wrap-around": (0, 4),
    "idle": (2, BATCHES),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    return folder, write_checkpoint(folder, blocks=BLOCKS)


@pytest.fixture
def checkpoint(made, tmp_path):
    """A folder with files of this test's own, and their tensors."""
    folder, tensors = made
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path, tensors


def strike(faulty, plan, fault, number):
    what, times = fault
    faulty.file = plan.files[number].path
    if callable(what):
        what(Path(faulty.file))
    else:
        faulty.fault, faulty.left = what, times


def pipeline_on(folder, reader, monkeypatch):
    faulty = FaultyFiles(monkeypatch, direct=reader != "buffered")
    kind = "direct" if reader == "buffered" else reader
    plan = arranged(plan_for(folder, CPU, reader=kind), slots=1)
    return faulty, plan, Pipeline(plan)


async def sweeps(pipeline, expected, at, then, *, count=3):
    """Sweep, with ``then`` called after ``at`` batches of the first sweep; every batch has to be right."""
    seen = 0
    for _ in range(count):
        async for batch in pipeline.sweep():
            if seen == at:
                then()
            assert wrong_tensors(batch, expected) == []
            seen += 1
        if seen == at:  # idle: the stages have read ahead, and wait
            await turns()
            then()
            at = None


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_disturbs_no_sweep(checkpoint, monkeypatch, reader, moment, fault):
    folder, expected = checkpoint
    number, at = MOMENTS[moment]
    faulty, plan, pipeline = pipeline_on(folder, reader, monkeypatch)

    async def main():
        async with pipeline:
            await sweeps(
                pipeline, expected, at, lambda: strike(faulty, plan, PASSING[fault], number)
            )

    with nothing_left_behind():
        run(main())


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("fault", LASTING)
def test_a_fault_that_lasts_reaches_the_caller_with_the_file_and_ends_in_time(
    checkpoint, monkeypatch, reader, moment, fault
):
    if reader == "mmap" and fault in {"ends early", "truncated"}:
        pytest.skip(
            "a mapping does not end early, and one of a file that is cut while it is used is unusable"
        )
    folder, expected = checkpoint
    number, at = MOMENTS[moment]
    faulty, plan, pipeline = pipeline_on(folder, reader, monkeypatch)
    if reader == "mmap":  # each sweep asks for the pages anew
        monkeypatch.setattr("layerstream.stages.readers.mapped._RECHECK_SECONDS", 0.0)
        monkeypatch.setattr(MmapReader, "resident_bytes", lambda *_: 0)

    async def main():
        async with pipeline:
            with pytest.raises(ReadError) as caught:
                await sweeps(
                    pipeline, expected, at, lambda: strike(faulty, plan, LASTING[fault], number)
                )
            assert faulty.file in str(caught.value)
            assert f"at layer batch {number} " in caught.value.__notes__[0]
            del caught  # it has the frame with the last batch
            with pytest.raises(ReadError):
                await anext(pipeline.sweep())

    with nothing_left_behind():
        run(main())


OPENING = {"open for a moment": ("open", 2), "open": ("open", 1000)}
SURVIVED = {*PASSING, "open for a moment"} - {"deleted", "replaced"}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("fault", [*PASSING, *LASTING, *OPENING])
def test_a_fault_while_opening_is_an_error_of_opening_or_of_the_first_sweep(
    checkpoint, monkeypatch, reader, fault
):
    if (reader, fault) == ("mmap", "ends early"):
        pytest.skip("a mapping does not end early")
    folder, expected = checkpoint
    faulty, plan, pipeline = pipeline_on(folder, reader, monkeypatch)
    strike(faulty, plan, {**PASSING, **LASTING, **OPENING}[fault], 1)

    async def use():
        async with pipeline:
            await sweeps(pipeline, expected, -1, lambda: None)

    async def main():
        if fault in SURVIVED:
            await use()
        else:
            with pytest.raises(CheckpointError) as caught:
                await use()
            assert faulty.file in str(caught.value)
            del caught  # it has the frame with the last batch

    with nothing_left_behind():
        run(main())


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("fault", [*PASSING, *LASTING])
def test_a_fault_while_closing_is_nobodys(checkpoint, monkeypatch, reader, fault):
    folder, _ = checkpoint
    faulty, plan, pipeline = pipeline_on(folder, reader, monkeypatch)

    async def main():
        async with pipeline:
            await anext(pipeline.sweep())
            strike(faulty, plan, {**PASSING, **LASTING}[fault], 1)

    with nothing_left_behind():
        run(main())
