"""A cache of measurements of this machine: one small file for each, in the user's cache folder."""

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerstream.pipeline.machine.measurement import Rate
from layerstream.stages.text import format_seconds

__all__ = ["PER_BYTE", "Measured", "MeasuredCache", "machine", "processor"]

logger = logging.getLogger(__name__)

PER_BYTE = "_per_byte"  # how names of costs end; a cost may be zero

_VERSION = 1  # of the format, and of the way of measuring
# Machines are rebuilt, disks are swapped and fill up, neighbours of a virtual disk come and go: after a week that is noticed
# at the latest. For changes within minutes there is `fresh`.
_MOST_SECONDS = 7 * 24 * 3600.0
# What was measured next to other processes is valid only while they are probably still there.
_MOST_CONTENDED_SECONDS = 600.0
_SKEW_SECONDS = 60.0  # by which the clock may have been set back


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Rates by name, and how long ago they were measured."""

    rates: Mapping[str, Rate]
    age_seconds: float
    contended: bool = False
    """Other processes kept processors busy meanwhile."""


class MeasuredCache:
    """Cache files, each of which has its key in it. Without a writable folder nothing is kept.

    Args:
        folder: By default ``layerstream`` in the user's cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = _user_folder() if folder is None else folder

    def load(self, key: Mapping[str, str], *, names: Collection[str]) -> Measured | None:
        """The rates ``names`` that are cached for ``key``; None if there is nothing valid."""
        path = self._path(key)
        try:
            document = json.loads(path.read_bytes())
            found = _checked(document, key, names, now=time.time())
        except FileNotFoundError:
            return None
        # ValueError: not JSON, or not our format. RecursionError: brackets nested too deeply.
        except (OSError, ValueError, RecursionError) as error:
            logger.warning(
                "%s: taken as not measured, since what is kept cannot be used: %s", path, error
            )
            return None
        if found.age_seconds > (_MOST_CONTENDED_SECONDS if found.contended else _MOST_SECONDS):
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
            key: What they depend on.
            rates: By name.
            contended: Other processes kept processors busy meanwhile, so that the rates are valid only for minutes.
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
            self.folder.mkdir(parents=True, exist_ok=True)
            # Replaced atomically: another process reads the old file or the new one, never half of it.
            descriptor, written = tempfile.mkstemp(dir=self.folder, prefix=f".{path.name}")
            try:
                with os.fdopen(descriptor, "w") as stream:
                    json.dump(document, stream, indent=1)
                Path(written).replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(written).unlink()
                raise
        except OSError as error:
            logger.info("%s: what was measured is not kept: %s", path, error)

    def _path(self, key: Mapping[str, str]) -> Path:
        digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
        return self.folder / f"{key['of']}-{digest[:16]}.json"


def _user_folder() -> Path:
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG standard says that relative paths are to be ignored.
    base = Path(named) if Path(named).is_absolute() else Path("~/.cache")
    # If that is no home folder, the cache folder cannot be made, and nothing is kept.
    with contextlib.suppress(RuntimeError):
        base = base.expanduser()
    return base / "layerstream"


def _checked(
    document: Any, key: Mapping[str, str], names: Collection[str], *, now: float
) -> Measured:
    """``document``, checked to be one that was written for ``key``.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        raise ValueError(f"it is not of version {_VERSION}")
    if document.get("key") != dict(key):
        raise ValueError("it is of another machine, volume or device")
    age = now - _number(document.get("measured_at"))
    if age < -_SKEW_SECONDS:
        raise ValueError("it is from the future")
    rates = document.get("rates")
    if not isinstance(rates, dict) or not rates or not rates.keys() <= set(names):
        raise ValueError("it holds no rates, or other ones")
    return Measured(
        rates={name: _rate(name, entry) for name, entry in rates.items()},
        age_seconds=max(0.0, age),
        contended=document.get("contended") is True,
    )


def _rate(name: str, entry: Any) -> Rate:
    if not isinstance(entry, dict) or entry.keys() != {"median", "least", "most", "samples"}:
        raise ValueError("a rate is not one")
    rate = Rate(
        median=_number(entry["median"]),
        least=_number(entry["least"]),
        most=_number(entry["most"]),
        samples=int(_number(entry["samples"])),
    )
    possible = 0 <= rate.least <= rate.median <= rate.most and rate.samples >= 1
    if not possible or (rate.least == 0 and not name.endswith(PER_BYTE)):
        raise ValueError(
            f"a rate of {rate.median:g} between {rate.least:g} and {rate.most:g} is none"
        )
    return rate


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is not a number")
    return float(value)


def machine() -> Mapping[str, str]:
    """An identity of this machine that is the same after a restart."""
    return {"host": platform.node(), "machine": _machine_id(), "processor": processor()}


def _machine_id() -> str:
    for path in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        with contextlib.suppress(OSError):
            return path.read_text(errors="replace").strip()
    return ""


def processor(table: Path = Path("/proc/cpuinfo")) -> str:
    """The model of the processor."""
    with contextlib.suppress(OSError):
        for line in table.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
