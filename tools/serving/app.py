"""The service: a FastAPI app on an open ``StreamedModel``.

It turns HTTP requests into calls of ``StreamedModel.stream``, one for each answer, and tokens into JSON. There is no
scheduling here: the library decides when each of them computes, and in how much memory.
"""

import hmac
import logging
import re
import time
from datetime import UTC, datetime
from typing import Any, TypeVar

import prometheus_client
from fastapi import APIRouter, Depends, FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from layerstream.pipeline import StreamedModel
from layerstream.tools.serving.access import AccessControl
from layerstream.tools.serving.answer_parser import find_response_template
from layerstream.tools.serving.answers import Answers
from layerstream.tools.serving.choices import Choices
from layerstream.tools.serving.connections import Expecting
from layerstream.tools.serving.embeddings import EmbeddingRequest
from layerstream.tools.serving.errors import ApiError, error_response
from layerstream.tools.serving.limits import Limits
from layerstream.tools.serving.machine_state import MachineState
from layerstream.tools.serving.messages_api import CountRequest, MessagesBuilder, MessagesRequest
from layerstream.tools.serving.monitoring import Traced
from layerstream.tools.serving.prompts import Prompts
from layerstream.tools.serving.protocol import ChatRequest, CompletionRequest
from layerstream.tools.serving.request_body import read_request
from layerstream.tools.serving.responses_api import ResponsesBuilder, ResponsesRequest
from layerstream.tools.serving.settings import Settings
from layerstream.tools.serving.web_page import page_file, page_index

__all__ = ["make_answers", "make_app"]

logger = logging.getLogger(__name__)

# Limits for unknown fields that are named, in a response and in all of the log.
_MAX_IGNORED = 20
_MAX_LOGGED = 200


def make_answers(
    model: StreamedModel, tokenizer: Any, settings: Settings
) -> tuple[Answers, Prompts, Limits]:
    """Make what answers requests to ``model``, turns them into tokens, and limits them."""
    if settings.speculation is not None:
        settings.speculation.check(model.module)
    response_template = find_response_template(tokenizer, model.module, settings.response_template)
    prompts = Prompts(
        tokenizer,
        chat_template=settings.chat_template,
        response_template=response_template,
        vocabulary=model.module.get_input_embeddings().weight.shape[0],
    )
    limits = Limits(model, requests=settings.concurrent, new_tokens=settings.new_tokens)
    choices = Choices(
        model,
        tokenizer,
        prompts,
        limits,
        response_template=response_template,
        speculation=settings.speculation,
        adapters=frozenset(settings.adapters),
    )
    answers = Answers(
        model,
        tokenizer,
        prompts,
        limits,
        choices=choices,
        max_answers=settings.max_answers,
        keep_alive_seconds=settings.keep_alive_seconds,
    )
    return answers, prompts, limits


def make_app(model: StreamedModel, tokenizer: Any, settings: Settings) -> FastAPI:
    """Make an app that serves ``model``, which has to be open as long as the app is used.

    ``app.state.answers.stop()`` ends running requests; ``layerstream serve`` calls it when it shuts down.
    """
    answers, prompts, limits = make_answers(model, tokenizer, settings)
    machine = MachineState(
        model,
        name=settings.model_name,
        max_answers=settings.max_answers,
        open_answers=lambda: answers.open,
        trouble=lambda: _trouble(answers, settings),
    )
    routes = Routes(answers, prompts, limits, settings)
    app = FastAPI(
        title="layerstream", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.add_middleware(Traced, metrics=answers.metrics)
    app.add_middleware(AccessControl, hosts=settings.hosts, origins=settings.origins)
    app.add_middleware(Expecting)
    app.state.answers = answers
    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, error_response)
    api = APIRouter(prefix="/v1", dependencies=[Depends(routes.check_key)])
    read_only: dict[str, Any] = {"methods": ["GET", "HEAD"], "response_model": None}
    api.add_api_route("/models", routes.models, **read_only)
    api.add_api_route("/models/{name:path}", routes.model, **read_only)
    api.add_api_route("/machine", machine.respond, **read_only)
    api.add_api_route("/chat/completions", routes.chat, methods=["POST"], response_model=None)
    api.add_api_route("/completions", routes.complete, methods=["POST"], response_model=None)
    api.add_api_route("/embeddings", routes.embed, methods=["POST"], response_model=None)
    api.add_api_route("/responses", routes.respond, methods=["POST"], response_model=None)
    api.add_api_route("/messages", routes.message, methods=["POST"], response_model=None)
    counting = "/messages/count_tokens"
    api.add_api_route(counting, routes.count, methods=["POST"], response_model=None)
    app.include_router(api)
    app.add_api_route("/health", routes.health, **read_only)
    app.add_api_route("/metrics", routes.metrics, **read_only)
    if settings.page:
        app.add_api_route("/", page_index, **read_only)
        app.add_api_route("/page/{name}", page_file, **read_only)
    return app


def _trouble(answers: Answers, settings: Settings) -> str | None:
    """What is wrong with the service in a sentence; None if nothing is."""
    if answers.failure is not None:
        return answers.failure
    if (seconds := answers.movement.still_seconds()) > settings.stall_seconds:
        return f"Requests run, but nothing has moved for {seconds:.0f} s."
    return None


_AnyRequest = TypeVar(
    "_AnyRequest",
    ChatRequest,
    CompletionRequest,
    CountRequest,
    EmbeddingRequest,
    MessagesRequest,
    ResponsesRequest,
)


def _as_chat(request: CountRequest | ResponsesRequest) -> ChatRequest:
    try:
        chat = request.as_chat()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        path = ".".join(map(str, first["loc"]))
        raise ApiError(
            400, f"Invalid value for '{path}': {first['msg']}.", param=path, code="invalid_value"
        ) from None
    chat.check()
    return chat


def _builder(request: MessagesRequest | ResponsesRequest) -> MessagesBuilder | ResponsesBuilder:
    if isinstance(request, MessagesRequest):
        return MessagesBuilder(request)
    return ResponsesBuilder(request)


class Routes:
    """The handlers of all paths."""

    def __init__(
        self,
        answers: Answers,
        prompts: Prompts,
        limits: Limits,
        settings: Settings,
    ) -> None:
        self._answers = answers
        self._prompts = prompts
        self._limits = limits
        self._settings = settings
        self._names = (settings.model_name, *settings.adapters)
        self._created = int(time.time())
        self._ignored: set[str] = set()  # fields whose names were logged

    async def check_key(self, request: Request) -> None:
        """Raise an ApiError if the service has an API key and the request does not."""
        if self._settings.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if not scheme and "x-api-key" in request.headers:  # as clients of Anthropic's API send it
            scheme, key = "bearer", request.headers["x-api-key"]
        matches = hmac.compare_digest(key.strip().encode(), self._settings.api_key.encode())
        if scheme.lower() != "bearer" or not matches:
            raise ApiError(
                401,
                "Incorrect API key provided; send the right one as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def health(self) -> Response:
        """Report whether requests can be answered."""
        if (message := _trouble(self._answers, self._settings)) is None:
            return JSONResponse({"status": "ok"})
        status = "stalled" if self._answers.failure is None else "failed"
        return JSONResponse({"status": status, "message": message}, 503)

    async def metrics(self) -> Response:
        """Return counters and gauges for Prometheus."""
        text = self._answers.metrics.text()
        return Response(text, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})

    async def models(self) -> dict[str, Any]:
        """List the model, and the names for it with each of its adapters."""
        # The last ones are for Anthropic's clients.
        more = {"has_more": False, "first_id": self._names[0], "last_id": self._names[-1]}
        return {
            "object": "list",
            "data": [await self.model(name) for name in self._names],
            **more,
        }

    async def model(self, name: str) -> dict[str, Any]:
        """Describe the model called ``name``."""
        if name not in self._names:
            listed = ", ".join(f"'{each}'" for each in self._names)
            raise ApiError(
                404,
                f"The model '{name}' does not exist; this server has {listed}.",
                param="model",
                code="model_not_found",
            )
        parent = {} if name == self._settings.model_name else {"parent": self._settings.model_name}
        return {
            "id": name,
            **parent,
            "object": "model",
            "created": self._created,
            "owned_by": "layerstream",
            "context_length": self._limits.context,
            "max_model_len": self._limits.context,
            # For Anthropic's clients.
            "type": "model",
            "display_name": name,
            "created_at": datetime.fromtimestamp(self._created, UTC).isoformat(),
        }

    async def chat(self, request: Request) -> Response:
        """Continue a conversation."""
        return await self._answer(request, ChatRequest)

    async def complete(self, request: Request) -> Response:
        """Continue a text."""
        return await self._answer(request, CompletionRequest)

    async def respond(self, request: Request) -> Response:
        """Continue a conversation, by OpenAI's newer API."""
        return await self._answer(request, ResponsesRequest)

    async def message(self, request: Request) -> Response:
        """Continue a conversation, by Anthropic's API."""
        return await self._answer(request, MessagesRequest)

    async def count(self, request: Request) -> Response:
        """Count the tokens of a conversation, by Anthropic's API."""
        return await self._answer(request, CountRequest)

    async def embed(self, request: Request) -> Response:
        """Make vectors of texts."""
        return await self._answer(request, EmbeddingRequest)

    async def _answer(self, request: Request, kind: type[_AnyRequest]) -> Response:
        limit = self._settings.max_body_bytes
        api_request, ignored = await read_request(
            request,
            kind,
            max_bytes=limit,
            stopping=self._answers.stopping,
            in_thread=self._prompts.in_thread,
            strict=self._settings.strict,
        )
        await self.model(api_request.model)
        if isinstance(api_request, ChatRequest | CompletionRequest):
            response = await self._answers.answer(api_request, request.receive)
        elif isinstance(api_request, EmbeddingRequest):
            pooling = self._settings.pooling
            response = await self._answers.embed(api_request, request.receive, pooling)
        elif isinstance(api_request, MessagesRequest | ResponsesRequest):
            chat = _as_chat(api_request)
            response = await self._answers.answer(chat, request.receive, _builder(api_request))
        else:
            (prompt,) = await self._prompts.token_ids(_as_chat(api_request))
            response = JSONResponse({"input_tokens": len(prompt)})
        if ignored:
            response.headers["X-Ignored-Fields"] = self._ignored_names(ignored)
        return response

    def _ignored_names(self, paths: list[str]) -> str:
        """The names of ignored fields for a header; those that are new are logged."""
        # What a client sends may be anything; a header may not.
        names = sorted({re.sub(r"\[\d+\]", "", path) for path in paths})
        names = [name for name in names if re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII)]
        for name in names[:_MAX_IGNORED]:
            if name not in self._ignored and len(self._ignored) < _MAX_LOGGED:
                self._ignored.add(name)
                logger.warning("clients send '%s', which has no effect here", name)
        return ", ".join(names[:_MAX_IGNORED])
