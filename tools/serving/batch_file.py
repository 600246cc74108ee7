"""A file of requests in OpenAI's batch format, and the file of their answers."""

import asyncio
import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from layerstream.stages.errors import LayerstreamError
from layerstream.tools.console.files import naming
from layerstream.tools.serving.answers import Answers
from layerstream.tools.serving.errors import ApiError, api_error
from layerstream.tools.serving.prompts import Prompts
from layerstream.tools.serving.protocol import ChatRequest, CompletionRequest
from layerstream.tools.serving.request_body import parse_request

__all__ = ["BatchFile", "BatchLine"]

_KINDS: dict[str, type[ChatRequest] | type[CompletionRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}
_COMPLETION_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLine:
    """One request of the file."""

    custom_id: str
    key: str
    """Tells it from other lines; the same whenever the file is read."""
    request: ChatRequest | CompletionRequest | None
    error: ApiError | None
    """Why it is not answered."""

    def record(self, status: int, body: dict[str, Any]) -> str:
        """Its line in the file of answers."""
        response = {"status_code": status, "request_id": self.key, "body": body}
        made = {"id": f"batch_req_{self.key}", "custom_id": self.custom_id, "response": response}
        return json.dumps(made | {"error": None}, ensure_ascii=False) + "\n"


class BatchFile:
    """Requests, and which of them have been answered.

    Answers are written in the order of the requests, each as a whole, so that an earlier run, however it ended, has
    answered the first ones.

    Args:
        source: The requests.
        target: The answers; need not exist.
        new_tokens: Tokens of an answer whose request sets no limit.
        adapters: Names of adapters. If there are any, each request has to name one of them as its model, or none.

    Raises:
        LayerstreamError: A line is no request, or ``target`` has the answers to others.
    """

    def __init__(
        self, source: Path, target: Path, *, new_tokens: int, adapters: Collection[str] = ()
    ) -> None:
        self._adapters = adapters
        self._source, self._target = source, target
        self._new_tokens = new_tokens
        self._created = int(source.stat().st_mtime)  # the same in each run
        texts = source.read_text("utf-8").splitlines()
        self.lines = [
            self._parsed(text, number) for number, text in enumerate(texts, 1) if text.strip()
        ]
        self._kept_bytes, answered = self._answered()
        self.left = self.lines[answered:]

    def largest(self, tokenizer: Any, *, context: int | None) -> tuple[int, int]:
        """The most tokens of a prompt and of an answer, over all requests that are left and fit into ``context``."""
        # Only to count: what a model does not know is refused when it is answered.
        prompts = Prompts(tokenizer, chat_template=None, response_template={}, vocabulary=1 << 31)
        longest, most = 1, 1

        async def count() -> None:
            nonlocal longest, most
            for line in self.left:
                if line.request is None:
                    continue
                try:
                    prompt = max(map(len, await prompts.token_ids(line.request)))
                except ApiError:
                    continue
                new_tokens = line.request.max_new_tokens or self._new_tokens
                if context is None or prompt + new_tokens <= context:
                    longest, most = max(longest, prompt), max(most, new_tokens)

        try:
            asyncio.run(count())
        finally:
            prompts.close()
        return longest, most

    async def answer(
        self, answers: Answers, *, at_once: int, on_answer: Callable[[], object]
    ) -> int:
        """Answer what is left, and write it; returns the number of new tokens.

        Args:
            answers: Answers requests.
            at_once: How many are answered at the same time.
            on_answer: Called when an answer has been written.
        """
        places, tokens = asyncio.Semaphore(at_once), 0

        async def record(line: BatchLine) -> str:
            nonlocal tokens
            status, body = await self._response(line, answers)
            places.release()
            tokens += body.get("usage", {}).get("completion_tokens", 0)
            return line.record(status, body)

        tasks: asyncio.Queue[asyncio.Task[str] | None] = asyncio.Queue()

        async def write(file: IO[str]) -> None:
            while (task := await tasks.get()) is not None:
                file.write(await task)
                file.flush()
                on_answer()

        with naming(self._target), self._target.open("a+", encoding="utf-8") as file:
            file.truncate(self._kept_bytes)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(write(file))
                    for line in self.left:
                        await places.acquire()
                        tasks.put_nowait(group.create_task(record(line)))
                    tasks.put_nowait(None)
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return tokens

    async def _response(self, line: BatchLine, answers: Answers) -> tuple[int, dict[str, Any]]:
        if line.request is None or line.error is not None:
            error = line.error or ApiError(400, "There is no request.")
            return error.status, error.body
        try:
            body = await answers.complete(line.request)
        except Exception as error:
            refusal = api_error(error)
            if refusal.status >= 500:  # noqa: PLR2004
                raise  # this is not the request's fault: the next run tries it again
            return refusal.status, refusal.body
        return 200, body | {
            "id": f"{body['id'].partition('-')[0]}-{line.key}",
            "created": self._created,
        }

    def _parsed(self, text: str, number: int) -> BatchLine:
        try:
            fields = json.loads(text)
            custom_id, url, body = str(fields["custom_id"]), fields["url"], dict(fields["body"])
        except (ValueError, TypeError, KeyError) as error:
            raise LayerstreamError(
                f"{self._source}, line {number}, is no request with custom_id, url and body: {error!r}."
            ) from error
        request, refusal = None, None
        body = {name: value for name, value in body.items() if value is not None}
        body = {"model": "", **body, "stream": False}
        body.pop("stream_options", None)
        if "max_tokens" not in body and "max_completion_tokens" not in body:
            body["max_tokens"] = (
                self._new_tokens if url != "/v1/completions" else _COMPLETION_TOKENS
            )
        if url not in _KINDS:
            refusal = ApiError(404, f"Unknown request URL: {url}", code="unknown_url")
        else:
            try:
                request, _ = parse_request(body, _KINDS[url])
            except ApiError as error:
                refusal = error
            if (
                request is not None
                and self._adapters
                and request.model not in {"", *self._adapters}
            ):
                names = ", ".join(f"'{each}'" for each in self._adapters)
                refusal = ApiError(
                    404,
                    f"There is no adapter '{request.model}': give one of {names}, or no model for the base.",
                    param="model",
                    code="model_not_found",
                )
        key = hashlib.sha256(f"{number} {text}".encode()).hexdigest()[:24]
        return BatchLine(custom_id=custom_id, key=key, request=request, error=refusal)

    def _answered(self) -> tuple[int, int]:
        """The bytes and the number of answers that the target has, up to the last whole one."""
        if not self._target.is_file():
            return 0, 0
        content = self._target.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        ids = [json.loads(line)["id"] for line in whole.splitlines()]
        if ids != [f"batch_req_{line.key}" for line in self.lines[: len(ids)]]:
            raise LayerstreamError(
                f"{self._target} has the answers to other requests than those of {self._source}; give another file."
            )
        return len(whole), len(ids)
