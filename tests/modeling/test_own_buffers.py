"""Buffers that a pass writes to: each request has its own, whatever their size."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import save_model
from support.streaming import bits_equal

from layerstream.pipeline import Budget, StreamedModel, Workload, load_streamed
from layerstream.pipeline.modeling.own_buffers import OwnBuffers

MIB = 1 << 20
OPTIONS = {"device": "cpu", "budget": Budget(host="64MiB"), "layer_batch_size": 1}


class _Scratch(transformers.LlamaForCausalLM):
    """Computes through a buffer that it overwrites at the beginning, and reads at the end."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("scratch", torch.zeros(2 * MIB // 4), persistent=False)

    def writes(self, _: torch.Tensor) -> bool:
        return True

    def forward(self, input_ids: torch.Tensor, **named: Any) -> Any:
        count = input_ids.numel()
        if self.writes(input_ids):
            self.scratch[-count:] = input_ids.flatten()
        output = super().forward(input_ids, **named)
        output.logits = output.logits + self.scratch[-count:].view(*input_ids.shape, 1)
        return output


class _ScratchForLong(_Scratch):
    """Overwrites it for long prompts only, such as none is when the model is opened."""

    def writes(self, ids: torch.Tensor) -> bool:
        return ids.shape[-1] > 20


class _ScratchThroughView(_Scratch):
    """Overwrites it through a view that it keeps, as a cache of a fixed size does."""

    def writes(self, ids: torch.Tensor) -> bool:
        if ids.is_meta:
            return False
        self.kept = self.scratch.view(2, -1)
        self.kept[1, -ids.numel() :].copy_(ids.flatten())
        return False


class _ScratchTwice(_Scratch):
    """Has two such buffers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("second", torch.zeros(MIB), persistent=False)

    def forward(self, input_ids: torch.Tensor, **named: Any) -> Any:
        count = input_ids.numel()
        self.second[-count:] = 2 * input_ids.flatten()
        output = super().forward(input_ids, **named)
        output.logits = output.logits + self.second[-count:].view(*input_ids.shape, 1)
        return output


KINDS = [_Scratch, _ScratchForLong, _ScratchThroughView, _ScratchTwice]


def prompts(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 100, (1, 30), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_concurrent_requests_have_the_results_that_each_has_alone(
    kind: type[Any], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama", num_hidden_layers=4)
    reference = kind.from_pretrained(folder)
    with torch.no_grad():
        expected = [reference(ids).logits for ids in prompts(12)]

    async def main() -> None:
        async with StreamedModel.open(folder, model_class=kind, **OPTIONS) as model:
            for _ in range(3):
                found = await asyncio.gather(*(model.forward(ids) for ids in prompts(12)))
                assert all(map(bits_equal, expected, (each.logits for each in found)))

    with nothing_left_behind():
        run(main())


def test_a_buffer_that_a_pass_writes_to_is_in_the_price_of_a_request(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    workload = Workload(prompt_tokens=8, new_tokens=4)

    async def figures(kind: type[Any]) -> tuple[int, int]:
        options = {**OPTIONS, "workload": workload}
        async with StreamedModel.open(folder, model_class=kind, **options) as model:
            ids = torch.ones((1, 8), dtype=torch.long)
            await model.generate(ids, max_new_tokens=4)
            return model.plan.workload_bytes, model.check(ids, max_new_tokens=4)

    async def main() -> None:
        plain, priced = await figures(_ScratchForLong), await figures(_Scratch)
        assert priced[0] == plain[0] + 2 * MIB
        assert plain[1] + 2 * MIB <= priced[1] <= plain[1] + 2 * MIB + 1000

    run(main())


def test_a_buffer_that_the_user_has_changed_is_what_requests_compute_with(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    short = torch.tensor([[3, 4, 5]])
    reference = _ScratchForLong.from_pretrained(folder)
    with load_streamed(folder, model_class=_ScratchForLong, **OPTIONS) as model, torch.no_grad():
        for change in (
            lambda scratch, _: scratch.fill_(3),
            lambda _, owner: setattr(owner, "scratch", torch.full((MIB,), 5.0)),
        ):
            for each in (model, reference):
                change(each.scratch, each)
            tokens = reference.generate(short, max_new_tokens=2, output_logits=True, **KEPT)
            found = model.generate(short, max_new_tokens=2, output_logits=True, **KEPT)
            assert all(map(bits_equal, tokens.logits, found.logits))


KEPT = {"do_sample": False, "return_dict_in_generate": True}


def test_each_of_several_large_buffers_has_its_own_values_in_a_clone() -> None:
    root = torch.nn.Module()
    for number in range(4):
        root.register_buffer(f"table{number}", torch.full((MIB,), float(number))[5 * number :])
    values = [buffer.clone() for buffer in root.buffers()]
    buffers = OwnBuffers(root)
    clones = buffers.of_clone(root.buffers())
    try:
        for buffer, value in zip(root.buffers(), values, strict=True):
            assert bits_equal(clones[id(buffer)], value)
            clones[id(buffer)].fill_(9)
            assert bits_equal(buffer, value)
    finally:
        buffers.close()
