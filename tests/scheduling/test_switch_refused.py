"""A switch to another plan for which the pipeline is opened anew, and cannot be."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import save_model

from layerstream.pipeline import Budget, DeviceError, StreamedModel, Workload
from layerstream.pipeline.weight_stream import WeightStream

IDS = torch.arange(5, 13)[None]
GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}


def test_the_old_plan_stays_and_requests_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    folder = save_model(tmp_path / "model", "llama", **settings)
    expected = transformers.LlamaForCausalLM.from_pretrained(folder).generate(IDS, **GREEDY)
    opened = WeightStream.open

    async def refused(stream: WeightStream) -> None:
        monkeypatch.setattr(WeightStream, "open", opened)
        await opened(stream)
        raise DeviceError("there is no memory left")

    async def main() -> None:
        budget, workload = Budget(host="256MiB"), Workload(prompt_tokens=16, new_tokens=8)
        async with StreamedModel.open(
            folder, device="cpu", reader="direct", budget=budget, workload=workload
        ) as model:
            before = model.plan
            assert not before.host_arena_bytes  # all layers are resident
            monkeypatch.setattr(WeightStream, "open", refused)
            with pytest.raises(DeviceError, match="no memory left"):
                await model.replan(budget=Budget(host="48MiB"))
            assert model.plan is before
            assert torch.equal(await model.generate(IDS, **GREEDY), expected)
            assert (await model.replan(budget=Budget(host="48MiB"))).host_arena_bytes
            assert torch.equal(await model.generate(IDS, **GREEDY), expected)

    with nothing_left_behind():
        run(main())
