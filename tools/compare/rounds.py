"""Turns of the contenders, one after the other, round after round.

Every turn is a process of its own, so that no contender holds memory while another one is measured, and none uses a
pause to read ahead. In a turn the model is opened; then the weights are dropped from the page cache and a pass is cold,
and those right after it are warm: whatever the cache and the process could keep of the pass before, they have.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerstream.tools.compare.caches import drop_from_cache
from layerstream.tools.compare.cgroups import CgroupError, MemoryCgroup, memory_cgroup
from layerstream.tools.compare.contenders import Contender, LeftOut
from layerstream.tools.compare.processes import ContenderError, ContenderProcess, started

__all__ = ["Course", "Outcome", "Pass", "Turn", "alternate"]

_WARM_PASSES = 3
_WARM_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What all contenders are given.

    Attributes:
        model: The checkpoint.
        prompt_ids: Of every pass.
        work: A folder for what contenders write.
        gguf: Llama.cpp's weights.
        limit_bytes: What a contender may hold; None: there is no limit.
        cold, warm: Which passes are wanted.
        timeout_seconds: How long opening, or one pass, may take.
    """

    model: Path
    prompt_ids: tuple[int, ...]
    work: Path
    gguf: Path | None
    limit_bytes: int | None
    cold: bool
    warm: bool
    timeout_seconds: float

    def folder(self, contender: Contender) -> Path:
        """Where ``contender`` may write."""
        folder = self.work / contender.name.replace(" ", "-").replace(",", "")
        (folder / "scratch").mkdir(parents=True, exist_ok=True)
        return folder

    def cached_files(self) -> list[Path]:
        """Folders and files of weights, the contenders' own copies included."""
        return [self.model, self.work, *([self.gguf] if self.gguf else [])]

    def logits_file(self, contender: Contender) -> Path:
        """Where the logits of its latest turn are: float32, as they lie in memory."""
        return self.folder(contender) / "logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """A forward pass, or the median of a few."""

    seconds: float
    read_bytes: int | None
    """From disk, as the kernel counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One contender in one round.

    Attributes:
        round: Which, from 1.
        all_was_dropped: From the cache, before the cold pass: what is mapped takes root to drop.
        open_seconds: Until it was ready, without starting its interpreter.
        cold: Its first pass; None: not measured.
        warm: Of those right after; None: not measured.
        peak_anonymous_bytes: The most memory beside mapped files and page cache, at any look.
        peak_bytes: Of its cgroup, page cache included; None without a cgroup.
        logits_shape: Of what is in its logits file; None: it gives none.
        notes: What it says of itself.
        versions: Of what it runs on.
    """

    round: int
    all_was_dropped: bool
    open_seconds: float
    cold: Pass | None
    warm: Pass | None
    peak_anonymous_bytes: int
    peak_bytes: int | None
    logits_shape: tuple[int, ...] | None
    notes: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Turns by contender, and those who failed; a contender that fails has no more turns."""

    turns: Mapping[Contender, Sequence[Turn]]
    failed: Sequence[LeftOut]


def alternate(
    contenders: Sequence[Contender],
    course: Course,
    *,
    rounds: int,
    advance: Callable[[int], object],
) -> Outcome:
    """Give each of ``contenders`` a turn, ``rounds`` times over; ``advance`` is told of every turn.

    Raises:
        CgroupError: There is a limit, and no cgroup can be made.
    """
    turns: dict[Contender, list[Turn]] = {contender: [] for contender in contenders}
    failed: dict[Contender, LeftOut] = {}
    for number in range(1, rounds + 1):
        for contender in contenders:
            advance(0)
            if contender not in failed:
                try:
                    if contender.prepares and number == 1:
                        _prepare(contender, course)
                    turns[contender].append(_take_turn(contender, course, number=number))
                except ContenderError as error:
                    why = f"round {number}: {error}"
                    failed[contender] = LeftOut(name=contender.name, why=why)
            advance(1)
    return Outcome(turns=turns, failed=tuple(failed.values()))


def _prepare(contender: Contender, course: Course) -> None:
    """Open it once, without a limit, for what it writes then."""
    with _opened(contender, course, limit_bytes=None):
        pass


def _take_turn(contender: Contender, course: Course, *, number: int) -> Turn:
    limit_bytes = course.limit_bytes if contender.limited else None
    if contender.cold:
        # What others left in the cache is not charged to this one's cgroup: it would have it for nothing.
        drop_from_cache(course.cached_files())
    with _opened(contender, course, limit_bytes=limit_bytes) as (process, opened, group):
        dropped = not contender.cold or drop_from_cache(course.cached_files(), process.pids)
        first = _pass(process)
        warm = _warm(process) if contender.warm and course.warm else None
        logits = process.ask(do="logits", to=str(course.logits_file(contender)))["shape"]
        return Turn(
            round=number,
            all_was_dropped=dropped,
            open_seconds=opened["open_seconds"],
            cold=first if contender.cold and course.cold else None,
            warm=warm,
            peak_anonymous_bytes=process.peak_anonymous_bytes,
            peak_bytes=group.peak_bytes() if group else None,
            logits_shape=None if logits is None else tuple(logits),
            notes=opened["notes"],
            versions=opened["versions"],
        )


@contextmanager
def _opened(
    contender: Contender, course: Course, *, limit_bytes: int | None
) -> Iterator[tuple[ContenderProcess, dict[str, Any], MemoryCgroup | None]]:
    """A process of ``contender`` with the model open, what it said of that, and its cgroup."""
    folder = course.folder(contender)
    with ExitStack() as stack:
        group = None
        try:
            group = stack.enter_context(memory_cgroup(limit_bytes))
        except CgroupError:
            if limit_bytes is not None:
                raise
        process = stack.enter_context(
            started(
                python=contender.python,
                folder=folder,
                group=group,
                limit_bytes=limit_bytes,
                timeout_seconds=course.timeout_seconds,
            )
        )
        opened = process.ask(
            contender=contender.opener,
            model=str(course.model),
            scratch=str(folder / "scratch"),
            prompt_ids=list(course.prompt_ids),
            **contender.request,
        )
        yield process, opened, group


def _warm(process: ContenderProcess) -> Pass:
    """The median of a few passes back to back: one alone may be a neighbour's, and whoever is slow needs no more."""
    passes = [_pass(process)]
    while len(passes) < _WARM_PASSES and sum(each.seconds for each in passes) < _WARM_SECONDS:
        passes.append(_pass(process))
    known = [each.read_bytes for each in passes if each.read_bytes is not None]
    return Pass(
        seconds=statistics.median(each.seconds for each in passes),
        read_bytes=int(statistics.median(known)) if known else None,
    )


def _pass(process: ContenderProcess) -> Pass:
    before = process.read_bytes()
    seconds = process.ask(do="forward")["seconds"]
    after = process.read_bytes()
    read_bytes = None if before is None or after is None else after - before
    return Pass(seconds=seconds, read_bytes=read_bytes)
