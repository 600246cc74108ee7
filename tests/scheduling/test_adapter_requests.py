"""Requests with different adapters run at once, on one sequence of sweeps, and within the budget."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="adapters need PEFT")

from support.adapters import load_with_peft, lora, save_adapter
from support.loop import run
from support.models import CASES, save_model

from layerstream.pipeline import Budget, ModelError, PlanError, StreamedModel, Workload

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

MIB = 1 << 20
PROMPT = torch.tensor([[5, 9, 11, 3, 7]])
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
LARGE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6}
SETTINGS: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {"r": 2, "target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "c": {"r": 6, "modules_to_save": ["lm_head"], "target_modules": ["o_proj"]},
}


def opened(folder: Path, adapters: dict[str, Path], *, host: int, **options: Any) -> StreamedModel:
    return StreamedModel.open(
        folder,
        adapters=adapters,
        device="cpu",
        measure=False,
        reader="direct",
        layer_batch_size=1,
        budget=Budget(host=host),
        workload=Workload(batch_size=4, prompt_tokens=8, new_tokens=8),
        **options,
    )


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma3", "qwen3-moe"])
def test_concurrent_requests_each_have_their_own_adapter(case: str, tmp_path: Path) -> None:
    import transformers

    model_class = getattr(transformers, CASES[case].model)
    base = save_model(tmp_path / "model", case)
    adapters, expected = {}, {}
    settings = {name: dict(each) for name, each in SETTINGS.items()}
    if case == "qwen3-moe":  # whose experts are no linear layers
        settings["a"] = {"target_modules": ["q_proj", "k_proj", "o_proj"]}
    for name, each in settings.items():
        adapters[name] = save_adapter(
            base, tmp_path / name, lora(**each), model_class=model_class, seed=ord(name)
        )
        alone = load_with_peft(base, adapters[name], model_class=model_class)
        expected[name] = alone.generate(input_ids=PROMPT, **GREEDY)[0].tolist()
    plain = model_class.from_pretrained(base)
    wanted = [*expected.items(), (None, plain.generate(PROMPT, **GREEDY)[0].tolist())]

    async def scenario() -> None:
        async with opened(base, adapters, host=64 * MIB) as model:
            results = await asyncio.gather(
                *(
                    model.generate(input_ids=PROMPT, adapter=name, **GREEDY)
                    for name, _ in wanted * 2
                )
            )
            assert [made[0].tolist() for made in results] == [ids for _, ids in wanted * 2]
            stats = model.stats()
            assert stats.passes > 2 * stats.sweeps  # of eight requests
            made = [token async for token in model.stream(input_ids=PROMPT, adapter="b", **GREEDY)]
            assert made == expected["b"][PROMPT.shape[1] :]
            with pytest.raises(
                ModelError, match="there is no adapter 'd'; this model has 'a', 'b'"
            ):
                await model.generate(input_ids=PROMPT, adapter="d", **GREEDY)
            with pytest.raises(ModelError, match="there is no adapter 'd'"):
                model.check(input_ids=PROMPT, adapter="d", **GREEDY)

    run(scenario(), seconds=100)


def test_adapters_count_in_the_budget_and_layers_make_room_for_them(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    base = save_model(tmp_path / "model", **LARGE)
    adapter = save_adapter(base, tmp_path / "lora", lora(r=128), model_class=LlamaForCausalLM)
    size = (adapter / "adapter_model.safetensors").stat().st_size
    host = 96 * MIB

    async def plan_with(adapters: dict[str, Path]) -> Any:
        async with opened(base, adapters, host=host) as model:
            await model.generate(input_ids=PROMPT, adapter=next(iter(adapters), None), **GREEDY)
            memory = model.plan.host_memory
            assert memory.used_bytes <= host
            resident = sum(p.nbytes for n, p in model.module.named_parameters() if "lora_" in n)
            assert resident == memory.adapter_bytes
            assert model.stats().reservable_bytes <= host - memory.taken_bytes
            replanned = await model.replan(budget=Budget(host=host - 8 * MIB))
            assert replanned.host_memory.adapter_bytes == memory.adapter_bytes
            return model.plan

    without = run(plan_with({}), seconds=100)
    with_one = run(plan_with({"one": adapter}), seconds=100)
    with_two = run(plan_with({"one": adapter, "two": adapter}), seconds=100)
    assert without.host_memory.adapter_bytes == 0
    assert 0.9 * size < with_one.host_memory.adapter_bytes <= size
    assert with_two.host_memory.adapter_bytes == 2 * with_one.host_memory.adapter_bytes
    assert with_two.host_memory.resident_bytes < without.host_memory.resident_bytes
    assert "adapters" in with_one.describe()
    with pytest.raises(PlanError):
        run(plan_with({str(number): adapter for number in range(12)}), seconds=100)
