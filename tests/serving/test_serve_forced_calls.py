"""`layerstream serve`: answers that have to be calls of tools, and what agents ask for besides."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.server import Server, running_server
from support.tool_model import AFTER, CALL, TEXT, save_agent_model

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")
pytest.importorskip("transformers.utils.chat_parsing", reason="needs a newer transformers")

from layerstream.tools.serving.answer_parser import (  # noqa: E402
    AnswerParser,
    call_opening,
    find_response_template,
)

SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}}
ASKED = [{"role": "user", "content": "What is there?"}]
FORCED = {"name": "look", "arguments": {"at": "the moon"}}
OPTIONS: dict[str, Any] = {"model": "model", "temperature": 0}


def function(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **more}}


TOOLS = [function("look"), function("listen")]
NAMED = {"type": "function", "function": {"name": "look"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_agent_model(tmp_path_factory.mktemp("forced") / "model", {}, forced=FORCED)


@pytest.fixture(scope="module")
def agent(folder: Path) -> Iterator[Server]:
    with running_server(folder) as server:
        yield server


@pytest.fixture
def http(agent: Server) -> Iterator[Any]:
    with httpx.Client(base_url=agent.url, timeout=60) as http:
        yield http


def chat(http: Any, **body: Any) -> Any:
    answer = http.post("/v1/chat/completions", json={"messages": ASKED, **OPTIONS, **body})
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_that_is_asked_for_is_all_of_the_answer(
    choice: Any, http: Any, folder: Path
) -> None:
    done = chat(http, tools=TOOLS, tool_choice=choice).json()
    message = done["choices"][0]["message"]
    assert message["content"] is None
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == FORCED["name"]
    assert json.loads(call["function"]["arguments"]) == FORCED["arguments"]
    assert done["choices"][0]["finish_reason"] == "tool_calls"
    # Of the tools, a model is told of the one that is named alone.
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    told = TOOLS if choice == "required" else TOOLS[:1]
    for each in told:
        each["function"]["description"] = ""
    text = tokenizer.apply_chat_template(
        ASKED, tools=told, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(f"{text}<tool_call>", add_special_tokens=False).input_ids
    assert done["usage"]["prompt_tokens"] == len(ids)


def test_a_stream_begins_with_the_call(http: Any) -> None:
    lines = chat(http, tools=TOOLS, tool_choice="required", stream=True).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["function"]["name"] for call in calls] == [FORCED["name"]]
    assert "".join(delta.get("content", "") for delta in deltas) == ""


def test_the_other_apis_can_ask_for_a_call(http: Any) -> None:
    tools = [{"type": "function", "name": "look", "parameters": SCHEMA}]
    body = {**OPTIONS, "input": "What is there?", "tools": tools}
    for choice in ("required", {"type": "function", "name": "look"}):
        done = http.post("/v1/responses", json=body | {"tool_choice": choice}).json()
        assert [item["type"] for item in done["output"]] == ["function_call"]
        assert json.loads(done["output"][0]["arguments"]) == FORCED["arguments"]
    body = {**OPTIONS, "messages": ASKED, "max_tokens": 20}
    body["tools"] = [{"name": "look", "input_schema": SCHEMA}]
    for choice in ({"type": "any"}, {"type": "tool", "name": "look"}):
        done = http.post("/v1/messages", json=body | {"tool_choice": choice}).json()
        assert [block["type"] for block in done["content"]] == ["tool_use"]
        assert done["content"][0]["input"] == FORCED["arguments"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"tool_choice": "required"}),
        ("/v1/chat/completions", {"tool_choice": NAMED, "tools": TOOLS[1:]}),
        ("/v1/chat/completions", {"tool_choice": "sometimes", "tools": TOOLS}),
        ("/v1/messages", {"tool_choice": {"type": "any"}, "max_tokens": 4}),
        ("/v1/messages", {"tool_choice": {"type": "sometimes"}, "max_tokens": 4}),
    ],
)
def test_a_call_of_no_tool_is_refused(path: str, body: dict[str, Any], http: Any) -> None:
    answer = http.post(path, json={"messages": ASKED, **OPTIONS, **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice")


def test_an_answer_may_end_with_its_first_call(http: Any) -> None:
    both = [chat(http, tools=TOOLS, parallel_tool_calls=each).json() for each in (True, False)]
    # The token that ends the answer is not made any more.
    counts = [done["usage"]["completion_tokens"] for done in both]
    assert counts == [counts[1] + 1, counts[1]]
    for done in both:
        message = done["choices"][0]["message"]
        assert message["content"] == TEXT
        assert [call["function"]["name"] for call in message["tool_calls"]] == [CALL["name"]]
        assert done["choices"][0]["finish_reason"] == "tool_calls"


def test_strict_arguments_are_taken_and_named_as_without_effect(http: Any) -> None:
    answer = chat(http, tools=[function("look", strict=True)])
    assert answer.headers["x-ignored-fields"] == "tools.function.strict"
    assert "x-ignored-fields" not in chat(http, tools=[function("look", strict=False)]).headers


def test_tools_that_only_openai_has_are_left_out_beside_others(http: Any) -> None:
    tool = {"type": "function", "name": "look", "parameters": SCHEMA}
    body = {**OPTIONS, "input": "What is there?", "tools": [tool]}
    plain = http.post("/v1/responses", json=body)
    hosted = [{"type": "web_search", "external_web_access": True}, {"type": "namespace"}]
    answer = http.post("/v1/responses", json=body | {"tools": [*hosted, tool]})
    assert answer.json()["usage"] == plain.json()["usage"]
    assert answer.headers["x-ignored-fields"] == "tools.external_web_access, tools.type"
    answer = http.post("/v1/responses", json=body | {"tools": hosted})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools[0].type")


def test_an_agent_ends_after_its_call(http: Any) -> None:
    message = chat(http, tools=TOOLS).json()["choices"][0]["message"]
    answer = {"role": "tool", "tool_call_id": "a", "content": "Water."}
    done = chat(http, tools=TOOLS, messages=[*ASKED, message, answer]).json()
    assert done["choices"][0]["message"]["content"] == AFTER
    assert done["choices"][0]["finish_reason"] == "stop"


class Module:
    """As much of a model as its response template is found by."""

    def __init__(self, family: str) -> None:
        self.config = transformers.PretrainedConfig()
        self.config.model_type = family


@pytest.mark.parametrize(
    ("family", "prefix", "rest"),
    [
        (
            "qwen3",
            "<|im_start|>assistant\n",
            '{"name": "look", "arguments": {"at": "a"}}</tool_call>',
        ),
        (
            "qwen3_5",
            "<|im_start|>assistant\n<think>\n",
            "look>\n<parameter=at>\na\n</parameter>\n</function>\n</tool_call>",
        ),
        (
            "qwen3_5",
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "look>\n<parameter=at>\na\n</parameter>\n</function>\n</tool_call>",
        ),
        ("gemma4", "<|turn>model\n", 'look{at:<|"|>a<|"|>}<tool_call|>'),
    ],
)
def test_the_calls_of_families_are_opened_by_their_own_marks(
    family: str, prefix: str, rest: str
) -> None:
    template = find_response_template(object(), Module(family), None)
    opening = call_opening(template, prefix)
    assert opening is not None
    parser = AnswerParser(template, prefix=prefix + opening, tools=TOOLS)
    calls = [*parser.add(rest).calls, *parser.finish().calls]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("look", {"at": "a"})]
