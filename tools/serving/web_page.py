"""The page at ``/``: a chat, and beside it what the machine does. Files of this package, nothing of other hosts."""

from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from layerstream.tools.serving.errors import ApiError

__all__ = ["page_file", "page_index"]

_FOLDER = Path(__file__).parent / "page"
_INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # Scripts, styles and requests of this origin only; nothing inline, so that no text of a model becomes any of them.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # another version of the service may have other files
}


@cache
def _files() -> dict[str, bytes]:
    """The contents of the page's files by their names."""
    return {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _TYPES}


def _response(name: str) -> Response:
    headers = {**_HEADERS, "Content-Type": _TYPES[Path(name).suffix]}
    return Response(_files()[name], headers=headers)


async def page_index() -> Response:
    """Return the page itself."""
    return _response(_INDEX)


async def page_file(name: str, request: Request) -> Response:
    """Return a file that the page needs."""
    if name not in _files():
        raise ApiError(404, f"Unknown request URL: GET {request.url.path}", code="unknown_url")
    return _response(name)
