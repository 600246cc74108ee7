"""What a test leaves behind: threads, descriptors, mappings."""

import asyncio
import gc
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerstream import pipeline, stages
from layerstream.stages.arena import RingArena

__all__ = ["mappings_of", "nothing_left_behind", "our_tasks", "our_threads", "used_slots"]


_OUR_FOLDERS = [Path(package.__file__).parent for package in (pipeline, stages)]


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if _is_ours(thread)]


def _is_ours(thread: threading.Thread) -> bool:
    return thread.name.startswith("layerstream")


def our_tasks() -> list[asyncio.Task[Any]]:
    """Tasks of the running loop that run a coroutine of the library."""
    return [
        task
        for task in asyncio.all_tasks()
        if (code := getattr(task.get_coro(), "cr_code", None)) is not None
        and any(Path(code.co_filename).is_relative_to(folder) for folder in _OUR_FOLDERS)
    ]


def mappings_of(folder: Path) -> list[str]:
    """Lines of /proc/self/maps that map a file in ``folder``."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if f"{folder}/" in line]


def _descriptors() -> dict[str, str]:
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            found[link.name] = str(link.readlink())
        except OSError:  # the descriptor that listed them
            continue
    return found


def _maps() -> set[int]:
    """Open maps among what was made since the last ``gc.freeze``."""
    # type(), because isinstance() asks lazy modules for their class, which warns
    return {id(each) for each in gc.get_objects() if type(each) is mmap.mmap and not each.closed}


@contextmanager
def nothing_left_behind(*, collect: bool = True) -> Iterator[None]:
    """Fail if the body leaves a thread of ours, a descriptor, or a map (arenas and files alike).

    Args:
        collect: Allow for maps that the garbage collector finds.
    """
    # What was there before needs no second look. Looking at every object of torch and transformers takes longer than most tests.
    gc.collect()
    gc.freeze()
    descriptors, before = _descriptors(), set(threading.enumerate())
    yield
    threads = [thread.name for thread in set(threading.enumerate()) - before if _is_ours(thread)]
    assert threads == [], threads
    left = {name: at for name, at in _descriptors().items() if descriptors.get(name) != at}
    assert left == {}, left
    if collect and _maps():
        gc.collect()  # an exception and its frames may be a cycle
    assert not _maps(), "a map was left behind"


def used_slots(arena: RingArena) -> int:
    """Slots that have not been given back."""
    return sum(not slot._freed for slot in arena._live)
