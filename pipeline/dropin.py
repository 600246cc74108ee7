"""A streamed model for code without asyncio: an instance of its transformers class."""

import asyncio
import functools
import os
import threading
import weakref
from collections.abc import Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from layerstream.pipeline.entrances import with_methods
from layerstream.pipeline.model import StreamedModel
from layerstream.stages.errors import ClosedError, DeviceError

__all__ = ["load_streamed"]

T = TypeVar("T")


class _LoopThread:
    """An event loop in a thread of its own, for callers that have none."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="layerstream-loop", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError as error:
            self._loop.close()
            raise DeviceError(
                f"the system refuses a thread ({error}); end some processes"
            ) from error

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` on the loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def stop(self) -> None:
        """Stop the loop and its thread, after the tasks on it have ended."""
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    """Cancel all other tasks and wait for them: an interrupt may have left one that is opening a model."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class _Closer:
    """Closes a model and its loop, once; at the interpreter's exit at the latest."""

    def __init__(self, loop_thread: _LoopThread, model: StreamedModel) -> None:
        self._loop_thread = loop_thread
        self.model = model
        self._lock = threading.Lock()
        self._process = os.getpid()
        ref = weakref.ref(self)
        # Not atexit: by then the thread pools that closing needs are shut down. They use this hook themselves.
        threading._register_atexit(lambda: (closer := ref()) and closer())  # type: ignore[attr-defined]  # noqa: SLF001

    def __call__(self) -> None:
        # A process that was forked from ours has no loop to wait for, and nothing to close: it ends without either.
        if os.getpid() == self._process and self._lock.acquire(blocking=False):
            with suppress(ClosedError):
                if (runner := self.model.engine.passes.current()) is not None:
                    runner.abandon()
            self._loop_thread.run(self.model.aclose())
            self._loop_thread.stop()


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
    Weights may be replaced; copies, saving and conversions are refused.
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
