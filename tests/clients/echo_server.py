"""A server that answers everything with the prompt, in the forms that the real one has: no client's checks may pass."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["echo_server"]

_USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
_NEW_USAGE = {
    "input_tokens": 1,
    "input_tokens_details": {"cached_tokens": 0},
    "output_tokens": 1,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 2,
}


def _text(body: dict[str, Any]) -> str:
    """What a request says last."""
    said = body.get("messages") or body.get("input") or body.get("prompt") or ""
    while not isinstance(said, str):
        said = said[-1] if isinstance(said, list) else said.get("content") or said.get("text") or ""
    return said


def _chat(body: dict[str, Any]) -> tuple[Any, list[Any]]:
    head = {"id": "a", "created": 1, "model": body["model"]}
    message = {"role": "assistant", "content": _text(body)}
    choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
    whole = {**head, "object": "chat.completion", "usage": _USAGE}
    chunk = {**head, "object": "chat.completion.chunk", "usage": None}
    return (
        whole | {"choices": [{**choice, "message": message}]},
        [
            chunk | {"choices": [{**choice, "delta": message}]},
            chunk | {"choices": [], "usage": _USAGE},
        ],
    )


def _completion(body: dict[str, Any]) -> tuple[Any, list[Any]]:
    head = {"id": "a", "created": 1, "model": body["model"], "object": "text_completion"}
    prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
    logprobs = {
        "tokens": ["a"],
        "token_logprobs": [-1.0],
        "top_logprobs": [{"a": -1.0}],
        "text_offset": [0],
    }
    choices = [
        {"index": index, "text": str(prompt), "finish_reason": "stop", "logprobs": logprobs}
        for index, prompt in enumerate(prompts)
    ]
    whole = {**head, "choices": choices, "usage": _USAGE}
    return whole, [whole]


def _response(body: dict[str, Any]) -> tuple[Any, list[Any]]:
    part = {"type": "output_text", "text": _text(body), "annotations": []}
    item = {"id": "b", "type": "message", "role": "assistant", "status": "completed"}
    item["content"] = [part]  # type: ignore[assignment]
    more = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    head = {"id": "a", "object": "response", "created_at": 1, "model": body["model"], **more}
    begun = {**head, "status": "in_progress", "output": []}
    done = {**head, "status": "completed", "output": [item], "usage": _NEW_USAGE}
    place = {"item_id": "b", "output_index": 0, "content_index": 0}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": item | {"content": []}},
        {"type": "response.content_part.added", **place, "part": part | {"text": ""}},
        {"type": "response.output_text.delta", **place, "delta": part["text"], "logprobs": []},
        {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []},
        {"type": "response.content_part.done", **place, "part": part},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": done},
    ]
    return done, [event | {"sequence_number": number} for number, event in enumerate(events)]


def _message(body: dict[str, Any]) -> tuple[Any, list[Any]]:
    usage = {"input_tokens": 1, "output_tokens": 1}
    head = {"id": "a", "type": "message", "role": "assistant", "model": body["model"]}
    head |= {"stop_sequence": None, "usage": usage}
    stopped = {"stop_reason": "end_turn", "stop_sequence": None}
    block = {"type": "text", "text": _text(body)}
    empty = {"type": "text", "text": ""}
    delta = {"type": "text_delta", "text": block["text"]}
    return head | {"content": [block], **stopped}, [
        {"type": "message_start", "message": head | {"content": [], "stop_reason": None}},
        {"type": "content_block_start", "index": 0, "content_block": empty},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": stopped, "usage": {"output_tokens": 1}},
        {"type": "message_stop"},
    ]


def _embeddings(body: dict[str, Any]) -> tuple[Any, list[Any]]:
    inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
    # Four zero bytes are a number, too, for clients that ask for base64.
    vector = "AAAAAA==" if body.get("encoding_format") == "base64" else [0.0]
    data = [
        {"object": "embedding", "index": index, "embedding": vector} for index in range(len(inputs))
    ]
    return {"object": "list", "data": data, "model": body["model"], "usage": _USAGE}, []


_ANSWERS = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/responses": _response,
    "/v1/messages": _message,
    "/v1/embeddings": _embeddings,
    "/v1/messages/count_tokens": lambda _: ({"input_tokens": 1}, []),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        model = {"id": "tiny", "object": "model", "created": 1, "owned_by": "echo"}
        self._send("application/json", json.dumps({"object": "list", "data": [model]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        whole, events = _ANSWERS[self.path.partition("?")[0]](body)
        if not body.get("stream"):
            self._send("application/json", json.dumps(whole))
            return
        named = "".join(
            (f"event: {event['type']}\n" if "type" in event else "")
            + f"data: {json.dumps(event)}\n\n"
            for event in events
        )
        self._send("text/event-stream", f"{named}data: [DONE]\n\n")

    def _send(self, kind: str, content: str) -> None:
        data = content.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@contextmanager
def echo_server() -> Iterator[str]:
    """Run the server in a thread during the block; returns its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
