"""Reopens the model of a service after streaming has failed, with growing pauses."""

import asyncio
import logging
import time
from types import TracebackType
from typing import Self

from layerstream.pipeline import LayerstreamError, StreamedModel
from layerstream.tools.serving.answers import Answers

__all__ = ["Recovery"]

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0


class Recovery:
    """As a context manager: while the block runs, a model that has failed is reopened until it works again.

    A request may fail alone, if its own reads do: nothing is reopened then, but health is told after the same pauses.

    Args:
        model: The model, open.
        answers: Are told that streaming has failed, and that it works again; and tell if a request has failed by itself.
    """

    def __init__(self, model: StreamedModel, answers: Answers) -> None:
        self._model = model
        self._answers = answers
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._reopened_seconds = 0.0

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="layerstream-recovery")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if (failure := self._model.failure) is not None:
                self._answers.streaming_failed(failure)
                # Not the error itself, whose frames may refer to slots.
                await self._reopen(f"streaming has failed ({failure}); the model is reopened")
            elif self._answers.failure is not None and not self._answers.stopping.is_set():
                # A request's own reads, of embedding rows or experts. Who asks /health may send no others until it is well.
                await self._reopen(
                    f"a request has failed ({self._answers.failure}); requests are expected to work"
                )

    async def _reopen(self, why: str) -> None:
        """Try once. The pauses grow until the model has worked for longer than the longest of them."""
        if time.monotonic() - self._reopened_seconds > 2 * _LONGEST_PAUSE_SECONDS:
            self._pause_seconds = _FIRST_PAUSE_SECONDS
        logger.warning("%s in %g s", why, self._pause_seconds)
        await asyncio.sleep(self._pause_seconds)
        self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
        self._reopened_seconds = time.monotonic()
        try:
            await self._model.reopen()
        except LayerstreamError as error:
            logger.warning("the model cannot be reopened: %s", str(error))
        else:
            self._answers.streaming_failed(None)
            logger.info("the model works again, as far as is known")
