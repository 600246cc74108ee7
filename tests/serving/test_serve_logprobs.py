"""`layerstream serve`: log probabilities are those of the model as transformers runs it."""

from typing import Any

import pytest
import torch
from support.service import COMPLETIONS, GREEDY, MESSAGES, Reference

openai = pytest.importorskip("openai", reason="needs layerstream[test]")
pytest.importorskip("httpx2", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")


def expected(reference: Reference, ids: list[int]) -> torch.Tensor:
    """The log probabilities of all tokens after each of ``ids``."""
    with torch.no_grad():
        return reference.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("stream", [False, True])
def test_the_tokens_of_a_chat_have_their_log_probabilities(
    stream: bool, client: Any, reference: Reference
) -> None:
    options = {"messages": MESSAGES, "max_tokens": 8, "logprobs": True, "top_logprobs": 3}
    done = client.chat.completions.create(**options, **GREEDY, stream=stream)
    chunks = list(done) if stream else [done]
    tokens = [
        each
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for each in choice.logprobs.content
    ]
    prompt = reference.tokenizer(reference.chat(MESSAGES)).input_ids
    answer = reference.ids(reference.chat(MESSAGES), 8)
    rows = expected(reference, prompt + answer)[len(prompt) - 1 : -1]
    assert [each.token for each in tokens] == [reference.tokenizer.decode([t]) for t in answer]
    for each, row, token in zip(tokens, rows, answer, strict=True):
        assert each.logprob == pytest.approx(float(row[token]), abs=1e-4)
        values, ids = row.topk(3)
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(
            values.tolist(), abs=1e-4
        )
        assert each.top_logprobs[0].token == reference.tokenizer.decode([int(ids[0])])
        assert each.bytes in (list(each.token.encode()), None)


def test_sampled_tokens_have_the_probabilities_of_the_model_itself(
    client: Any, reference: Reference
) -> None:
    done = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=4, temperature=1.9, seed=3, logprobs=0
    )
    logprobs = done.choices[0].logprobs
    torch.manual_seed(3)
    answer = reference.ids("Hello", 4, do_sample=True, temperature=1.9, top_k=0)
    rows = expected(reference, [*b"Hello", *answer])[4:-1]
    values = [float(row[token]) for row, token in zip(rows, answer, strict=True)]
    assert logprobs.token_logprobs == pytest.approx(values, abs=1e-4)
    assert logprobs.top_logprobs == [{}] * 4


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_echo_has_the_log_probabilities_of_the_prompt(
    max_tokens: int, client: Any, reference: Reference
) -> None:
    """As evaluation harnesses ask: ``lm_eval`` with local-completions sends lists of ids, and one more token."""
    prompts = [list(b"Hello there"), list(b"The quick brown fox")]
    done = client.completions.create(
        prompt=prompts, max_tokens=max_tokens, logprobs=1, echo=True, **GREEDY
    )
    assert done.usage.completion_tokens == 2 * max_tokens
    for choice, prompt in zip(done.choices, prompts, strict=True):
        text = bytes(prompt).decode()
        answer = reference.ids(text, max_tokens) if max_tokens else []
        assert choice.text == text + reference.tokenizer.decode(answer)
        rows = expected(reference, prompt + answer)
        following = (prompt + answer)[1:]
        values = [float(row[token]) for row, token in zip(rows, following, strict=False)]
        logprobs = choice.logprobs
        assert logprobs.token_logprobs[0] is None
        assert logprobs.token_logprobs[1:] == pytest.approx(values, abs=1e-4)
        # Whether a token was the likeliest one is told by the names, which so have to agree.
        greedy = [max(top, key=top.get) for top in logprobs.top_logprobs[1:]]
        assert [name == token for name, token in zip(greedy, logprobs.tokens[1:], strict=True)] == [
            int(row.argmax()) == token for row, token in zip(rows, following, strict=False)
        ]
        assert logprobs.text_offset[: len(prompt)] == list(range(len(prompt)))


def test_echo_alone_is_the_prompt_before_the_answer(http: Any, reference: Reference) -> None:
    body = {"prompt": "Hello", "max_tokens": 3, "echo": True, **GREEDY}
    answer = http.post(COMPLETIONS, json=body).json()["choices"][0]
    assert answer["text"] == "Hello" + reference.text("Hello", 3)
    assert answer["logprobs"] is None
    answer = http.post(COMPLETIONS, json=body | {"max_tokens": 0}).json()["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == ("Hello", "length")


def test_the_prompt_and_one_more_token_take_one_pass(http: Any) -> None:
    from support.service import gauge

    before = gauge(http, "layerstream_passes_total")
    body = {"prompt": "Hello", "max_tokens": 1, "echo": True, "logprobs": 1, **GREEDY}
    assert http.post(COMPLETIONS, json=body).status_code == 200
    assert gauge(http, "layerstream_passes_total") == before + 1
