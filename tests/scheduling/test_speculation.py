"""More tokens per sweep: prompt lookup and assistants, on a model whose greedy text really repeats itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.leaks import nothing_left_behind
from support.loop import run
from support.reciting import CIRCLE, recited, save_reciting_model
from support.streaming import open_streaming

from layerstream.pipeline import Stats, StreamedModel, Workload

NEW = 48
PROMPT = recited(2 * CIRCLE)
GREEDY = {"input_ids": PROMPT, "max_new_tokens": NEW, "do_sample": False}


async def generated(folder: Path, **options: Any) -> tuple[torch.Tensor, Stats, int]:
    """The tokens, the model's statistics, and how many sweeps its pipeline made."""
    workload = Workload(prompt_tokens=2 * CIRCLE, new_tokens=2 * NEW)
    async with await open_streaming(folder, reader="direct", workload=workload) as model:
        routes = record_routes(model)
        tokens = await model.generate(**GREEDY, **options)
        return tokens, model.stats(), len(routes)


def record_routes(model: StreamedModel) -> list[Any]:
    """A list to which the route of each sweep is appended from now on."""
    routes: list[Any] = []
    sweep = model._running.stream.pipeline.sweep

    def recorded_sweep(route: Any) -> Any:
        routes.append(route)
        return sweep(route)

    model._running.stream.pipeline.sweep = recorded_sweep  # type: ignore[method-assign]
    return routes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reciting_model(tmp_path_factory.mktemp("speculation") / "model")


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    """The result of greedy decoding: the circle again and again."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    tokens: torch.Tensor = model.generate(**GREEDY)
    assert torch.equal(tokens, recited(2 * CIRCLE + NEW))
    return tokens


def test_greedy_decoding_takes_a_sweep_for_each_token(folder: Path, expected: torch.Tensor) -> None:
    tokens, stats, sweeps = run(generated(folder))
    assert torch.equal(tokens, expected)
    assert sweeps == stats.sweeps == stats.tokens_generated == NEW
    assert stats.tokens_per_sweep == 1


def test_prompt_lookup_gives_the_same_tokens_in_far_fewer_sweeps(
    folder: Path, expected: torch.Tensor
) -> None:
    _, plain, _ = run(generated(folder))
    with nothing_left_behind():
        tokens, stats, sweeps = run(generated(folder, prompt_lookup_num_tokens=5))
    assert torch.equal(tokens, expected)
    assert sweeps == stats.sweeps
    assert stats.tokens_generated == NEW
    # Five that were looked up, and the one that follows them.
    assert NEW / sweeps == stats.tokens_per_sweep > 4
    # All bytes read count; some were read ahead for a sweep that was never made.
    assert stats.bytes_read < plain.bytes_read / 3


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_an_assistant_changes_the_sweeps_and_never_the_tokens(
    right: bool, folder: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    """The assistant is another model: smaller, with other weights, and in one case with other predictions."""
    save_reciting_model(tmp_path / "assistant", seed=1, hidden_size=48, num_hidden_layers=1)
    assistant = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "assistant")
    if not right:
        with torch.no_grad():
            assistant.lm_head.weight.copy_(assistant.lm_head.weight.roll(1, dims=0))
    with nothing_left_behind():
        tokens, stats, sweeps = run(generated(folder, assistant_model=assistant))
    assert torch.equal(tokens, expected)
    assert sweeps == stats.sweeps
    assert stats.tokens_generated == NEW
    if right:
        assert stats.tokens_per_sweep > 3
    else:
        assert stats.tokens_per_sweep == 1
