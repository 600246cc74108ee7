"""A streamed model for code without asyncio: an instance of its transformers class."""

import asyncio
import functools
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import torch

from layerstream.pipeline.entrances import with_methods
from layerstream.pipeline.model import StreamedModel
from layerstream.pipeline.scheduling.hooks import refuse_compiled
from layerstream.stages.errors import ClosedError, DeviceError

__all__ = ["load_streamed"]

T = TypeVar("T")


class _LoopThread:
    """An event loop in a thread of its own, for callers that have none."""

    _running: ClassVar[set["_LoopThread"]] = set()

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="layerstream-loop", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._loop.close()
            raise DeviceError(
                f"the system refuses a thread ({error}); end some processes"
            ) from error

    def _run(self) -> None:
        self._running.add(self)
        try:
            self._loop.run_forever()
            # It starts a thread, which Python 3.12 refuses while it exits; then it ends the executor's threads by itself.
            with suppress(RuntimeError):
                self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()
            self._running.discard(self)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` on the loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def stop(self) -> None:
        """Stop the loop and its thread, after the tasks on it have ended."""
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def stop_after(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Let the loop and its thread end after ``work``, without waiting: for the garbage collector, in any thread."""

        async def end() -> None:
            try:
                await work()
                await _cancel_others()
            finally:
                self._loop.stop()

        def begin() -> None:
            tasks.append(self._loop.create_task(end()))

        tasks: list[asyncio.Task[None]] = []  # the loop has weak references only
        self._loop.call_soon_threadsafe(begin)

    @classmethod
    def join_all(cls) -> None:
        """Wait for those that are ending."""
        for each in tuple(cls._running):
            each._thread.join()  # noqa: SLF001


async def _cancel_others() -> None:
    """Cancel all other tasks and wait for them: an interrupt may have left one that is opening a model."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class _Closer:
    """Closes a model and its loop, once: when it is called or dropped, and at the interpreter's exit at the latest.

    To be dropped, it must not be within reach of the event loop; see ``Lifetime``.
    """

    _open: ClassVar["weakref.WeakSet[_Closer]"] = weakref.WeakSet()

    def __init__(self, loop_thread: _LoopThread, model: StreamedModel) -> None:
        self._loop_thread = loop_thread
        self.model = model
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._open.add(self)
        _close_all_at_exit()

    def __call__(self) -> None:
        # A process that was forked from ours has no loop to wait for, and nothing to close: it ends without either.
        if os.getpid() == self._process and self._lock.acquire(blocking=False):
            with suppress(ClosedError):
                if (runner := self.model.engine.passes.current()) is not None:
                    runner.abandon()
            self._loop_thread.run(self.model.aclose())
            self._loop_thread.stop()

    def __del__(self) -> None:
        if os.getpid() == self._process and self._lock.acquire(blocking=False):
            self._loop_thread.stop_after(self.model.aclose)

    @classmethod
    def close_all(cls) -> None:
        """Close all that are open, and wait for those that are being closed."""
        for closer in tuple(cls._open):
            closer()
        _LoopThread.join_all()


@functools.cache
def _close_all_at_exit() -> None:
    # Not atexit: by then the thread pools that closing needs are shut down. They use this hook themselves.
    threading._register_atexit(_Closer.close_all)  # type: ignore[attr-defined]  # noqa: SLF001


class _Closable:
    """The additional methods of a drop-in model."""

    def close(self) -> None:
        """Free memory, threads and files. May be called again."""
        vars(self)["_layerstream_close"]()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _generate_of(kind: type[Any], model: StreamedModel) -> Any:
    """``generate`` of ``kind`` as a request, which reserves its memory first and shares sweeps with other threads."""

    @functools.wraps(kind.generate)
    def generate(self: Any, *inputs: Any, **named: Any) -> Any:
        if model.engine.passes.in_request():
            return kind.generate(self, *inputs, **named)
        return model.engine.call_here(
            "generate", lambda clone: functools.partial(kind.generate, clone), inputs, named
        )

    return generate


def _call_of(kind: type[Any], model: StreamedModel) -> Any:
    """``__call__`` of ``kind``. With ``adapter``, in a request: threads that have none share the module tree itself."""

    @functools.wraps(kind.__call__)
    def call(self: Any, *inputs: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            refuse_compiled(kind.__name__)
        if "adapter" not in named:
            return kind.__call__(self, *inputs, **named)
        return model.engine.call_here(
            "forward", lambda clone: functools.partial(kind.__call__, clone), inputs, named
        )

    return call


def load_streamed(source: str | os.PathLike[str], **options: Any) -> Any:
    """A transformers model whose weights stream, for code without asyncio.

    Use it as the model itself: ``model(...)``, ``model.generate(...)``, ``transformers.pipeline(model=model)``.
    It is an instance of its transformers class; ``close()`` it, or use it as a context manager.

    Each call, from any thread, is a request: it waits for the memory that it may need, and frees it when it returns.
    Weights may be replaced, embeddings resized, and the model saved, with little memory; copies and conversions are refused.
    What you keep of a result is not in the budget, as with any transformers model. That includes
    its KV cache, which counts during a call that gets it.

    Args:
        source: A folder, a safetensors or GGUF file, or a hub id.
        options: The arguments of ``StreamedModel.open``.
    """
    model = StreamedModel.open(source, **options)  # before there is a thread: it refuses arguments
    loop_thread = _LoopThread()
    try:
        loop_thread.run(model.__aenter__())
    except BaseException:
        loop_thread.stop()
        raise

    closer = _Closer(loop_thread, model)

    module = model.module
    kind = type(module)
    methods = {"__call__": _call_of(kind, model)}
    if hasattr(kind, "generate"):
        methods["generate"] = _generate_of(kind, model)
    module.__class__ = with_methods(kind, methods, _Closable)
    vars(module)["_layerstream_close"] = closer
    return module
