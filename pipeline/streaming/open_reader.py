"""The reader that a plan asks for, over the plan's files."""

from pathlib import Path

from layerstream.pipeline.planning.plan import Plan, ReaderKind
from layerstream.stages.errors import CheckpointError, PlanError
from layerstream.stages.readers.direct import DirectReader
from layerstream.stages.readers.mapped import MmapReader
from layerstream.stages.readers.protocol import Reader
from layerstream.stages.readers.throttled import ThrottledReader

__all__ = ["open_reader"]


def open_reader(plan: Plan) -> Reader:
    """The reader that ``plan`` asks for, with the plan's files open.

    Raises:
        CheckpointError: a file is missing, or has another size than when the plan was made.
    """
    paths = [Path(file.path) for file in plan.files]
    for path, file in zip(paths, plan.files, strict=True):
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be opened ({error.strerror}); restore it"
            ) from error
        if size != file.nbytes:
            raise CheckpointError(
                f"{path}: has {size} bytes, but had {file.nbytes} when the plan was made; plan anew"
            )
    if plan.reader is ReaderKind.MMAP:
        return MmapReader(paths)
    if plan.reader is ReaderKind.THROTTLED:
        if plan.throttle_bytes_per_second is None:
            raise PlanError("the plan's reader is throttled, but to no rate; make the plan anew")
        return ThrottledReader(paths, plan.throttle_bytes_per_second)
    return DirectReader(paths)
