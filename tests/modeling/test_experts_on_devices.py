"""Experts on demand on a GPU, with a stand-in: cells on both sides, and results as of whole parameters."""

import asyncio
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.gpus import StandIn
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import CASES, save_model
from support.selection import covering
from support.streaming import SMALL, bits_equal
from torch.utils._python_dispatch import TorchDispatchMode

from layerstream.pipeline import Budget, PlanError, StreamedModel
from layerstream.pipeline.modeling.expert_banks import Inputs, grouped_products
from layerstream.stages.experts.expert_copies import ExpertCopies

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
SETTINGS = {
    "qwen3-moe": {"num_experts": 8},
    "mixtral": {"num_local_experts": 8},
    "gpt-oss": {"num_local_experts": 8},
}


def prompt(seed: int = 1, tokens: int = 12) -> torch.Tensor:
    return torch.randint(3, 100, (1, tokens), generator=torch.Generator().manual_seed(seed))


async def needed_bytes(folder: Path, **budget: Any) -> int:
    """The least budget with which the model opens."""
    with pytest.raises(PlanError) as refused:
        async with StreamedModel.open(
            folder, device="auto", workload=SMALL, budget=Budget(**budget), layer_batch_size=1
        ):
            pass
    assert refused.value.needed_bytes is not None
    return refused.value.needed_bytes


async def tight(folder: Path, *, more: int = 0, **options: Any) -> StreamedModel:
    """The model with the least memory on both sides, and ``more`` of each."""
    host = await needed_bytes(folder, host=1 << 20, vram="512MiB")
    vram = await needed_bytes(folder, host=host, vram=1 << 20)
    return StreamedModel.open(
        folder,
        device="auto",
        workload=SMALL,
        budget=Budget(host=host + more, vram=vram + more),
        layer_batch_size=1,
        **options,
    )


@covering(
    case=list(SETTINGS),
    dtype=[torch.float32, torch.bfloat16],
    setting=[(None, 0), ("eager", 30_000), (None, 30_000)],
)
def test_a_model_computes_what_transformers_computes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    dtype: torch.dtype,
    setting: tuple[str | None, int],
) -> None:
    StandIn(monkeypatch)
    implementation, more = setting
    folder = save_model(tmp_path / "model", case, dtype, **SETTINGS[case])
    options = {} if implementation is None else {"experts_implementation": implementation}
    whole = getattr(transformers, CASES[case].model).from_pretrained(folder, **options)
    logits = whole(input_ids=prompt()).logits.detach()
    tokens = whole.generate(prompt(), **GREEDY)

    async def main() -> None:
        async with await tight(folder, more=more, **options) as model:
            plan = model.plan
            assert plan.device_memory is not None
            assert plan.experts
            assert plan.device_memory.expert_bytes
            assert plan.host_memory.expert_bytes
            for cells in ("cells", "device_cells"):
                assert sum(getattr(each, cells) - each.experts for each in plan.experts) < 0
            assert bits_equal((await model.forward(input_ids=prompt())).logits, logits)
            assert torch.equal(await model.generate(input_ids=prompt(), **GREEDY), tokens)
            counts = model.timings().experts
            assert counts is not None
            assert counts.wanted > counts.hits
            assert counts.read_bytes

    with nothing_left_behind():
        run(main())


def test_requests_at_the_same_time_and_cancelled_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StandIn(monkeypatch)
    folder = save_model(tmp_path / "model", "qwen3-moe", torch.bfloat16, num_experts=8)
    whole = transformers.Qwen3MoeForCausalLM.from_pretrained(folder)
    seeds = range(5)
    expected = [whole.generate(prompt(seed), **GREEDY) for seed in seeds]

    async def main() -> None:
        async with await tight(folder) as model:

            async def cancelled(number: int) -> None:
                stream = model.stream(input_ids=prompt(9), max_new_tokens=50, do_sample=False)
                for _ in range(number):
                    await anext(stream)
                await stream.aclose()

            generated, _ = await asyncio.gather(
                asyncio.gather(*(model.generate(input_ids=prompt(n), **GREEDY) for n in seeds)),
                asyncio.gather(*(cancelled(number) for number in range(1, 5))),
            )
            for got, tokens in zip(generated, expected, strict=True):
                assert torch.equal(got, tokens)

    with nothing_left_behind():
        run(main())


def test_an_expert_that_is_on_the_device_is_neither_read_nor_copied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StandIn(monkeypatch)
    folder = save_model(tmp_path / "model", "mixtral", num_local_experts=8)
    # What is read ahead may not be needed at all.
    monkeypatch.setattr("layerstream.stages.experts.store._CERTAIN", 2.0)
    copied: list[int] = []
    copy = ExpertCopies._copy

    def counting(self: Any, cell: Any, set_index: int, expert: int) -> None:
        copied.append(expert)
        copy(self, cell, set_index, expert)

    monkeypatch.setattr(ExpertCopies, "_copy", counting)

    async def main() -> None:
        async with StreamedModel.open(
            folder, device="auto", workload=SMALL, budget=Budget(host="256MiB", vram="512MiB")
        ) as model:
            assert all(each.device_cells == each.experts for each in model.plan.experts)
            assert not any(
                each.cells for each in model.plan.experts
            )  # they only pass through there
            await model.forward(input_ids=prompt())
            first = len(copied)
            await model.forward(input_ids=prompt())
            assert first == len(copied) > 0

    run(main())


def test_copies_for_a_product_are_gone_before_the_next_ones_are_made() -> None:
    alive: list[int] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.index.Tensor:
                alive.append(1)
                weakref.finalize(result.untyped_storage(), alive.pop)
                assert len(alive) == 1
            return result

    inputs = Inputs(places=[0, 1, 2], counts=[1, 1, 1], rows=torch.randn(3, 64).bfloat16())
    with Copies():
        grouped_products(
            torch.randn(3, 32, 64).bfloat16(), inputs, is_transposed=False, copied_bytes=1
        )
    assert not alive


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("copied_bytes", [1, 1 << 20], ids=["one by one", "together"])
def test_grouped_products_are_those_of_all_experts(is_transposed: bool, copied_bytes: int) -> None:
    matrices = torch.randn(16, 32, 64).to(torch.bfloat16)
    places, counts = [9, 2, 15], [1, 3, 2]
    rows = torch.randn(6, 32 if is_transposed else 64).to(torch.bfloat16)
    inputs = Inputs(places=places, counts=counts, rows=rows)
    got = grouped_products(matrices, inputs, is_transposed=is_transposed, copied_bytes=copied_bytes)
    of_each = zip(places, torch.split(rows, counts), strict=True)
    expected = [
        part @ (matrices[place] if is_transposed else matrices[place].T) for place, part in of_each
    ]
    assert torch.equal(got, torch.cat(expected))
