"""Files whose experts are not what the config says are refused in one sentence that names them."""

import asyncio
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.models import save_model
from support.streaming import SMALL

from layerstream.pipeline import Budget, ModelError, StreamedModel


def refused(folder: Path) -> str:
    async def main() -> None:
        async with StreamedModel.open(
            folder, device="cpu", workload=SMALL, reader="direct", budget=Budget(host="60MiB")
        ):
            pass

    with pytest.raises(ModelError) as caught:
        asyncio.run(main())
    return str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "unequal"])
def test_experts_that_do_not_fit_the_config_are_refused(tmp_path: Path, kind: str) -> None:
    folder = save_model(tmp_path / "model", "qwen3-moe", num_experts=8)
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    last = sorted(name for name in tensors if ".experts.7." in name)
    if kind == "missing":
        for name in last:
            del tensors[name]
    else:
        tensors[last[0]] = tensors[last[0]][:-8].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    message = refused(folder)
    assert "model.layers.0.mlp.experts.down_proj" in message
    assert "check that config.json belongs to these weights" in message
    if kind == "missing":
        assert "(8, " in message
        assert "(7, " in message
