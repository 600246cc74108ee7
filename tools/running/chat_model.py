"""A streamed model that answers in a thread of its own, so that the main thread has the terminal and its signals."""

import argparse
import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from layerstream.stages.process.usage import anonymous_bytes
from layerstream.stages.telemetry.timings import Timings
from layerstream.tools.running.adapters import open_options, request_options
from layerstream.tools.running.context import context_in
from layerstream.tools.running.speculation import Speculation

if TYPE_CHECKING:
    from layerstream.pipeline import Stats, StreamedModel
    from layerstream.pipeline.checkpoint.adapter_folder import Sources

__all__ = ["Answering", "ChatModel", "chat_options", "opened_for_chat"]

T = TypeVar("T")


class ChatModel:
    """A streamed model, for ``with``, which opens it and raises the errors of ``StreamedModel``'s opening.

    Args:
        opening: The model, not open.

    Attributes:
        model: The model, once it is open; its methods are for the thread.
    """

    model: "StreamedModel"

    def __init__(self, opening: "StreamedModel") -> None:
        self._opening = opening
        self._opened: Future[StreamedModel] = Future()
        # A signal that ends the process does not wait for it.
        self._thread = threading.Thread(target=self._run, name="layerstream-chat", daemon=True)

    def __enter__(self) -> Self:
        self._before_bytes = anonymous_bytes()
        self._thread.start()
        self.model = self._opened.result()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._keep_open())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits for it
            if not self._opened.done():
                self._opened.set_exception(error)

    async def _keep_open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        async with self._opening as model:
            self._opened.set_result(model)
            await self._closing.wait()

    def answer(self, prompt: Sequence[int], options: dict[str, Any]) -> "Answering":
        """Begin to answer ``prompt``, token ids, with ``options`` of ``generate``."""
        answering = Answering(self.model, self._loop, prompt, options)
        self._loop.call_soon_threadsafe(answering.begin)
        return answering

    def stats(self) -> "Stats":
        """The model's counters."""
        return self._call(self.model.stats)

    def timings(self) -> Timings:
        """What the stages have done."""
        return self._call(self.model.timings)

    def added_bytes(self) -> int | None:
        """The memory that this process holds more of than before the model was opened; None if unknown."""
        now_bytes = anonymous_bytes()
        if now_bytes is None or self._before_bytes is None:
            return None
        return max(0, now_bytes - self._before_bytes)

    def _call(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()


class Answering:
    """An answer under way. Made by ``ChatModel.answer``; its methods are for the main thread.

    Attributes:
        error: Why it failed; None if it did not. Set at the end.
        sweeps: Sweeps that were begun for it, once it has ended.
    """

    def __init__(
        self,
        model: "StreamedModel",
        loop: asyncio.AbstractEventLoop,
        prompt: Sequence[int],
        options: dict[str, Any],
    ) -> None:
        self._model = model
        self._loop = loop
        self._prompt = prompt
        self._options = options
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._task: asyncio.Task[None] | None = None
        self.error: Exception | None = None
        self.sweeps = 0

    def begin(self) -> None:
        """Begin; called on the event loop."""
        self._task = asyncio.create_task(self._generate())

    def next(self, timeout_seconds: float) -> int | None:
        """The next token; None at the end.

        Raises:
            TimeoutError: None has come in time.
        """
        try:
            return self._tokens.get(timeout=timeout_seconds)
        except queue.Empty:
            raise TimeoutError from None

    def stop(self) -> None:
        """End it at its next layer batch. May be called by a handler of a signal, and again."""
        self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _generate(self) -> None:
        import torch

        before = self._model.stats().sweeps
        ids = torch.tensor([self._prompt])
        stream = self._model.stream(
            input_ids=ids, attention_mask=torch.ones_like(ids), **self._options
        )
        try:
            with suppress(asyncio.CancelledError):
                async with aclosing(cast("Any", stream)):
                    async for token in stream:
                        self._tokens.put(token)
        except Exception as error:  # noqa: BLE001 - raised in the main thread
            self.error = error
        finally:
            self.sweeps = self._model.stats().sweeps - before
            self._tokens.put(None)


def opened_for_chat(sources: "Sources", args: argparse.Namespace) -> ChatModel:
    """The model that was found, to be opened for one request at a time, as the arguments of ``chat`` say."""
    from layerstream.pipeline import Budget, StreamedModel, Workload
    from layerstream.tools.running.open_checkpoint import open_checkpoint

    context = context_in(open_checkpoint(sources.model).config or {})
    new_tokens = args.max_new_tokens if context is None else min(args.max_new_tokens, context - 1)
    prompt_tokens = args.prompt_tokens if context is None else context - new_tokens
    opening = StreamedModel.open(
        sources.source,
        device=args.device,
        budget=Budget(vram=args.vram, host=args.host),
        workload=Workload(
            prompt_tokens=min(args.prompt_tokens, prompt_tokens), new_tokens=new_tokens
        ),
        reader=args.reader,
        dtype=args.dtype,
        kernels=args.kernels,
        verify=args.verify,
        max_requests=1,
        **open_options(args),
    )
    return ChatModel(opening)


def chat_options(
    model: "StreamedModel", args: argparse.Namespace, speculation: Speculation | None
) -> dict[str, Any]:
    """Options of ``generate`` for every answer, as the arguments of ``chat`` say."""
    import torch

    defaults = model.module.generation_config
    eos, pad = defaults.eos_token_id, defaults.pad_token_id
    ends = [eos] if isinstance(eos, int) else list(eos or ())
    options: dict[str, Any] = {
        **request_options(args),
        "max_new_tokens": args.max_new_tokens,
        "num_beams": 1,
        "eos_token_id": ends or None,
        # There is no padding, but transformers warns if this is not set.
        "pad_token_id": next(iter(ends), 0) if pad is None else pad,
    }
    if args.temperature is not None:
        options |= {"do_sample": True, "temperature": args.temperature}
    elif args.greedy:
        options |= {"do_sample": False}
    if not args.greedy and (args.temperature is not None or defaults.do_sample):
        generator = torch.Generator(model.plan.device)
        if args.seed is None:
            generator.seed()
        else:
            generator.manual_seed(args.seed)
        options["generator"] = generator
    if speculation is not None:
        speculation.check(model.module)
        options |= speculation.options()
    return options
