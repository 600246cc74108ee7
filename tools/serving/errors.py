"""Errors in the form of OpenAI's service."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from layerstream.pipeline import AdmissionError, ClosedError, LayerstreamError

__all__ = ["STOPPED", "ApiError", "api_error", "error_response"]

STOPPED = "The server is shutting down."

# Limit for quotes of a client's input, which may be a megabyte.
_QUOTED_CHARACTERS = 1000


# Anthropic's names for errors, by status; others are errors of the request, or of the server.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """Raised when a request is answered with an error.

    Attributes:
        status: The HTTP status.
        body: The response, ``{"error": {"message", "type", "param", "code"}}``.
        headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        message = _shortened(message)
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        kind = {429: "rate_limit_error"}.get(status) or (
            "invalid_request_error" if status < 500 else "server_error"  # noqa: PLR2004
        )
        param = param and _shortened(param)
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """The response in the form of Anthropic's API, with what OpenAI's tells besides."""
        otherwise = "invalid_request_error" if self.status < 500 else "api_error"  # noqa: PLR2004
        kind = {"type": _ANTHROPIC_TYPES.get(self.status, otherwise)}
        return {"type": "error", "error": self.body["error"] | kind}


def _shortened(text: str) -> str:
    text = text if len(text) <= _QUOTED_CHARACTERS else f"{text[:_QUOTED_CHARACTERS]} ..."
    # A path may contain half of a surrogate pair, which cannot be encoded.
    return text.encode("utf-8", "replace").decode()


def api_error(error: BaseException) -> ApiError:
    """Convert ``error`` into the error that the client gets."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AdmissionError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, LayerstreamError):
        status = 503 if isinstance(error, ClosedError) else 500
        return ApiError(status, f"The model failed: {error}", code=type(error).__name__)
    # Details of an internal error are for the log, not for the client.
    return ApiError(500, "The server had an error while it processed the request.")


async def error_response(request: Request, error: Exception) -> Response:
    """Handle an exception of the app: respond to a request that failed with ``error``."""
    status = getattr(error, "status_code", None)  # from starlette: no such path or method
    where = f"{request.method} {request.url.path}"
    if status == 404:  # noqa: PLR2004
        response = ApiError(404, f"Unknown request URL: {where}", code="unknown_url")
    elif status == 405 and request.method == "OPTIONS":  # noqa: PLR2004
        headers = getattr(error, "headers", None) or {}
        return Response(None, 204, {"Allow": f"{headers.get('Allow', '')}, OPTIONS"})
    elif status is not None:
        response = ApiError(status, f"Not allowed: {where}", code="method_not_supported")
    else:
        response = api_error(error)
    is_anthropic = request.url.path.startswith("/v1/messages")
    return JSONResponse(
        response.anthropic_body if is_anthropic else response.body,
        response.status,
        {**(getattr(error, "headers", None) or {}), **response.headers},
    )
