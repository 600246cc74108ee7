"""`layerstream serve`: the responses API of the official client, and Anthropic's messages."""

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from support.server import Server, running_server
from support.service import GREEDY, KEY, MESSAGES, Reference
from support.tool_model import CALL, REASONING, TEXT, save_tool_model

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
openai = pytest.importorskip("openai", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")

PARAMETERS = {"type": "object", "properties": {"at": {"type": "string"}}}
TOOL = {"type": "function", "name": "look", "description": "Looks.", "parameters": PARAMETERS}
ANTHROPIC_TOOL = {"name": "look", "description": "Looks.", "input_schema": PARAMETERS}
ASKED = [{"role": "user", "content": "What is there?"}]


@pytest.fixture(scope="module")
def tools_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = save_tool_model(tmp_path_factory.mktemp("tools") / "model")
    with running_server(model, "--served-model-name", "tiny") as server:
        yield server


@pytest.fixture
def tools_client(tools_server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{tools_server.url}/v1", api_key="x", max_retries=0) as client:
        yield client


# -- responses ---------------------------------------------------------------------------------------


def test_a_response_is_the_text_of_a_chat(client: Any, reference: Reference) -> None:
    options = {"instructions": "Be brief.", "input": "Hello", "max_output_tokens": 16, **GREEDY}
    expected = reference.text(reference.chat(MESSAGES), 16)
    done = client.responses.create(**options)
    assert done.output_text == expected
    assert (done.status, done.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert done.usage.input_tokens == len(reference.chat(MESSAGES))
    assert done.usage.output_tokens == 16
    events = list(client.responses.create(**options, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == expected


def test_a_response_streams_reasoning_text_and_calls_as_items(tools_client: Any) -> None:
    with tools_client.responses.stream(
        input=ASKED, tools=[TOOL], max_output_tokens=40, **GREEDY
    ) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_response()
    whole = tools_client.responses.create(input=ASKED, tools=[TOOL], max_output_tokens=40, **GREEDY)
    for done in (streamed, whole):
        reasoning, text, call = done.output
        assert reasoning.content[0].text == REASONING
        assert text.content[0].text == TEXT
        assert (call.type, call.name) == ("function_call", CALL["name"])
        assert json.loads(call.arguments) == CALL["arguments"]
        assert done.status == "completed"
    # As agents go on: with all that they got, and what the tool has answered.
    output = {
        "type": "function_call_output",
        "call_id": whole.output[2].call_id,
        "output": "Water.",
    }
    again = tools_client.responses.create(
        input=[*ASKED, *whole.output, output], tools=[TOOL], max_output_tokens=40, **GREEDY
    )
    assert again.output_text == TEXT
    assert again.usage.input_tokens > whole.usage.input_tokens + len("Water.")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type"),
        ({"truncation": "auto"}, "truncation"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"temperature": "hot"}, "temperature"),
    ],
)
def test_what_a_response_cannot_have_is_refused_by_name(
    more: dict[str, Any], param: str, http: Any
) -> None:
    answer = http.post("/v1/responses", json={"model": "tiny", "input": "Hello", **more})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


# -- messages ----------------------------------------------------------------------------------------


def named_events(text: str) -> list[Any]:
    """The events of a stream, whose names are their types."""
    parsed = []
    for each in text.removesuffix("\n\n").split("\n\n"):
        name, data = each.split("\n")
        parsed.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {parsed[-1]['type']}"
    return parsed


def test_a_message_is_the_text_of_a_chat(server: Server, reference: Reference) -> None:
    body = {"model": "tiny", "system": "Be brief.", "max_tokens": 16, "temperature": 0}
    body["messages"] = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    expected = reference.text(reference.chat(MESSAGES), 16)
    with httpx.Client(base_url=server.url, headers={"x-api-key": KEY}, timeout=60) as http:
        answer = http.post("/v1/messages", json=body).json()
        assert answer["content"] == [{"type": "text", "text": expected}]
        assert (answer["type"], answer["role"]) == ("message", "assistant")
        assert answer["stop_reason"] == "max_tokens"
        prompt_tokens = len(reference.chat(MESSAGES))
        assert answer["usage"] == {"input_tokens": prompt_tokens, "output_tokens": 16}
        stop = {"stop_sequences": [expected[3:6]]}
        answer = http.post("/v1/messages", json=body | stop).json()
        assert answer["stop_reason"] == "stop_sequence"
        assert answer["stop_sequence"] == expected[3:6]


def test_a_message_streams_thinking_text_and_use_of_tools_as_blocks(tools_server: Server) -> None:
    body = {"model": "tiny", "messages": ASKED, "max_tokens": 40, "tools": [ANTHROPIC_TOOL]}
    body["temperature"] = 0
    with httpx.Client(base_url=tools_server.url, timeout=60) as http:
        whole = http.post("/v1/messages", json=body).json()
        thinking, text, use = whole["content"]
        assert (thinking["thinking"], text["text"]) == (REASONING, TEXT)
        assert (use["name"], use["input"]) == (CALL["name"], CALL["arguments"])
        assert whole["stop_reason"] == "tool_use"
        events = named_events(http.post("/v1/messages", json=body | {"stream": True}).text)
        kinds = [event["type"] for event in events]
        assert kinds[0] == "message_start"
        assert kinds[-2:] == ["message_delta", "message_stop"]
        assert events[-2]["delta"]["stop_reason"] == "tool_use"
        starts = [e["content_block"] for e in events if e["type"] == "content_block_start"]
        assert [start["type"] for start in starts] == ["thinking", "text", "tool_use"]
        joined = ["", "", ""]
        for event in events:
            if event["type"] == "content_block_delta":
                text = [value for name, value in event["delta"].items() if name != "type"]
                joined[event["index"]] += text[0]
        assert joined[:2] == [REASONING, TEXT]
        assert json.loads(joined[2]) == CALL["arguments"]
        result = {"type": "tool_result", "tool_use_id": use["id"], "content": "Water."}
        messages = [
            *ASKED,
            {"role": "assistant", "content": whole["content"]},
            {"role": "user", "content": [result]},
        ]
        again = http.post("/v1/messages", json=body | {"messages": messages}).json()
        assert again["content"][1]["text"] == TEXT
        assert again["usage"]["input_tokens"] > whole["usage"]["input_tokens"] + len("Water.")


def test_a_message_that_is_refused_gets_anthropics_error(http: Any) -> None:
    body = {"model": "tiny", "messages": MESSAGES[1:], "max_tokens": 4}
    image = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    for wrong in ({"messages": image}, {"tool_choice": {"type": "any"}}, {"max_tokens": 0}):
        answer = http.post("/v1/messages", json=body | wrong)
        assert answer.status_code == 400
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == "invalid_request_error"
    answer = http.post("/v1/messages", json=body | {"thinking": {"type": "enabled"}})
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "thinking"


def test_a_wrong_key_of_anthropics_kind_is_refused(server: Server) -> None:
    body = {"model": "tiny", "messages": MESSAGES[1:], "max_tokens": 4}
    with httpx.Client(base_url=server.url, headers={"x-api-key": "wrong"}) as http:
        answer = http.post("/v1/messages", json=body)
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "authentication_error"


def test_the_tokens_of_a_message_are_counted_without_an_answer(
    http: Any, reference: Reference
) -> None:
    body = {"model": "tiny", "system": "Be brief.", "messages": MESSAGES[1:]}
    answer = http.post("/v1/messages/count_tokens", json=body)
    assert answer.json() == {"input_tokens": len(reference.chat(MESSAGES))}
    for wrong in ({"messages": []}, {"model": "another"}, {"tool_choice": {"type": "any"}}):
        answer = http.post("/v1/messages/count_tokens", json=body | wrong)
        assert answer.status_code in {400, 404}
        assert answer.json()["type"] == "error"


@pytest.mark.parametrize(
    ("path", "kind"), [("/v1/messages/batches", "not_found_error"), ("/v1/responses/resp_1", None)]
)
def test_paths_that_are_not_there_are_told_in_the_form_of_their_api(
    path: str, kind: str | None, http: Any
) -> None:
    answer = http.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"
    assert kind is None or (answer.json()["type"], answer.json()["error"]["type"]) == (
        "error",
        kind,
    )


def test_models_are_listed_for_anthropics_client_too(http: Any) -> None:
    listed = http.get("/v1/models").json()
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == ("tiny", "tiny", False)
    (model,) = listed["data"]
    assert (model["type"], model["display_name"]) == ("model", "tiny")
    assert datetime.fromisoformat(model["created_at"]).timestamp() == model["created"]
