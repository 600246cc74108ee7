"""Compiles kernels with numba when they are first called, and keeps them in a folder for the next process.

numba and llvmlite are optional. Without them, or on a processor that does not convert halves, ``compiled`` returns None and
torch takes over, much more slowly; ``why_not_compiled`` says why.
"""

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "Kernel",
    "compile_seconds",
    "compiled",
    "kernels_digest",
    "set_cache_folder",
    "suggest_cache_folder",
    "why_not_compiled",
]

logger = logging.getLogger(__name__)

# Numbers: some ten microseconds of unpacking.
_WORTH_A_THREAD = 1 << 17
_KERNELS = "layerstream.stages.unpack.kernels"


class _Cache:
    """Where compiled kernels are kept, for all kernels of the process; None: nowhere."""

    folder: Path | None = None
    is_chosen = False


class Kernel:
    """A function that is compiled once for each combination of its arrays' types. It runs without the interpreter's lock.

    It is ``function(begin, end, *arguments)``, for some rows of its output; the rows are shared among torch's threads.
    """

    def __init__(self, function: Callable[..., None], folder: Path | None) -> None:
        self.name = function.__name__
        self.seconds = 0.0
        """Spent so far on compiling, or on loading what was compiled before."""
        self._function = function
        self._folder = folder
        self._dispatcher = self._new_dispatcher(folder)
        self._ready: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, numbers: int, rows: int, *arguments: Any) -> None:
        """Run the kernel for so many packed numbers and rows; the first time for its types, compile it before."""
        threads = min(torch.get_num_threads(), max(1, numbers // _WORTH_A_THREAD))
        types = "".join(_type_of(each) for each in arguments)
        if types not in self._ready:
            self._compile(types, (threads, rows, arguments))
        self._dispatcher(threads, rows, arguments)

    def _compile(self, types: str, arguments: tuple[Any, ...]) -> None:
        import numba

        with self._lock:
            if types in self._ready:
                return
            began = time.perf_counter()
            signature = tuple(numba.typeof(each) for each in arguments)
            try:
                self._dispatcher.compile(signature)
            except Exception as error:
                if self._folder is None:
                    raise
                # A full disk or a damaged file: numba raises whatever reading or writing raised.
                logger.warning("%s: not used for compiled kernels: %s", self._folder, error)
                self._folder = None
                self._dispatcher = self._new_dispatcher(None)
                self._dispatcher.compile(signature)
            self._ready.add(types)
            seconds = time.perf_counter() - began
            self.seconds += seconds
            logger.debug("kernel %s compiled in %.2f s", self.name, seconds)

    def _new_dispatcher(self, folder: Path | None) -> Any:
        import numba

        from layerstream.stages.unpack.kernels.team import in_threads

        kernel = in_threads(self._function, has_openmp=_has_openmp())
        dispatcher = numba.njit(nogil=True)(kernel)
        if folder is not None:
            _keep_in(dispatcher, folder)
        return dispatcher


def _type_of(argument: Any) -> str:
    if isinstance(argument, tuple):
        return str(len(argument))
    return str(argument.dtype.char) if hasattr(argument, "dtype") else " "


def set_cache_folder(folder: str | os.PathLike[str] | None) -> None:
    """Keep kernels that are compiled from now on in ``folder``, and take them from there; None: compile them in each process.

    numba puts code into the folder that later processes run: it must be writable for nobody else.
    """
    _Cache.folder, _Cache.is_chosen = None if folder is None else Path(folder), True
    _kernel.cache_clear()


def suggest_cache_folder(folder: Path) -> None:
    """As ``set_cache_folder``, unless a folder was set before."""
    if not _Cache.is_chosen:
        set_cache_folder(folder)


def compiled(module: str, function: str) -> Kernel | None:
    """Return a kernel of a module in ``kernels``; None if nothing can be compiled here."""
    return _kernel(module, function) if why_not_compiled() is None else None


@functools.cache
def _kernel(module: str, function: str) -> Kernel:
    found = getattr(importlib.import_module(f"{_KERNELS}.{module}"), function)
    kernel = Kernel(found, _usable(_Cache.folder))
    _KNOWN.append(kernel)
    return kernel


_KNOWN: list[Kernel] = []


def compile_seconds() -> dict[str, float]:
    """Return the seconds that compiling each kernel has taken in this process."""
    return {kernel.name: kernel.seconds for kernel in _KNOWN}


@functools.cache
def why_not_compiled() -> str | None:
    """Return a sentence that says why kernels run uncompiled here and what helps; None if they are compiled."""
    if importlib.util.find_spec("numba") is None:
        return "Weights are unpacked by torch, which is slow: install numba to compile the kernels."
    try:
        import llvmlite.binding
        import numba  # noqa: F401
    except ImportError as error:
        return f"Weights are unpacked by torch, which is slow: numba cannot be imported ({error})."
    if sys.byteorder != "little":
        return "Weights are unpacked by torch, which is slow: the kernels need a little-endian processor."
    features = llvmlite.binding.get_host_cpu_features()
    if platform.machine() in {"x86_64", "AMD64"} and not features.get("f16c"):
        return (
            "Weights are unpacked by torch, which is slow: the kernels need a processor with F16C."
        )
    return None


def _usable(folder: Path | None) -> Path | None:
    """Return a folder of its own for this state of the kernels, which exists; None if it cannot be written."""
    if folder is None:
        return None
    # numba looks only at the file of the function itself, not at what the function is made of.
    own = folder / f"kernels-{kernels_digest()}"
    try:
        own.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.info("%s: compiled kernels are not kept: %s", own, error)
        return None
    if not os.access(own, os.W_OK):
        logger.info("%s: compiled kernels are not kept, since the folder is not writable", own)
        return None
    return own


@functools.cache
def kernels_digest() -> str:
    """Return what tells this state of the kernels from others."""
    digest = hashlib.sha256(b"openmp" if _has_openmp() else b"")
    for path in sorted((Path(__file__).parent / "kernels").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _has_openmp() -> bool:
    """Whether kernels can call OpenMP, by the names that GCC gives it (others know them, too).

    It is torch's own, unless another library has loaded one for all to see before: then kernels have threads of their own.
    """
    symbols = ctypes.CDLL(None)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    return all(hasattr(symbols, name) for name in names)


_CONFIG_LOCK = threading.Lock()


def _keep_in(dispatcher: Any, folder: Path) -> None:
    """Give one function its cache: numba knows a folder for the process only, and takes it when the cache is enabled."""
    from numba.core import config

    with _CONFIG_LOCK:
        before = config.CACHE_DIR
        config.CACHE_DIR = str(folder)
        try:
            dispatcher.enable_caching()
        finally:
            config.CACHE_DIR = before
