"""Runs the contenders in turn, one after the other, for a number of rounds.

Every turn is a process of its own, so that no contender holds memory while another one is measured, or reads ahead
between its passes. In a turn the model is opened; then the weights are dropped from the page cache, so that the first
pass is cold. The passes right after it are warm: they find what cache and process could keep of the pass before.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerstream.tools.compare.cgroups import CgroupError, MemoryCgroup, memory_cgroup
from layerstream.tools.compare.contenders import Contender, NotMeasured
from layerstream.tools.compare.page_cache import drop_from_cache
from layerstream.tools.compare.processes import ContenderError, ContenderProcess, contender_process
from layerstream.tools.console.signals import entered_whole

__all__ = ["Outcome", "Pass", "Setup", "TurnResult", "run_rounds"]

_WARM_PASSES = 3
_WARM_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is the same for all contenders."""

    model: Path
    """The checkpoint."""
    prompt_ids: tuple[int, ...]
    """Prompt of every pass."""
    work: Path
    """Folder for files that contenders write."""
    gguf: Path | None
    """Weights for llama.cpp."""
    limit_bytes: int | None
    """Memory limit of a contender; None for no limit."""
    cold: bool
    warm: bool
    """Whether to measure cold, and warm, passes."""
    timeout_seconds: float
    """Time limit for opening, and for one pass."""

    def folder(self, contender: Contender) -> Path:
        """Make and return the folder in which ``contender`` may write."""
        folder = self.work / contender.name.replace(" ", "-").replace(",", "")
        (folder / "scratch").mkdir(parents=True, exist_ok=True)
        return folder

    def cached_files(self) -> list[Path]:
        """Folders and files with weights, including the contenders' own copies."""
        return [self.model, self.work, *([self.gguf] if self.gguf else [])]

    def logits_file(self, contender: Contender) -> Path:
        """The file with the raw float32 logits of the latest turn of ``contender``."""
        return self.folder(contender) / "logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """A forward pass, or the median of several."""

    seconds: float
    read_bytes: int | None
    """Bytes read from disk, as the kernel counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnResult:
    """The result of one contender in one round."""

    round: int
    """Number of the round, from 1."""
    all_was_dropped: bool
    """Whether all weights were dropped from the cache before the cold pass: for mapped files that requires root."""
    open_seconds: float
    """Time to open the model, without starting the interpreter."""
    cold: Pass | None
    """The first pass; None if not measured."""
    warm: Pass | None
    """Median of the passes right after it; None if not measured."""
    peak_anonymous_bytes: int
    """Peak of the anonymous memory, as sampled."""
    peak_bytes: int | None
    """Peak of its cgroup, page cache included; None without a cgroup."""
    logits_shape: tuple[int, ...] | None
    """Shape of the logits in its file; None if it provides none."""
    notes: Mapping[str, Any]
    """Details about how it ran, for the report."""
    versions: Mapping[str, str]
    """Versions of the interpreter and of packages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Results by contender, and the contenders that failed; one that fails has no further turns."""

    turns: Mapping[Contender, Sequence[TurnResult]]
    failed: Sequence[NotMeasured]


def run_rounds(
    contenders: Sequence[Contender],
    setup: Setup,
    *,
    rounds: int,
    advance: Callable[[int], object],
) -> Outcome:
    """Run each of ``contenders`` in turn, ``rounds`` times; ``advance`` is called with 1 after each turn.

    Raises:
        CgroupError: A limit is set, and no cgroup can be made.
    """
    turns: dict[Contender, list[TurnResult]] = {contender: [] for contender in contenders}
    failed: dict[Contender, NotMeasured] = {}
    for number in range(1, rounds + 1):
        for contender in contenders:
            advance(0)
            if contender not in failed:
                try:
                    if contender.prepares and number == 1:
                        _prepare(contender, setup)
                    turns[contender].append(_take_turn(contender, setup, number=number))
                except ContenderError as error:
                    why = f"round {number}: {error}"
                    failed[contender] = NotMeasured(name=contender.name, why=why)
            advance(1)
    return Outcome(turns=turns, failed=tuple(failed.values()))


def _prepare(contender: Contender, setup: Setup) -> None:
    """Open the contender once, without a limit, so that it writes its own files."""
    with _open(contender, setup, limit_bytes=None):
        pass


def _take_turn(contender: Contender, setup: Setup, *, number: int) -> TurnResult:
    limit_bytes = setup.limit_bytes if contender.limited else None
    if contender.cold:
        # Pages that others left in the cache are not charged to this contender's cgroup.
        drop_from_cache(setup.cached_files())
    with _open(contender, setup, limit_bytes=limit_bytes) as (process, opened, group):
        dropped = not contender.cold or drop_from_cache(setup.cached_files(), process.pids)
        first = _run_pass(process)
        warm = _median_warm_pass(process) if contender.warm and setup.warm else None
        logits = process.request(do="logits", to=str(setup.logits_file(contender)))["shape"]
        return TurnResult(
            round=number,
            all_was_dropped=dropped,
            open_seconds=opened["open_seconds"],
            cold=first if contender.cold and setup.cold else None,
            warm=warm,
            peak_anonymous_bytes=process.peak_anonymous_bytes,
            peak_bytes=group.peak_bytes() if group else None,
            logits_shape=None if logits is None else tuple(logits),
            notes=opened["notes"],
            versions=opened["versions"],
        )


@contextmanager
def _open(
    contender: Contender, setup: Setup, *, limit_bytes: int | None
) -> Iterator[tuple[ContenderProcess, dict[str, Any], MemoryCgroup | None]]:
    """Start ``contender`` and open the model; yields its process, its answer, and its cgroup."""
    folder = setup.folder(contender)
    with ExitStack() as stack:
        group = None
        try:
            group = stack.enter_context(entered_whole(memory_cgroup(limit_bytes)))
        except CgroupError:
            if limit_bytes is not None:
                raise
        started = contender_process(
            python=contender.python,
            folder=folder,
            group=group,
            limit_bytes=limit_bytes,
            timeout_seconds=setup.timeout_seconds,
        )
        process = stack.enter_context(entered_whole(started))
        opened = process.request(
            contender=contender.opener,
            model=str(setup.model),
            scratch=str(folder / "scratch"),
            prompt_ids=list(setup.prompt_ids),
            **contender.request,
        )
        yield process, opened, group
        process.close()


def _median_warm_pass(process: ContenderProcess) -> Pass:
    """The median of several passes back to back, to even out other load; slow contenders run fewer."""
    passes = [_run_pass(process)]
    while len(passes) < _WARM_PASSES and sum(each.seconds for each in passes) < _WARM_SECONDS:
        passes.append(_run_pass(process))
    known = [each.read_bytes for each in passes if each.read_bytes is not None]
    return Pass(
        seconds=statistics.median(each.seconds for each in passes),
        read_bytes=int(statistics.median(known)) if known else None,
    )


def _run_pass(process: ContenderProcess) -> Pass:
    before = process.read_bytes()
    seconds = process.request(do="forward")["seconds"]
    after = process.read_bytes()
    read_bytes = None if before is None or after is None else after - before
    return Pass(seconds=seconds, read_bytes=read_bytes)
