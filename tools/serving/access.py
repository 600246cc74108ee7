"""Which pages of a browser may use the service: by host, origin and type of content.

A browser sends what a page wants to every address, a service on this machine included. Pages of other origins are kept from
starting generations by their "Origin", and those whose own name an attacker's DNS points to this machine by their "Host".
"""

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from layerstream.tools.serving.errors import ApiError

__all__ = ["LOOPBACK_HOSTS", "AccessControl"]

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

# Browsers ask again after this time.
_PREFLIGHT_SECONDS = 600
_EXPOSED = "Retry-After, X-Request-Id"


class AccessControl:
    """Middleware that refuses requests of other hosts and origins, and bodies that are not said to be JSON.

    Args:
        app: The app.
        hosts: Names by which clients may address the service; None for any.
        origins: Origins whose pages may use it, such as "https://example.org"; "*" is any.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: frozenset[str] | None, origins: frozenset[str]
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._origins = {origin.lower().rstrip("/") for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin", "")
        allowed = self._allows_origin(origin)
        preflight = (
            scope["method"] == "OPTIONS" and "access-control-request-method" in headers and allowed
        )
        app: ASGIApp = self._app
        if (error := self._refusal(scope["method"], headers)) is not None:
            app = JSONResponse(error.body, error.status)
        elif preflight:
            app = _preflight(headers)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer["Access-Control-Allow-Origin"] = origin
                answer["Access-Control-Expose-Headers"] = _EXPOSED
                answer.add_vary_header("Origin")
            await send(message)

        await app(scope, receive, send_with_headers if allowed else send)

    def _allows_origin(self, origin: str) -> bool:
        """Whether pages of ``origin`` are in the list."""
        return bool(origin) and ("*" in self._origins or origin.lower() in self._origins)

    def _refusal(self, method: str, headers: Headers) -> ApiError | None:
        """The error of a request that is not allowed."""
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if host and not self._allows_host(host):
            return ApiError(
                403,
                f"This service is not for the host '{host}'; start it with --allow-host {_name(host)}.",
                code="host_not_allowed",
            )
        # OPTIONS starts nothing; without its headers a browser goes no further.
        if origin and method != "OPTIONS":
            own = urlsplit(origin).netloc.lower() == host.lower()
            if not own and not self._allows_origin(origin):
                return ApiError(
                    403,
                    f"Pages of '{origin}' may not use this service; start it with --allow-origin {origin}.",
                    code="origin_not_allowed",
                )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            return ApiError(
                415,
                f"The body of a request must be JSON, with 'Content-Type: application/json', not '{kind}'.",
                code="unsupported_media_type",
            )
        return None

    def _allows_host(self, host: str) -> bool:
        name = _name(host)
        # Names below "localhost" are this machine by definition (RFC 6761).
        return self._hosts is None or name in self._hosts or name.endswith(".localhost")


def _name(host: str) -> str:
    """The name in a Host header, without its port and brackets."""
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal():
        name = host
    return name.strip("[]").rstrip(".").lower()


def _preflight(headers: Headers) -> Response:
    """The answer to a browser that asks what a page may send."""
    return Response(
        None,
        204,
        {
            "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
            "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "*"),
            "Access-Control-Allow-Private-Network": "true",
            "Access-Control-Max-Age": str(_PREFLIGHT_SECONDS),
            "Vary": "Access-Control-Request-Headers",
        },
    )
