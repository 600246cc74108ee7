"""Quantised checkpoints stream packed, and compute what from_pretrained computes."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.gguf_models import save_gguf_model
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import CASES, save_model
from support.quantized import QUANTISERS, save_quantised
from support.streaming import bits_equal, open_streaming
from support.traced import trace
from transformers import CompressedTensorsConfig

from layerstream.pipeline import Budget, ModelError, PlanError, StreamedModel, Workload
from layerstream.pipeline.modeling import packed_weight
from layerstream.pipeline.modeling.packed_banks import PackedBanks
from layerstream.pipeline.modeling.packed_weight import PackedWeight
from layerstream.pipeline.modeling.unpacked_once import KeptUnpacked, UnpackedOnce
from layerstream.pipeline.planning import tiles

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
EXPERTS = {
    "qwen3-moe": {"num_experts": 8, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 8},
    "deepseek-v3": {"moe_intermediate_size": 32},
}
IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
# Without dequantize, transformers 5.24 looks for the tensors of pack-quantized in the second, and for unpacked zero points in
# the first, and loads random weights.
LOADED_WRONGLY = {"int4-asymmetric", "int8-plain"}


def reference(folder: Path, case: str, quantiser: str, **options: Any) -> Any:
    if quantiser in LOADED_WRONGLY or (CASES[case].model != "LlamaForCausalLM"):
        method = json.loads((folder / "config.json").read_text())["quantization_config"]
        if method["quant_method"] == "compressed-tensors":
            options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return getattr(transformers, CASES[case].model).from_pretrained(folder, **options)


def assert_streams_alike(folder: Path, case: str, quantiser: str, **options: Any) -> None:
    """Logits and greedy tokens equal those of transformers, with the least memory and with all of it."""
    whole = reference(folder, case, quantiser, **options)
    with torch.no_grad():
        logits = whole(IDS).logits
        tokens = whole.generate(IDS, **GREEDY)

    async def main() -> None:
        for opened in (
            StreamedModel.open(folder, **options),
            await open_streaming(folder, **options),
        ):
            async with opened as model:
                assert bits_equal((await model.forward(input_ids=IDS)).logits, logits)
                assert torch.equal(await model.generate(input_ids=IDS, **GREEDY), tokens)

    with nothing_left_behind():
        run(main())


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("quantiser", [name for name in QUANTISERS if name != "mxfp4"])
def test_a_dense_model_computes_what_transformers_computes(tmp_path: Path, quantiser: str) -> None:
    folder = save_quantised(tmp_path / "model", "llama", quantiser)
    assert_streams_alike(folder, "llama", quantiser)


@pytest.mark.parametrize("implementation", [None, "eager"], ids=["default", "eager"])
@pytest.mark.parametrize("case", EXPERTS)
def test_a_mixture_in_fp8_reads_packed_experts_on_demand(
    tmp_path: Path, case: str, implementation: str | None
) -> None:
    folder = save_quantised(tmp_path / "model", case, "fp8-blocks", **EXPERTS[case])
    options = {} if implementation is None else {"experts_implementation": implementation}
    assert_streams_alike(folder, case, "fp8-blocks", **options)

    async def main() -> None:
        async with await open_streaming(folder, **options) as model:
            await model.forward(input_ids=IDS)
            assert model.stats().experts_wanted > model.stats().expert_hits
            assert all(view.dtype != "bfloat16" for e in model.plan.experts for view in e.tensors)

    run(main())


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    ("quantiser", "options"),
    [
        ("int4-groups", {}),
        ("int4-groups", {"dtype": torch.float32}),  # experts stay in bfloat16
        ("int8-channels", {}),
        ("fp8-channels", {}),
    ],
)
def test_a_mixture_in_compressed_tensors_reads_packed_experts(
    tmp_path: Path, quantiser: str, options: dict[str, Any]
) -> None:
    folder = save_quantised(tmp_path / "model", "qwen3-moe", quantiser, **EXPERTS["qwen3-moe"])
    assert_streams_alike(folder, "qwen3-moe", quantiser, **options)


@pytest.mark.parametrize("implementation", [None, "eager"], ids=["default", "eager"])
def test_gpt_oss_in_mxfp4_reads_packed_experts(tmp_path: Path, implementation: str | None) -> None:
    folder = save_quantised(tmp_path / "model", "gpt-oss", "mxfp4", num_local_experts=8)
    options = {} if implementation is None else {"experts_implementation": implementation}
    assert_streams_alike(folder, "gpt-oss", "mxfp4", **options)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    ("case", "quantiser"),
    [
        ("qwen3-moe", "fp8-blocks"),
        ("qwen3-moe", "int4-groups"),
        ("gpt-oss", "mxfp4"),
        ("qwen3-moe", "Q8_0"),
    ],
)
def test_fused_kernels_multiply_with_packed_experts(
    tmp_path: Path, case: str, quantiser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In short passes nothing is unpacked; longer ones unpack."""
    if quantiser == "Q8_0":
        folder = save_gguf_model(tmp_path / "model.gguf", "qwen3moe")
    else:
        experts = {"num_local_experts": 8} if case == "gpt-oss" else EXPERTS[case]
        folder = save_quantised(tmp_path / "model", case, quantiser, **experts)
    unpacked = []
    unpack = PackedBanks._unpack

    def counting(self: Any, *args: Any) -> None:
        unpacked.append(args)
        unpack(self, *args)

    monkeypatch.setattr(PackedBanks, "_unpack", counting)

    dtype = (
        torch.bfloat16 if quantiser == "mxfp4" else torch.float32
    )  # in which its experts are packed

    async def logits(kernels: str, ids: torch.Tensor) -> torch.Tensor:
        async with StreamedModel.open(folder, kernels=kernels, dtype=dtype) as model:
            assert model.plan.fused_tokens == (4 if kernels == "fused" else 0)
            unpacked.clear()
            return (await model.forward(input_ids=ids)).logits

    for ids in (IDS[:1, :4], IDS):
        exact, fused = run(logits("exact", ids)), run(logits("fused", ids))
        assert bool(unpacked) is (ids is IDS)
        accuracy = 0.03 if quantiser == "mxfp4" else 1e-3
        assert float((fused - exact).abs().max()) <= accuracy * float(exact.abs().max())


def test_weights_larger_than_a_tile_are_multiplied_with_tile_by_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_TILE_BYTES", 1)
    monkeypatch.setattr(tiles, "_ROW_MULTIPLE", 24)  # the last tile of 32 or 64 rows is smaller
    monkeypatch.setattr(packed_weight, "_WHOLE_BYTES", 0)
    # What stays may be kept unpacked, if rates that were measured here say that this is faster.
    monkeypatch.setattr(KeptUnpacked, "get", lambda *_: None)
    counts: list[int] = []
    whole = PackedWeight._tile

    def counting(self: Any, first: int, count: int, memory: torch.Tensor) -> torch.Tensor:
        counts.append(count)
        return whole(self, first, count, memory)

    monkeypatch.setattr(PackedWeight, "_tile", counting)
    folder = save_quantised(tmp_path / "model", "llama", "fp8-blocks")
    assert_streams_alike(folder, "llama", "fp8-blocks")
    assert set(counts) >= {24, 8, 16}


def test_packed_weights_can_be_used_in_any_other_way(tmp_path: Path) -> None:
    """Code of a model may take a weight out of its module: it gets the whole of it."""
    folder = save_quantised(tmp_path / "model", "llama", "fp8-blocks")
    plain = transformers.LlamaForCausalLM.from_pretrained(folder)
    expected = plain.model.layers[1].mlp.up_proj.weight.detach()
    found = []

    async def main() -> None:
        async with StreamedModel.open(folder) as model:
            layer = model.module.model.layers[1].mlp

            def look(module: Any, inputs: Any) -> None:
                weight = module.up_proj.weight
                assert weight.shape == expected.shape
                found.extend([weight.clone(), weight + 0, inputs[0] @ weight.T])

            layer.register_forward_pre_hook(look)
            await model.forward(input_ids=IDS)

    run(main())
    assert len(found) == 3
    assert bits_equal(found[0], expected)
    assert bits_equal(found[1], expected)


def test_what_streams_is_packed(tmp_path: Path) -> None:
    plain = save_model(tmp_path / "plain", "llama", torch.bfloat16, num_hidden_layers=6)
    folder = save_quantised(tmp_path / "model", "llama", "fp8-blocks", num_hidden_layers=6)

    async def blocks(path: Path) -> int:
        async with await open_streaming(path) as model:
            return sum(
                batch.tensor_bytes for batch in model.plan.batches if "layers" in batch.label
            )

    async def main() -> None:
        packed, unpacked = await blocks(folder), await blocks(plain)
        assert packed < 0.6 * unpacked

    run(main())


def test_quantised_activations_are_refused(tmp_path: Path) -> None:
    folder = save_quantised(tmp_path / "model", "llama", "int8-channels")
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    group = settings["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = {"num_bits": 8, "type": "int", "dynamic": True}
    path.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"group_0.*activations|activations.*group_0"):
        trace(folder)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("quantiser", ["fp8-blocks", "int4-groups", "int8-channels"])
def test_fused_kernels_give_nearly_the_logits_of_transformers(
    tmp_path: Path, quantiser: str
) -> None:
    folder = save_quantised(tmp_path / "model", "llama", quantiser)
    step = IDS[:1, :2]
    with torch.no_grad():
        logits = reference(folder, "llama", quantiser)(step).logits

    async def main() -> None:
        async with StreamedModel.open(folder, kernels="fused") as model:
            assert model.plan.fused_tokens == 4
            found = (await model.forward(input_ids=step)).logits
            # Both round to bfloat16 in between, from sums in different orders.
            torch.testing.assert_close(found, logits, rtol=0.05, atol=0.02)
            assert not torch.equal(found, torch.zeros_like(found))
        async with StreamedModel.open(folder, kernels="fused") as model:
            prompt = (await model.forward(input_ids=IDS)).logits  # 18 tokens: unpacked
            assert bits_equal(prompt, reference(folder, "llama", quantiser)(IDS).logits)

    run(main())


def test_kernels_are_exact_by_default_and_others_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_quantised(tmp_path / "model", "llama", "fp8-blocks")

    async def main() -> None:
        async with StreamedModel.open(folder) as model:
            assert model.plan.fused_tokens == 0
        with pytest.raises(PlanError, match=r"no kernels 'fast'.*exact, fused, auto"):
            async with StreamedModel.open(folder, kernels="fast"):
                pass

    run(main())


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_passes_that_share_a_sweep_share_what_the_first_of_them_unpacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    path = tmp_path / "model.gguf"
    save_gguf_model(path, architecture)
    prompts = [IDS[:1, : 3 + number] for number in range(6)]
    unpacked: list[int] = []
    tiles_used: list[int] = []
    get, tile = UnpackedOnce.get, PackedWeight._tile

    def counting(self: Any, key: Any, nbytes: int, unpack: Any) -> Any:
        return get(self, key, nbytes, lambda memory: (unpacked.append(nbytes), unpack(memory)))

    def counting_tiles(self: Any, first: int, count: int, memory: torch.Tensor) -> torch.Tensor:
        tiles_used.append(count)
        return tile(self, first, count, memory)

    monkeypatch.setattr(UnpackedOnce, "get", counting)
    monkeypatch.setattr(PackedWeight, "_tile", counting_tiles)

    async def main() -> None:
        # With more tokens, weights that stay would be kept unpacked.
        workload = Workload(batch_size=6, prompt_tokens=8, new_tokens=1)
        async with await open_streaming(path) as small:
            assert small.plan.unpacked_once_bytes == 0  # for one request
            alone = [(await small.forward(input_ids=ids)).logits for ids in prompts]
        async with StreamedModel.open(path, workload=workload, budget=Budget(host="1GiB")) as model:
            assert model.plan.unpacked_once_bytes > 0
            await model.forward(input_ids=prompts[0])
            assert not unpacked  # one pass multiplies with tiles
            found = await asyncio.gather(*(model.forward(input_ids=ids) for ids in prompts))
            for got, expected in zip(found, alone, strict=True):
                assert bits_equal(got.logits, expected)
            sweeps = model.stats().sweeps - 1
            weights = len(list(model.module.model.layers[0].modules()))
            assert unpacked
            assert len(unpacked) <= sweeps * weights * 2 < len(prompts) * weights * 2

    run(main())
