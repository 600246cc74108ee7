"""A model that is dropped without being closed is closed, by the garbage collector; nothing is left of it."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.leaks import nothing_left_behind, our_threads
from support.loop import run, turns
from support.models import inputs_for, save_model
from support.streaming import bits_equal

from layerstream.pipeline import StreamedModel, load_streamed

OPTIONS: dict[str, Any] = {"device": "cpu", "measure": False, "reader": "direct"}
KINDS = ["llama", "qwen3-moe", "t5"]
SECONDS = 15  # until it counts as never


@pytest.fixture(autouse=True)
def _no_warning(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """No warning, also none of a task that was destroyed or a file that was not closed."""
    warnings.simplefilter("always")
    gc.collect()
    recwarn.clear()
    yield
    gc.collect()
    ours = [each for each in recwarn if issubclass(each.category, ResourceWarning | RuntimeWarning)]
    assert ours == [], [str(each.message) for each in ours]


def threads_end() -> None:
    """Wait until all our threads, and those of the loop's own executor, have ended."""
    until = time.monotonic() + SECONDS
    for thread in threading.enumerate():
        while thread.name.startswith(("layerstream", "asyncio")) and thread.is_alive():
            gc.collect()  # again: an exception and its frames may be found before what they refer to
            thread.join(0.1)
            assert time.monotonic() < until, thread.name


def used(model: Any, kind: str) -> Any:
    """What a call of ``model`` gives, after a generation."""
    inputs = inputs_for(kind)
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return model(**inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_drop_in_that_is_dropped_is_closed(kind: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", kind)
    with nothing_left_behind():
        model = load_streamed(folder, **OPTIONS)
        used(model, kind)
        thread = threading.Thread(target=used, args=(model, kind))
        thread.start()
        thread.join()
        assert our_threads()
        del model, thread
        threads_end()


def test_a_drop_in_that_failed_and_was_edited_is_closed_when_it_is_dropped(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    with nothing_left_behind():
        model = load_streamed(folder, **OPTIONS)
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[1_000_000]]))
        model.model.norm.weight.data = torch.ones(model.model.norm.weight.shape)
        used(model, "llama")
        del model
        threads_end()


def test_a_part_that_is_kept_keeps_the_model_open(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")
    with nothing_left_behind():
        model = load_streamed(folder, **OPTIONS)
        expected = model.model(**inputs).last_hidden_state
        part = model.model
        del model
        gc.collect()
        assert bits_equal(part(**inputs).last_hidden_state, expected)
        del part
        threads_end()


def test_a_closed_drop_in_keeps_no_thread(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    model = load_streamed(folder, **OPTIONS)
    before = {each.name for each in threading.enumerate()}
    assert any(name.startswith("layerstream") for name in before)
    model.close()
    left = [each.name for each in threading.enumerate()]
    assert not [name for name in left if name.startswith(("layerstream", "asyncio"))], left


def test_a_streamed_model_that_is_dropped_is_closed_while_its_loop_goes_on(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")

    async def main() -> None:
        model = StreamedModel.open(folder, **OPTIONS)
        await model.__aenter__()
        await model.generate(**inputs, max_new_tokens=3)
        await asyncio.to_thread(model.module, **inputs)
        del model
        gc.collect()
        async with asyncio.timeout(SECONDS):
            while our_threads():
                await turns()
        with nothing_left_behind():  # of what the next one takes
            async with StreamedModel.open(folder, **OPTIONS) as model:
                await model.generate(**inputs, max_new_tokens=3)

    with nothing_left_behind():
        run(main())


EXITS = {
    "open": "",
    "dropped": "del model; gc.collect()",
    "dropped in a cycle": "model.itself = model; del model",
}


@pytest.mark.parametrize("last", EXITS.values(), ids=EXITS)
def test_an_interpreter_that_exits_says_nothing(last: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    program = (
        "import gc, sys, torch\n"
        "from layerstream.pipeline import load_streamed\n"
        "model = load_streamed(sys.argv[1], device='cpu', measure=False)\n"
        "model(input_ids=torch.tensor([[3, 4]]))\n" + last
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
