"""The weight files that a reader has open."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Self

from layerstream.stages.errors import ClosedError, ReadError
from layerstream.stages.readers.guard import ReadGuard

__all__ = ["FileVersion", "WeightFiles"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileVersion:
    """What tells one version of a file from another, without reading it."""

    inode: int
    nbytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The version of the file with this status."""
        return cls(inode=status.st_ino, nbytes=status.st_size, modified_ns=status.st_mtime_ns)

    def refuse_change(self, path: Path, now: "FileVersion") -> None:
        """Refuse ``path`` if it is another version ``now``.

        Raises:
            ReadError: It says what has changed.
        """
        if now == self:
            return
        if now.nbytes != self.nbytes:
            change = f"has {now.nbytes} bytes now, but had {self.nbytes} when its header was read"
        elif now.inode != self.inode:
            change = "was replaced by another file of the same size after its header was read"
        else:
            written = datetime.fromtimestamp(now.modified_ns / 1e9, tz=UTC)
            change = f"was written to at {written:%Y-%m-%d %H:%M:%S} UTC, after its header was read"
        raise ReadError(
            f"{path}: {change}: what is read of it may belong to another model; open the model again, and let "
            "nothing write to its files while it is open"
        )


class WeightFiles:
    """Open descriptors of the weight files, and the errors that name the file.

    Args:
        paths: The files.
        guard: Watches over opening and reading them.
        flags: For ``os.open``, in addition to those for reading.
        expected: The versions that they have to be; by default any.

    Raises:
        ReadError: A file cannot be opened, or is of another version; the others have been closed again.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        guard: ReadGuard,
        *,
        flags: int = 0,
        expected: Sequence[FileVersion] = (),
    ) -> None:
        self.paths = paths
        self._guard = guard
        self._flags = os.O_RDONLY | os.O_CLOEXEC | flags
        self.descriptors: list[int] = []
        self._versions: list[FileVersion] = []
        with ExitStack() as opened:
            for path in paths:
                try:
                    descriptor = guard.run(partial(os.open, path, self._flags), path=path)
                    opened.callback(os.close, descriptor)
                    self._versions.append(FileVersion.of(os.fstat(descriptor)))
                except OSError as error:
                    raise ReadError(
                        f"{path}: cannot be opened: {error.strerror or error} (errno {error.errno}); check that it "
                        "is there and readable"
                    ) from error
                self.descriptors.append(descriptor)
            for path, version, now in zip(paths, expected, self._versions, strict=False):
                version.refuse_change(path, now)
            opened.pop_all()
        self._lock = threading.Lock()
        self._uses = [0] * len(paths)
        self._closed = False

    @contextmanager
    def in_use(self, file: int) -> Iterator[int]:
        """The descriptor of ``file``; if the files are closed meanwhile, this one is when the block ends.

        A read of a disk that hangs is not waited for. Closed during it, the number might already belong to another file when
        it goes on.

        Raises:
            ClosedError: The files have been closed.
        """
        with self._lock:
            if self._closed:
                raise ClosedError(
                    f"{self.paths[file]} was closed with its model; open the model again"
                )
            self._uses[file] += 1
        try:
            yield self.descriptors[file]
        finally:
            with self._lock:
                self._uses[file] -= 1
                if self._closed and not self._uses[file]:
                    os.close(self.descriptors[file])

    def refuse_change(self, file: int) -> None:
        """Refuse what was read of ``file`` if anything has been written to it since it was opened.

        That takes a microsecond, and is asked for after each request: a write changes the time before it changes bytes.

        Raises:
            ReadError: It was written to.
        """
        now = FileVersion.of(self.status(file))
        self._versions[file].refuse_change(self.paths[file], now)

    def status(self, file: int) -> os.stat_result:
        """What the system knows of ``file``.

        Raises:
            ReadError: Nothing, any more: of a network file that was lost, for one.
        """
        try:
            return os.fstat(self.descriptors[file])
        except OSError as error:
            raise self.error(self.paths[file], 0, error) from error

    def open_again(self, file: int) -> None:
        """Let the descriptor of ``file``, which is in use, lead to what its path leads to now, if that is the same file.

        The disk may have been detached and be back, or the network file may have a new handle: the old ones fail for ever.
        """
        path = self.paths[file]
        with suppress(OSError), self._guard.watching(path):
            descriptor = os.open(path, self._flags)
            try:
                if FileVersion.of(os.fstat(descriptor)) == self._versions[file]:
                    os.dup2(descriptor, self.descriptors[file], inheritable=False)
            finally:
                os.close(descriptor)

    @staticmethod
    def error(path: Path, offset: int, error: OSError) -> ReadError:
        """The error to raise when a system call on ``path`` fails with ``error``."""
        return ReadError(
            f"{path}: reading at offset {offset} failed: {error.strerror or error} (errno {error.errno}); "
            "check the disk and that the file is readable"
        )

    def read_once(self, file: int, offset: int, buffer: memoryview) -> int:
        """Read into ``buffer`` with one system call, or a few if that fails; returns how many bytes came.

        Raises:
            OSError: What the last of them has raised.
        """
        return self._guard.run(
            # Not a function of ours: an error's traceback would keep what it refers to, and so the arena.
            partial(os.preadv, self.descriptors[file], [buffer], offset),
            path=self.paths[file],
            offset=offset,
            before_last=partial(self.open_again, file),
        )

    def read(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` through the page cache.

        Raises:
            ReadError: The file is too short, or the disk reports an error.
        """
        done = 0
        while done < len(buffer):
            try:
                got = self.read_once(file, offset + done, buffer[done:])
            except OSError as error:
                raise self.error(self.paths[file], offset + done, error) from error
            if got == 0:
                raise self.ends_early(file, offset + len(buffer), at=offset + done)
            done += got

    def ends_early(self, file: int, needed: int, *, at: int) -> ReadError:
        """The error to raise when reading ``file``, of which ``needed`` bytes are needed, ends at ``at``."""
        size = self.status(file).st_size
        if size < needed:
            return self.shrank(file, needed)
        return ReadError(
            f"{self.paths[file]}: reading at offset {at} gives no more bytes, although the file has {size}: its disk or "
            "network filesystem returns too little; check it, or copy the file elsewhere"
        )

    def shrank(self, file: int, needed: int) -> ReadError:
        """The error to raise when ``file`` has fewer than ``needed`` bytes."""
        size = self.status(file).st_size
        return ReadError(
            f"{self.paths[file]}: holds {size} bytes now, but {needed} are needed: it was changed while it "
            "was streamed; restore the file and open the model again"
        )

    def close(self) -> None:
        """Close the files, except those in use, which are closed after that. May be called again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for descriptor, uses in zip(self.descriptors, self._uses, strict=True):
                    if not uses:
                        os.close(descriptor)

    def __del__(self) -> None:
        # What opened them was left behind, or its event loop ended without closing them.
        if hasattr(self, "_closed"):
            self.close()
