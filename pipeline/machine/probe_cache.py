"""Caches measurements of this machine in the user's cache folder, one small file for each."""

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from layerstream.pipeline.machine.measurement import Rate
from layerstream.stages.text import format_seconds

__all__ = [
    "PER_BYTE",
    "MeasuredRates",
    "MeasurementCache",
    "machine_identity",
    "processor_features",
    "processor_model",
    "replace_file",
    "user_cache_folder",
]

logger = logging.getLogger(__name__)

PER_BYTE = "_per_byte"  # the suffix of the names of costs, which may be zero

_VERSION = 2  # of the file format, and of the way of measuring
# Machines are rebuilt, disks are swapped and fill up, the load of a shared virtual disk changes: a week later at most,
# rates are measured again. For faster changes there is ``fresh``.
_MAX_AGE_SECONDS = 7 * 24 * 3600.0
# Rates that were measured next to busy processes are valid only while those are probably still running.
_MAX_CONTENDED_AGE_SECONDS = 600.0
_CLOCK_SKEW_SECONDS = 60.0  # by which the clock may have been set back


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRates:
    """The result of one measurement: rates by name."""

    rates: Mapping[str, Rate]
    age_seconds: float
    """Time since they were measured."""
    contended: bool = False
    """Whether other processes kept processors busy meanwhile."""


class MeasurementCache:
    """The cache files, each of which contains its key. Without a writable folder nothing is cached.

    Args:
        folder: Where the files are; by default ``layerstream`` in the user's cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = user_cache_folder() if folder is None else folder

    def load(self, key: Mapping[str, str], *, names: Collection[str]) -> MeasuredRates | None:
        """Return the rates ``names`` that are cached for ``key``; None if there are no valid ones."""
        path = self._path(key)
        try:
            document = json.loads(path.read_bytes())
            found = _parse_document(document, key, names, now=time.time())
        except FileNotFoundError:
            return None
        # ValueError: not JSON, or not this format. RecursionError: brackets nested too deeply.
        except (OSError, ValueError, RecursionError) as error:
            logger.warning(
                "%s: taken as not measured, since the cached file cannot be used: %s", path, error
            )
            return None
        if found is None:
            return None
        if found.age_seconds > (
            _MAX_CONTENDED_AGE_SECONDS if found.contended else _MAX_AGE_SECONDS
        ):
            logger.info(
                "%s: taken as not measured, since it is %s old",
                path,
                format_seconds(found.age_seconds),
            )
            return None
        return found

    def store(
        self, key: Mapping[str, str], rates: Mapping[str, Rate], *, contended: bool = False
    ) -> None:
        """Store ``rates`` for ``key``, replacing earlier ones. A failure is only logged.

        Args:
            key: What the rates depend on.
            rates: The rates by name.
            contended: Other processes kept processors busy meanwhile, so the rates are valid only for minutes.
        """
        path = self._path(key)
        document = {
            "version": _VERSION,
            "key": dict(key),
            "measured_at": time.time(),
            "contended": contended,
            "rates": {name: asdict(rate) for name, rate in rates.items()},
        }
        try:
            replace_file(path, json.dumps(document, indent=1))
        except OSError as error:
            logger.info("%s: the measurement is not cached: %s", path, error)

    def _path(self, key: Mapping[str, str]) -> Path:
        digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
        return self.folder / f"{key['of']}-{digest[:16]}.json"


def replace_file(path: Path, text: str) -> None:
    """Write a file at once: another process reads the old one or the new one, never half of it.

    Raises:
        OSError: It cannot be written; the old one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, written = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
        Path(written).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(written).unlink()
        raise


def user_cache_folder() -> Path:
    """Where the user's measurements and compiled kernels are kept, by the XDG standard."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG standard says that relative paths must be ignored.
    base = Path(named) if Path(named).is_absolute() else Path("~/.cache")
    # Without a home folder, the cache folder cannot be created, and nothing is cached.
    with contextlib.suppress(RuntimeError):
        base = base.expanduser()
    return base / "layerstream"


def _parse_document(
    document: Any, key: Mapping[str, str], names: Collection[str], *, now: float
) -> MeasuredRates | None:
    """Return the rates in a cache file, after checking that it was written for ``key``; None if it is of another version.

    Raises:
        ValueError: It is for another key, or malformed.
    """
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004 - as all that it says of files
    if document.get("version") != _VERSION:
        return None
    if document.get("key") != dict(key):
        raise ValueError("it is of another machine, volume or device")
    age = now - _parse_number(document.get("measured_at"))
    if age < -_CLOCK_SKEW_SECONDS:
        raise ValueError("it is from the future")
    rates = document.get("rates")
    if not isinstance(rates, dict) or not rates or not rates.keys() <= set(names):
        raise ValueError("it holds no rates, or unknown ones")
    return MeasuredRates(
        rates={name: _parse_rate(name, entry) for name, entry in rates.items()},
        age_seconds=max(0.0, age),
        contended=document.get("contended") is True,
    )


def _parse_rate(name: str, entry: Any) -> Rate:
    if not isinstance(entry, dict) or entry.keys() != {field.name for field in fields(Rate)}:
        raise ValueError("a rate is malformed")
    rate = Rate(
        median=_parse_number(entry["median"]),
        least=_parse_number(entry["least"]),
        high=_parse_number(entry["high"]),
        most=_parse_number(entry["most"]),
        samples=int(_parse_number(entry["samples"])),
    )
    possible = 0 <= rate.least <= rate.median <= rate.high <= rate.most and rate.samples >= 1
    if not possible or (rate.least == 0 and not name.endswith(PER_BYTE)):
        raise ValueError(
            f"a rate of {rate.median:g} between {rate.least:g} and {rate.most:g} is impossible"
        )
    return rate


def _parse_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is not a number")
    return float(value)


def machine_identity() -> Mapping[str, str]:
    """Return an identity of this machine that is the same after a restart."""
    return {"host": platform.node(), "machine": _machine_id(), "processor": processor_model()}


def _machine_id() -> str:
    for path in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        with contextlib.suppress(OSError):
            return path.read_text(errors="replace").strip()
    return ""


def processor_model(table: Path = Path("/proc/cpuinfo")) -> str:
    """Return the model name of the processor."""
    with contextlib.suppress(OSError):
        for line in table.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def processor_features(table: Path = Path("/proc/cpuinfo")) -> str:
    """Return all that tells one processor's instructions and caches from another's."""
    kept = (
        "vendor_id",
        "cpu family",
        "model",
        "stepping",
        "cache size",
        "flags",
        "Features",
        "CPU",
    )
    with contextlib.suppress(OSError):
        first, _, _ = table.read_text(errors="replace").partition("\n\n")
        return "\n".join(line for line in first.splitlines() if line.startswith(kept))
    return platform.processor() or platform.machine()
