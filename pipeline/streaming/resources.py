"""The files, threads and memory that a pipeline holds while it is open."""

from contextlib import ExitStack
from pathlib import Path

from layerstream.pipeline.planning.plan import Plan, ReaderKind
from layerstream.stages.arena import RingArena
from layerstream.stages.devices.lookup import open_device
from layerstream.stages.devices.protocol import Device
from layerstream.stages.errors import CheckpointError, PlanError
from layerstream.stages.experts.expert_set import request_bytes
from layerstream.stages.experts.store import ExpertStore
from layerstream.stages.readers.direct import DirectReader
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.mapped import MmapReader
from layerstream.stages.readers.protocol import Reader
from layerstream.stages.readers.throttled import Throttle, ThrottledReader
from layerstream.stages.residents import Residents
from layerstream.stages.telemetry.spans import Occupancy
from layerstream.stages.threads import Threads

__all__ = ["Resources", "open_reader", "throttle_of"]


class Resources:
    """The files, threads and memory of one plan. ``acquire`` and ``close`` block for as long as the system takes.

    Attributes:
        device: The device that batches are copied to and computed on.
        reader: The plan's files, open.
        mapped: The same reader, if computation uses its mapping of the files instead of host slots.
        residents: The memory of resident batches.
        arenas: The rings of host slots and of device slots; empty before ``acquire``.
        read_threads: One thread for each read in flight.
        transfer_threads: One thread starts copies, one waits for their end.
        compute_threads: One thread, for ``Pipeline.run``.
    """

    device: Device
    reader: Reader
    mapped: MmapReader | None
    residents: Residents
    read_threads: Threads
    transfer_threads: Threads
    compute_threads: Threads

    def __init__(self) -> None:
        self.arenas: tuple[RingArena, ...] = ()
        self.experts: ExpertStore | None = None
        self._stack = ExitStack()

    def acquire(
        self,
        plan: Plan,
        *,
        device: Device | None,
        reader: Reader,
        guard: ReadGuard,
    ) -> None:
        """Acquire what ``plan`` needs; what was acquired before an error is released by ``close``.

        Args:
            plan: Its sizes and files.
            device: Used instead of the one that the plan names.
            reader: The files, open; closed with the rest.
            guard: Gives up reads that hang when it is stopped.
        """
        release = self._stack.callback
        release(reader.close)  # whatever fails from here on
        self.device = device or open_device(plan.device)
        # First here, so last on release: it returns to other processes what closing the rest has freed.
        release(self.device.trim)
        self.reader = reader
        self.mapped = None
        if isinstance(self.reader, MmapReader) and self.device.reads_host_images:
            self.mapped = self.reader
        self.residents = Residents(plan.batches, self.device)
        release(self.residents.close)
        host_ring = self.device.host_memory(plan.host_arena_bytes)
        release(self.device.release_host_memory, host_ring)
        device_ring = self.device.device_memory(plan.device_arena_bytes)
        self.arenas = (RingArena(host_ring.tensor), RingArena(device_ring))
        for arena in self.arenas:
            release(arena.close)
        if plan.experts:
            self.experts = ExpertStore(
                plan.experts,
                passing_cells=plan.shared_expert_cells,
                reader=self.reader,
                guard=guard,
                file_bytes=[file.nbytes for file in plan.files],
                threads=plan.reads_in_flight,
                request_bytes=request_bytes(
                    (each.expert_bytes for each in plan.experts), most=plan.read_request_bytes
                ),
            )
            release(self.experts.close)
            guard.give_up_when_stopped(self.experts)
        # Work that is queued on the device may still read the memory above.
        release(self.device.drain)
        self.read_threads = Threads("read", plan.reads_in_flight)
        release(self.read_threads.close)
        guard.give_up_when_stopped(self.read_threads)
        self.transfer_threads = Threads("transfer", 2)
        release(self.transfer_threads.close)
        self.compute_threads = Threads("compute", 1)
        release(self.compute_threads.close)
        if self.mapped is not None:
            guard.give_up_when_stopped(self.compute_threads, in_page_faults=True)

    def occupancy(self) -> tuple[Occupancy, ...]:
        """How full each ring of slots has been."""
        arenas = zip(("host slots", "device slots"), self.arenas, strict=False)
        found = (arena.occupancy(name) for name, arena in arenas)
        return tuple(each for each in found if each.capacity_bytes)

    def close(self) -> None:
        """Release everything, in reverse order."""
        self._stack.close()


def throttle_of(plan: Plan) -> Throttle | None:
    """What the reads of ``plan`` share that are throttled; None if they are not.

    Raises:
        PlanError: The plan does not name the rate.
    """
    if plan.reader is not ReaderKind.THROTTLED:
        return None
    if plan.throttle_bytes_per_second is None:
        raise PlanError("the plan's reader is throttled, but to no rate; make the plan anew")
    return Throttle(plan.throttle_bytes_per_second)


def open_reader(plan: Plan, guard: ReadGuard, throttle: Throttle | None) -> Reader:
    """The reader that ``plan`` names, with the plan's files open; one that is throttled waits for ``throttle``.

    Raises:
        CheckpointError: A file is missing, or is of another version than when the plan was made.
    """
    paths = [Path(file.path) for file in plan.files]
    for path, file in zip(paths, plan.files, strict=True):
        try:
            size = guard.run(path.stat, path=path).st_size
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be opened ({error.strerror}); restore it"
            ) from error
        if size != file.nbytes:
            raise CheckpointError(
                f"{path}: has {size} bytes, but had {file.nbytes} when the plan was made; plan anew"
            )
    versions = [file.version for file in plan.files]
    # Plans written before versions were recorded have none.
    expected = [] if None in versions else [each for each in versions if each]
    if plan.reader is ReaderKind.MMAP:
        return MmapReader(paths, expected=expected, guard=guard)
    if throttle is not None:
        return ThrottledReader(paths, throttle, expected=expected, guard=guard)
    return DirectReader(paths, expected=expected, guard=guard)
