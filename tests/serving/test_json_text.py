"""Large JSON, which is made piece by piece."""

import asyncio
import json
import sys
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.loop import run

from layerstream.tools.serving import json_text as module
from layerstream.tools.serving.json_text import json_in_thread, json_text
from layerstream.tools.serving.loop_lag import LoopLag, prompt_loop

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=40,
)


@given(VALUES)
def test_pieces_are_the_same_json(value: Any) -> None:
    assert run(json_in_thread(value)) == json_text(value)


def test_long_lists_are_the_same_json() -> None:
    for count in (255, 256, 257, 513):
        value = {"data": [{"embedding": [index / 7 for index in range(count)]}] * 3}
        assert run(json_in_thread(value)) == json_text(value)


def test_no_piece_of_a_large_answer_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    threads = set[str]()

    def recorded(content: Any) -> str:
        text = json.dumps(content)
        lengths.append(len(text))
        threads.add(threading.current_thread().name)
        return text

    monkeypatch.setattr(module, "json_text", recorded)
    token = {"token": "a", "logprob": -1.5, "bytes": [97]}
    tokens = [token | {"top_logprobs": [token] * 20} for _ in range(3000)]
    body = {"choices": [{"logprobs": {"content": tokens, "refusal": None}}], "id": "a"}
    assert json.loads(run(json_in_thread(body))) == body
    assert max(lengths) < 2000
    assert threading.main_thread().name not in threads


def test_threads_give_the_interpreter_to_the_loop_sooner_while_it_serves() -> None:
    before = sys.getswitchinterval()
    with prompt_loop():
        assert sys.getswitchinterval() < before / 5
    assert sys.getswitchinterval() == before


def test_the_lag_of_a_loop_that_is_held_is_measured_and_nothing_is_left() -> None:
    async def hold() -> None:
        late = asyncio.Event()
        # The loop is held from before the end of the first sleep, of 5 ms, to long after it.
        lag = LoopLag(lambda seconds: late.set() if seconds > 0.05 else None)
        with lag.measured(), lag.measured():
            await asyncio.sleep(0)
            before = time.monotonic()
            while time.monotonic() < before + 0.1:
                pass
            await late.wait()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(hold())
