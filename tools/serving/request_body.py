"""Reads and validates the body of an HTTP request without blocking the event loop for long."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from layerstream.tools.serving.errors import STOPPED, ApiError
from layerstream.tools.serving.messages import RequestModel
from layerstream.tools.serving.protocol import AnyRequest
from layerstream.tools.serving.unsupported import UNSUPPORTED

__all__ = ["parse_request", "read_request"]

# Time limit for a body, since a client might send it byte by byte.
_BODY_SECONDS = 60
# Limit for lists, objects and names in a body: each costs time and memory, however short it is. Two thousand
# messages with a part each have 14 000; a megabyte of "[]," would have 350 000, and take half a second.
_MAX_NODES = 16_384
# Above this, errors are only counted: describing each takes microseconds.
_MAX_DESCRIBED_ERRORS = 100


async def read_request(
    request: Request,
    kind: type[AnyRequest],
    *,
    max_bytes: int,
    stopping: asyncio.Event,
    in_thread: Callable[..., Awaitable[tuple[AnyRequest, list[str]]]],
    strict: bool = False,
) -> tuple[AnyRequest, list[str]]:
    """Read and validate the body of ``request``; ``in_thread`` calls a function off the event loop.

    When ``stopping`` is set, the server is shutting down, and no longer waits for the rest of a body.

    Returns:
        The request, and the paths of fields that were ignored, since no server that we know of gives them a meaning.

    Raises:
        ApiError: It is too long, too slow, not JSON, has wrong parameters, or if ``strict`` unknown ones.
    """
    body = asyncio.create_task(_read_body(request, max_bytes=max_bytes))
    stopped = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait(
            [body, stopped], timeout=_BODY_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        # What has ended stays as it is.
        body.cancel()
        stopped.cancel()
    if body.done():
        return await in_thread(_parse, body.result(), kind, strict)
    if stopping.is_set():
        raise ApiError(503, STOPPED)
    raise ApiError(
        408, f"The request's body did not come within {_BODY_SECONDS} s.", code="timeout"
    )


async def _read_body(request: Request, *, max_bytes: int) -> bytes:
    body = bytearray()
    nbytes = int(request.headers.get("content-length", 0))
    try:
        if nbytes <= max_bytes:
            async for chunk in request.stream():
                body += chunk
                if (nbytes := len(body)) > max_bytes:
                    break
    except ClientDisconnect:
        # For the log: the client does not get it.
        raise ApiError(499, "The client has left.") from None
    if nbytes > max_bytes:
        # uvicorn reads and drops the rest: a client whose upload is cut off might not read the response.
        raise ApiError(
            413,
            f"The request's body is longer than the {max_bytes} bytes that this server takes.",
            code="request_too_large",
        )
    return bytes(body)


def _parse(body: bytes, kind: type[AnyRequest], strict: bool) -> tuple[AnyRequest, list[str]]:
    return parse_request(_decode(body), kind, strict=strict)


def parse_request(
    fields: dict[str, Any], kind: type[AnyRequest], *, strict: bool = False
) -> tuple[AnyRequest, list[str]]:
    """Validate the fields of a request, and tell which were ignored; see ``read_request``.

    Raises:
        ApiError: There are wrong parameters, or if ``strict`` unknown ones.
    """
    for name in [each for each in fields if each in UNSUPPORTED.keys() - kind.model_fields.keys()]:
        value = fields.pop(name)
        if not any(value == each and type(value) is type(each) for each in UNSUPPORTED[name]):
            raise ApiError(
                400,
                f"Unsupported parameter: '{name}' is not supported by this server.",
                param=name,
                code="unsupported_parameter",
            )
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _validation_error(error, fields, kind) from None
    request.check()
    ignored = list(_unknown_fields(fields, request))
    if strict and ignored:
        message = f"Unrecognized request argument supplied: {ignored[0]}"
        raise ApiError(400, message, param=ignored[0], code="unknown_parameter")
    return request, ignored


def _unknown_fields(raw: Any, parsed: Any, path: str = "") -> Iterator[str]:
    """The paths of fields in ``raw`` that ``parsed``, made from it, does not have, or that have no effect."""
    if isinstance(parsed, RequestModel) and isinstance(raw, dict):
        without_effect = frozenset(parsed.without_effect())
        for name, value in raw.items():
            inner = f"{path}.{name}" if path else name
            if name in without_effect:
                yield inner
            if name in type(parsed).model_fields:
                yield from _unknown_fields(value, getattr(parsed, name), inner)
            elif value is not None:
                yield inner
    elif isinstance(parsed, list) and isinstance(raw, list):
        for index, (value, each) in enumerate(zip(raw, parsed, strict=True)):
            yield from _unknown_fields(value, each, f"{path}[{index}]")


def _decode(body: bytes) -> dict[str, Any]:
    """Parse the JSON object in ``body``; drops fields that are null."""
    if _count_nodes(body) > _MAX_NODES:
        raise ApiError(
            400,
            f"The body of a request may have {_MAX_NODES} lists, objects and names in it, and not more.",
            code="invalid_json",
        )
    try:
        # This parser accepts no lone surrogates, and at most two hundred nested lists.
        decoded = from_json(body, cache_strings="keys")
    except ValueError as error:
        raise ApiError(
            400, f"We could not parse the JSON body of your request: {error}", code="invalid_json"
        ) from None
    if not isinstance(decoded, dict):
        raise ApiError(400, "The body of a request must be a JSON object.", code="invalid_json")
    return {name: value for name, value in decoded.items() if value is not None}


def _count_nodes(body: bytes) -> int:
    """Count the lists, objects and names in a body of JSON."""
    count = _count_marks(body)
    if count <= _MAX_NODES:
        return count
    # Strings may contain such characters too; count again without strings.
    return _count_marks(b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]))


def _count_marks(body: bytes) -> int:
    return sum(map(body.count, (b"[", b"{", b":")))


def _validation_error(
    error: ValidationError, body: Mapping[str, Any], kind: type[BaseModel]
) -> ApiError:
    """Describe the first error in ``body``."""
    if error.error_count() > _MAX_DESCRIBED_ERRORS:
        return ApiError(
            400, f"The request has {error.error_count()} invalid values.", code="invalid_value"
        )
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(first["loc"][0])
    path = _error_path(first["loc"], body)
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return ApiError(
            400,
            f"Missing required parameter: '{name}'.",
            param=name,
            code="missing_required_parameter",
        )
    expected = kind.model_fields[name].description
    return ApiError(
        400,
        f"Invalid value for '{path}': {name} must be {expected}.",
        param=path,
        code="invalid_value",
    )


def _error_path(location: Sequence[int | str], body: Any) -> str:
    """The path of an error in ``body``, such as messages[0].role, without the names of a union's types."""
    path, node = "", body
    for part in location:
        if isinstance(part, str) and isinstance(node, dict) and part in node:
            path += f".{part}" if path else part
        elif isinstance(part, int) and isinstance(node, list) and part < len(node):
            path += f"[{part}]"
        else:
            continue
        node = node[part]
    return path or str(location[0])
