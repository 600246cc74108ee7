"""A small hub on loopback."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["COMMIT", "Hub", "HubHandler"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The parts of the hub that a download requests; ``failure`` is (status, X-Error-Code)."""

    def __init__(self, files):
        self.files = files
        self.info_failure = self.file_failure = None
        self.requests = []
        super().__init__(("127.0.0.1", 0), HubHandler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.command, self.path))
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/name/tree/"):
            self.respond(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                    for name, content in self.server.files.items()
                ]
            )
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            info = {"id": "org/name", "sha": COMMIT, "siblings": siblings}
            self.respond(info, self.server.info_failure)
        else:
            name = path.partition(f"/{COMMIT}/")[2] or path.rpartition("/")[2]
            self.respond(self.server.files[name], self.server.file_failure)

    do_HEAD = do_GET  # noqa: N815 the name that the server looks for

    def respond(self, content, failure=None):
        status, code = failure or (200, "")
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        body = b"" if failure else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_etag(body)}"')
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def _etag(content):
    return hashlib.sha1(content).hexdigest()  # noqa: S324 as git names its blobs
