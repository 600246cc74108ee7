"""From the body of an HTTP request to a validated request, without blocking the event loop for long."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from layerstream.tools.serving.errors import ApiError
from layerstream.tools.serving.protocol import NOT_BUILT, AnyRequest

__all__ = ["read_request"]

# Time for a body, since a client might send it byte by byte.
_BODY_SECONDS = 60
# Lists, objects and names in a body, each of which costs time and memory, however short it is. Two thousand
# messages with a part each have 14 000; a megabyte of "[]," would have 350 000, and take half a second.
_MAX_NODES = 16_384
# Further mistakes are ignored: describing each takes microseconds.
_MAX_MISTAKES = 100


async def read_request(
    request: Request,
    kind: type[AnyRequest],
    *,
    max_bytes: int,
    in_thread: Callable[..., Awaitable[AnyRequest]],
) -> AnyRequest:
    """Read and validate the body of ``request``; ``in_thread`` calls a function off the event loop.

    Raises:
        ApiError: It is too long, too slow, not JSON, or has wrong parameters.
    """
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            body = await _body(request, max_bytes=max_bytes)
    except TimeoutError:
        raise ApiError(
            408, f"The request's body did not come within {_BODY_SECONDS} s.", code="timeout"
        ) from None
    return await in_thread(_asked, body, kind)


async def _body(request: Request, *, max_bytes: int) -> bytes:
    body = bytearray()
    nbytes = int(request.headers.get("content-length", 0))
    try:
        if nbytes <= max_bytes:
            async for chunk in request.stream():
                body += chunk
                if (nbytes := len(body)) > max_bytes:
                    break
    except ClientDisconnect:
        raise ApiError(
            499, "The client has left."
        ) from None  # for the log: the client does not get it
    if nbytes > max_bytes:
        # uvicorn reads and drops the rest: a client whose upload is cut off might not see the answer.
        raise ApiError(
            413,
            f"The request's body is longer than the {max_bytes} bytes that this server takes.",
            code="request_too_large",
        )
    return bytes(body)


def _asked(body: bytes, kind: type[AnyRequest]) -> AnyRequest:
    given = _decoded(body)
    for name in NOT_BUILT.keys() & given.keys():
        value = given.pop(name)
        if not any(value == each and type(value) is type(each) for each in NOT_BUILT[name]):
            raise ApiError(
                400,
                f"Unsupported parameter: '{name}' is not supported by this server.",
                param=name,
                code="unsupported_parameter",
            )
    unknown = next((name for name in given if name not in kind.model_fields), None)
    if unknown is not None:
        raise _unrecognized(unknown)
    try:
        asked = kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(error, given, kind) from None
    asked.check()
    return asked


def _decoded(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``, without fields that are null."""
    if _nodes(body) > _MAX_NODES:
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


def _nodes(body: bytes) -> int:
    """How many lists, objects and names are in a body of JSON."""
    count = _marks(body)
    if count <= _MAX_NODES:
        return count
    # Marks inside strings count too.
    return _marks(b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]))


def _marks(body: bytes) -> int:
    return sum(map(body.count, (b"[", b"{", b":")))


def _unrecognized(path: str) -> ApiError:
    message = f"Unrecognized request argument supplied: {path}"
    return ApiError(400, message, param=path, code="unknown_parameter")


def _refusal(error: ValidationError, body: Mapping[str, Any], kind: type[BaseModel]) -> ApiError:
    """A description of the first mistake in ``body``."""
    if error.error_count() > _MAX_MISTAKES:
        return ApiError(
            400, f"The request has {error.error_count()} invalid values.", code="invalid_value"
        )
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(first["loc"][0])
    path = _path(first["loc"], body)
    if first["type"] == "extra_forbidden":
        return _unrecognized(path)
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return ApiError(
            400,
            f"Missing required parameter: '{name}'.",
            param=name,
            code="missing_required_parameter",
        )
    wanted = kind.model_fields[name].description
    return ApiError(
        400,
        f"Invalid value for '{path}': {name} must be {wanted}.",
        param=path,
        code="invalid_value",
    )


def _path(location: Sequence[int | str], body: Any) -> str:
    """The place of an error in ``body``, such as messages[0].role, without the names of a union's types."""
    path, here = "", body
    for part in location:
        if isinstance(part, str) and isinstance(here, dict) and part in here:
            path += f".{part}" if path else part
        elif isinstance(part, int) and isinstance(here, list) and part < len(here):
            path += f"[{part}]"
        else:
            continue
        here = here[part]
    return path or str(location[0])
