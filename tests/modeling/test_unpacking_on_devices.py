"""Where no tiles are unpacked (on a GPU), transformers' own operations unpack whole weights, with equal bits."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.gguf_models import save_gguf_model
from support.gpus import StandIn
from support.loop import run
from support.models import CASES
from support.quantized import QUANTISERS, save_quantised
from support.streaming import bits_equal
from support.traced import trace

from layerstream.pipeline import Budget, StreamedModel
from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.config import config_of, resolve_model_class
from layerstream.pipeline.modeling.tracing import trace_model
from layerstream.pipeline.modeling.unpacking import Unpack

IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_kernels_have_the_bits_of_transformers_operations(tmp_path: Path, quantiser: str) -> None:
    case = "gpt-oss" if quantiser == "mxfp4" else "llama"
    folder = save_quantised(tmp_path / "model", case, quantiser)
    tensors = load_file(folder / "model.safetensors")
    unpacks = 0
    for recipe in trace(folder).recipes.values():
        for operation in recipe.operations:
            if isinstance(unpack := operation.function, Unpack):
                parts = [tensors[part.name] for part in operation.arguments[0]]
                assert bits_equal(unpack(*parts), unpack.on_device(*parts).to(unpack.dtype))
                unpacks += 1
    assert unpacks >= 4


@pytest.mark.parametrize("architecture", ["llama", "qwen35"])
def test_kernels_have_the_bits_of_transformers_operations_in_gguf(
    tmp_path: Path, architecture: str
) -> None:
    path = tmp_path / "model.gguf"
    save_gguf_model(path, architecture)
    checkpoint = Checkpoint.open(path)
    data = path.read_bytes()
    config, _ = config_of(checkpoint)
    traced = trace_model(checkpoint, config=config, model_class=resolve_model_class(config))
    unpacks = 0
    for recipe in traced.recipes.values():
        for operation in recipe.operations:
            if isinstance(unpack := operation.function, Unpack):
                info = checkpoint.tensors[operation.arguments[0][0].name]
                raw = bytearray(data[info.offset : info.offset + info.nbytes])
                part = torch.frombuffer(raw, dtype=torch.uint8).view(info.shape)
                assert bits_equal(unpack(part), unpack.on_device(part).view(unpack.shape))
                unpacks += 1
    assert unpacks >= 4


@pytest.mark.parametrize(
    ("case", "quantiser"), [("llama", "fp8-blocks"), ("qwen3-moe", "fp8-blocks")]
)
def test_a_gpu_gets_packed_bytes_and_unpacks_whole_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, quantiser: str
) -> None:
    folder = save_quantised(tmp_path / "model", case, quantiser)
    whole = getattr(transformers, CASES[case].model).from_pretrained(folder)
    with torch.no_grad():
        logits = whole(IDS).logits
    StandIn(monkeypatch)

    async def main() -> None:
        budget = Budget(vram="200MiB", host="64MiB")
        async with StreamedModel.open(folder, device="auto", budget=budget) as model:
            assert model.plan.device_memory is not None
            assert any(
                view.dtype == "float8_e4m3fn" for b in model.plan.batches for view in b.tensors
            )
            assert model.plan.fused_tokens == 0
            assert bits_equal((await model.forward(input_ids=IDS)).logits, logits)

    run(main())
