"""`layerstream serve`: answers that take longer than clients and proxies usually wait for a byte."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.loop import run
from support.server import Server, running_server, save_chat_model, wait_until
from support.service import CHAT, COMPLETIONS, GREEDY, HOST, MEMORY, MESSAGES, Reference, events

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
openai = pytest.importorskip("openai", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")

# A token takes some 2 s: the model has 8 MiB, of which some are resident.
SLOW = ("--host", HOST, *MEMORY, "--throttle", "3MiB", "--served-model-name", "tiny")
PATIENCE_SECONDS = 1.2
KEEP_ALIVE = ("--keep-alive-seconds", "0.2")
TOKENS = 3


@pytest.fixture(scope="module")
def slow(folder: Path) -> Iterator[Server]:
    """A server whose disk takes seconds for each token."""
    with running_server(folder, *SLOW, *KEEP_ALIVE, "--max-answers", "2") as server:
        yield server


def test_the_official_client_gets_answers_that_take_longer_than_its_read_timeout(
    slow: Server, reference: Reference
) -> None:
    options = {"messages": MESSAGES, "max_tokens": TOKENS, **GREEDY}

    async def main() -> list[str]:
        timeout = openai.Timeout(60, read=PATIENCE_SECONDS)
        async with openai.AsyncOpenAI(
            base_url=f"{slow.url}/v1", api_key="x", max_retries=0, timeout=timeout
        ) as client:

            async def whole() -> str:
                done = await client.chat.completions.create(**options)
                return done.choices[0].message.content

            async def streamed() -> str:
                chunks = await client.chat.completions.create(**options, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            return await asyncio.gather(whole(), streamed())

    texts = run(main())
    assert texts == [reference.text(reference.chat(MESSAGES), TOKENS)] * 2


def test_a_stream_begins_with_the_role_and_says_how_far_it_is(slow: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": TOKENS, "stream": True, **GREEDY}
    with httpx.Client(base_url=slow.url, timeout=60) as http:
        answer = http.post(CHAT, json=body)
    lines = [line for line in answer.text.split("\n\n") if line]
    first, *rest = lines
    delta = json.loads(first.removeprefix("data: "))["choices"][0]["delta"]
    assert delta == {"role": "assistant", "content": ""}
    comments = [line for line in rest if line.startswith(":")]
    pattern = r": sweep (\d) of 3, (\d+ s to the|the) (first|next) token( is \d+ s late)?"
    found = [re.fullmatch(pattern, comment) for comment in comments]
    assert all(found), comments
    assert {match[1] for match in found if match} == {"1", "2", "3"}
    assert {match[3] for match in found if match} == {"first", "next"}
    rest = [line for line in lines if not line.startswith(":")]
    assert events("\n\n".join(rest) + "\n\n")[-1] == "data: [DONE]"


def test_an_answer_in_one_piece_is_json_after_blanks(slow: Server) -> None:
    body = {"prompt": "Hello", "max_tokens": 1, **GREEDY}
    with httpx.Client(base_url=slow.url, timeout=60) as http:
        answer = http.post(COMPLETIONS, json=body)
    assert answer.headers["content-type"] == "application/json"
    assert answer.text.startswith(" ")
    assert answer.json()["usage"]["completion_tokens"] == 1


def test_the_time_after_which_to_retry_is_that_of_the_tokens_that_are_left(slow: Server) -> None:
    with httpx.Client(base_url=slow.url, timeout=60) as http:
        body = {"prompt": "Hello", "n": 2, "stream": True, "max_tokens": 100, **GREEDY}
        with http.stream("POST", COMPLETIONS, json=body) as long:
            assert long.status_code == 200  # now its limits are known
            answer = http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1, **GREEDY})
            assert answer.status_code == 429
            # A hundred tokens of seconds each; one that is almost free would be ready within five.
            assert int(answer.headers["retry-after"]) > 20
            assert f"{answer.headers['retry-after']} s" in answer.json()["error"]["message"]


def test_a_failure_after_the_first_blank_breaks_the_connection(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "model")
    with (
        running_server(folder, *SLOW, *KEEP_ALIVE) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        body = {"prompt": "Hello", "max_tokens": 500, **GREEDY}
        with http.stream("POST", COMPLETIONS, json=body) as answer:
            assert answer.status_code == 200
            with (folder / "model.safetensors").open("r+b") as file:
                file.truncate(5000)
            with pytest.raises(httpx.RemoteProtocolError):
                answer.read()
        wait_until(lambda: http.get("/health").status_code == 503)
        # Later requests fail before anything is sent, and get a status of their own.
        with pytest.raises(openai.InternalServerError):
            client.completions.create(**body)
        assert http.post(COMPLETIONS, json=body | {"stream": True}).status_code in {500, 503}
