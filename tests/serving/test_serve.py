"""`layerstream serve`: a real process answers the real openai client over real sockets."""

import asyncio
from typing import Any

import pytest
import torch
from support.loop import run
from support.server import Server
from support.service import COMPLETIONS, GREEDY, KEY, MESSAGES, PROMPTS, Reference, events

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
openai = pytest.importorskip("openai", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_completion_is_the_greedy_text_of_the_unstreamed_model(
    prompt: str, client: Any, reference: Reference
) -> None:
    done = client.completions.create(prompt=prompt, max_tokens=24, **GREEDY)
    assert done.object == "text_completion"
    assert done.choices[0].text == reference.text(prompt, 24)
    assert done.choices[0].finish_reason == reference.finish_reason(prompt, 24)
    tokens = len(prompt.encode()), len(reference.ids(prompt, 24))
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == tokens
    assert done.usage.total_tokens == sum(tokens)


def test_a_chat_is_the_greedy_text_after_the_models_template(
    client: Any, reference: Reference
) -> None:
    done = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=24, **GREEDY)
    prompt = reference.chat(MESSAGES)
    assert done.object == "chat.completion"
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].message.content == reference.text(prompt, 24)
    assert done.usage.prompt_tokens == len(prompt)


def test_message_parts_and_the_developer_role_are_supported(
    client: Any, reference: Reference
) -> None:
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
    messages = [{"role": "developer", "content": parts}, MESSAGES[1]]
    done = client.chat.completions.create(messages=messages, max_tokens=9, **GREEDY)
    prompt = reference.chat([{"role": "system", "content": "Be\nbrief."}, MESSAGES[1]])
    assert done.choices[0].message.content == reference.text(prompt, 9)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_streamed_completion_joined_is_the_whole_text(
    prompt: str, client: Any, reference: Reference
) -> None:
    chunks = list(client.completions.create(prompt=prompt, max_tokens=24, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == reference.text(prompt, 24)
    ends = [None, reference.finish_reason(prompt, 24)]
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == ends
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_chat_begins_with_the_role_and_ends_with_the_usage(
    client: Any, reference: Reference
) -> None:
    *chunks, last = client.chat.completions.create(
        messages=MESSAGES,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    prompt = reference.chat(MESSAGES)
    assert "".join(pieces) == reference.text(prompt, 24)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt), 24)


def test_a_stream_comes_piece_by_piece_and_ends_with_done(http: Any) -> None:
    body = {"prompt": "Hello", "max_tokens": 4, "stream": True, **GREEDY}
    answer = http.post(COMPLETIONS, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(answer.text)
    assert done == "data: [DONE]"
    assert len(chunks) > 3
    assert all("usage" not in each for each in chunks)


def test_prompts_are_a_text_several_texts_token_ids_or_lists_of_them(
    client: Any, reference: Reference
) -> None:
    ids = [list(prompt.encode()) for prompt in PROMPTS[:2]]
    for prompt in (PROMPTS[:2], ids, ids[0]):
        done = client.completions.create(prompt=prompt, max_tokens=9, **GREEDY)
        expected = [reference.text(each, 9) for each in PROMPTS[: len(done.choices)]]
        assert [choice.text for choice in done.choices] == expected
        assert [choice.index for choice in done.choices] == list(range(len(expected)))
        assert done.usage.completion_tokens == 9 * len(expected)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_and_no_part_of_it_is_sent(
    stream: bool, client: Any, reference: Reference
) -> None:
    text = reference.text("Hello", 24)
    stop = text[5:9]
    assert text.find(stop) == 5
    options = {"prompt": "Hello", "max_tokens": 24, "stop": ["never", stop], "stream": stream}
    done = client.completions.create(**options, **GREEDY)
    chunks = list(done) if stream else [done]
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[:5]
    assert chunks[-1].choices[0].finish_reason == "stop"
    # The mere beginning of a stop string is text.
    options["stop"] = text[-3:] + "never"
    done = client.completions.create(**options, **GREEDY)
    chunks = list(done) if stream else [done]
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_sampled_tokens_are_those_of_transformers_with_the_same_seed(
    client: Any, reference: Reference
) -> None:
    def expected(seed: int) -> list[int]:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": 1.9, "top_p": 0.95, "top_k": 0}
        return reference.ids("Hello", 24, **sampling)

    end = reference.tokenizer.eos_token_id
    ending = next(seed for seed in range(1000) if expected(seed)[-1] == end)
    for seed in (0, ending):
        done = client.completions.create(
            model="tiny", prompt="Hello", max_tokens=24, temperature=1.9, top_p=0.95, seed=seed, n=2
        )
        for choice in done.choices:
            ids = expected(seed + choice.index)
            assert choice.text == reference.tokenizer.decode(ids, skip_special_tokens=True)
            assert choice.finish_reason == ("stop" if ids[-1] == end else "length")


def test_penalties_change_the_text_by_openais_formula(client: Any, reference: Reference) -> None:
    plain = reference.ids("Hello", 24)
    done = client.completions.create(
        prompt="Hello", max_tokens=24, presence_penalty=2, frequency_penalty=2, **GREEDY
    )
    ids, counted = list(b"Hello"), [0] * 259
    for _ in range(24):
        with torch.no_grad():
            scores = reference.model(torch.tensor([ids])).logits[0, -1]
        counts = torch.tensor(counted)
        ids.append(int((scores - 2 * counts - 2 * (counts > 0)).argmax()))
        counted[ids[-1]] += 1
    assert ids[5:] != plain
    assert done.choices[0].text == reference.tokenizer.decode(ids[5:], skip_special_tokens=True)


def test_eight_concurrent_clients_each_get_their_own_text(
    server: Server, reference: Reference
) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=KEY, max_retries=0
        ) as client:

            async def complete(prompt: str) -> str:
                stream = await client.completions.create(
                    prompt=prompt, max_tokens=32, stream=True, **GREEDY
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            texts = await asyncio.gather(*map(complete, PROMPTS))
        assert texts == [reference.text(prompt, 32) for prompt in PROMPTS]

    run(main())


def test_the_model_is_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")
