"""Converted checkpoints are what compressed-tensors would write, load in transformers and stream with equal results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from support.adapters import lora, save_adapter
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import CASES, inputs_for, save_model
from support.streaming import bits_equal, open_streaming
from support.traced import rewrite
from transformers import CompressedTensorsConfig

from layerstream.pipeline import StreamedModel, load_streamed
from layerstream.tools.cli import main

SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3-moe": {"num_experts": 8, "moe_intermediate_size": 32},
    "gpt-oss": {"num_local_experts": 8},
}
FORMS = {
    "fp8": ["fp8"],
    "int8": ["int8"],
    "int8-groups": ["int8", "--group-size", "16"],
    "int4": ["int4", "--group-size", "16"],
    "int4-channels": ["int4", "--group-size", "channel"],
}
NUMBERS = {"fp8": (8, "float", 448), "int8": (8, "int", 127), "int4": (4, "int", 7)}
UP = "model.layers.1.mlp.up_proj"


def save(
    folder: Path, case: str = "llama", dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> Path:
    return save_model(folder, case, dtype, **{**SETTINGS.get(case, {}), **settings})


def converted(source: Path, form: str, *arguments: str) -> Path:
    """The checkpoint in ``source``, converted to one of ``FORMS`` beside it."""
    folder = source.with_name(f"{source.name}-{form}")
    assert main(["convert", str(source), str(folder), "--to", *FORMS[form], *arguments]) == 0
    return folder


def assert_streams_alike(folder: Path, case: str, *, dequantize: bool) -> None:
    """Logits equal those of transformers, with the least memory and with all of it."""
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    whole, info = getattr(transformers, CASES[case].model).from_pretrained(
        folder, output_loading_info=True, **(options if dequantize else {})
    )
    assert not any(info.values()), info
    inputs = inputs_for(case)
    with torch.no_grad():
        logits = whole(**inputs).logits
    assert logits.isfinite().all()

    async def main() -> None:
        for opened in (StreamedModel.open(folder), await open_streaming(folder)):
            async with opened as model:
                assert bits_equal((await model.forward(**inputs)).logits, logits)

    with nothing_left_behind():
        run(main())


@pytest.mark.parametrize("form", FORMS)
def test_a_dense_model_loads_in_transformers_and_streams_with_equal_logits(
    tmp_path: Path, form: str
) -> None:
    folder = converted(save(tmp_path / "model"), form)
    assert_streams_alike(folder, "llama", dequantize=False)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("form", FORMS)
def test_a_mixture_loads_in_transformers_and_streams_with_equal_logits(
    tmp_path: Path, form: str
) -> None:
    folder = converted(save(tmp_path / "model", "qwen3-moe"), form)
    names = set(load_file(folder / "model.safetensors"))
    assert "model.layers.1.mlp.experts.7.down_proj.weight_scale" in names
    assert "model.layers.1.mlp.gate.weight" in names
    assert_streams_alike(folder, "qwen3-moe", dequantize=True)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    "case", ["gpt-oss", "llama-tied", "deepseek-v3", "mixtral", "llava", "t5", "qwen3-next"]
)
def test_models_of_other_kinds_stream_with_equal_logits(tmp_path: Path, case: str) -> None:
    folder = converted(save(tmp_path / "model", case), "int4-channels")
    assert_streams_alike(folder, case, dequantize=True)


def test_a_layer_whose_columns_do_not_fit_the_groups_stays_as_it_is(tmp_path: Path) -> None:
    folder = converted(save(tmp_path / "model", intermediate_size=40), "int4")
    names = set(load_file(folder / "model.safetensors"))
    assert {"model.layers.1.mlp.down_proj.weight", f"{UP}.weight_packed"} <= names
    assert_streams_alike(folder, "llama", dequantize=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_weights_of_other_dtypes_keep_them_as_the_dtype_of_scales(
    tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    folder = converted(save(tmp_path / "model", dtype=dtype), form)
    assert load_file(folder / "model.safetensors")[f"{UP}.weight_scale"].dtype == dtype
    assert_streams_alike(folder, "llama", dequantize=False)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_config_of_another_dtype_than_the_files_stays(tmp_path: Path) -> None:
    source = save(tmp_path / "model", dtype=torch.float32)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    folder = converted(source, "int8")
    assert_streams_alike(folder, "llama", dequantize=True)


def test_experts_that_transformers_would_not_load_beside_converted_ones_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "model", "qwen3-moe")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for expert in range(8):
            name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
            tensors[name] = tensors[name].double()

    rewrite(source, change)
    assert main(["convert", str(source), str(tmp_path / "new"), "--to", "fp8"]) == 1
    words = "'model.layers.1.mlp.experts.0.down_proj.weight' of dtype float64 and shape [32, 32]"
    assert words in capsys.readouterr().err


def test_the_numbers_are_the_nearest_and_scales_those_of_compressed_tensors(
    tmp_path: Path,
) -> None:
    source = save(tmp_path / "model")
    weight = load_file(source / "model.safetensors")[f"{UP}.weight"]
    for form in FORMS:
        bits, kind, most = NUMBERS[form.partition("-")[0]]
        stored = load_file(converted(source, form) / "model.safetensors")
        scale = stored[f"{UP}.weight_scale"]
        size = weight.shape[1] // scale.shape[1]
        groups = weight.unflatten(1, (-1, size))
        arguments = QuantizationArgs(num_bits=bits, type=kind, symmetric=True)
        expected, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
        assert bits_equal(scale, expected)
        quotients = (groups.double() / scale.double()[..., None]).flatten(1)
        if kind == "float":
            nearest = quotients.float().clamp(-most, most).to(torch.float8_e4m3fn)
            assert bits_equal(stored[f"{UP}.weight"], nearest)
        else:
            words = stored[f"{UP}.weight_packed"].view(torch.uint8).long()
            nibbles = torch.stack([words & 15, words >> 4], -1).flatten(1)
            found = (words if bits == 8 else nibbles) - (1 << bits - 1)
            assert torch.equal(found.double(), quotients.round().clamp(-most - 1, most))
            assert stored[f"{UP}.weight_shape"].tolist() == list(weight.shape)


def test_all_else_stays_as_it_is(tmp_path: Path) -> None:
    source = save(tmp_path / "model", "qwen3-moe")
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE").write_text("free")
    (source / "notes.bin").write_bytes(b"no document")
    folder = converted(source, "int8", "--max-shard-size", "20KB")
    before = load_file(source / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(shards) > 2
    after = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    assert index["weight_map"] == {name: file for file in shards for name in shards[file]}
    kept = before.keys() & after.keys()
    assert {name for name in before if "norm" in name or "embed" in name} <= kept
    assert all(bits_equal(before[name], after[name]) for name in kept)
    assert {name.rpartition(".weight")[0] for name in before.keys() - kept} == {
        name.removesuffix(".weight_packed") for name in after if name.endswith(".weight_packed")
    }
    old, new = (json.loads((path / "config.json").read_text()) for path in (source, folder))
    assert new.pop("quantization_config")["format"] == "pack-quantized"
    assert new == old
    documents = {"LICENSE", "tokenizer.json", "generation_config.json"}
    assert {path.name for path in folder.iterdir()} == {
        *documents, *shards, "config.json", "model.safetensors.index.json"
    }  # fmt: skip
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in documents)


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_files_are_byte_for_byte_what_safetensors_writes(tmp_path: Path, form: str) -> None:
    file = converted(save(tmp_path / "model"), form) / "model.safetensors"
    save_file(load_file(file), tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert file.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_files_of_torch_save_convert_to_the_same_bytes(tmp_path: Path) -> None:
    source = save(tmp_path / "model")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].repeat_interleave(2)[::2]
    torch.save(tensors, other / "pytorch_model.bin")
    one, two = (converted(folder, "int4") for folder in (source, other))
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert mine.keys() == theirs.keys()
    assert all(bits_equal(mine[name], theirs[name]) for name in mine)


def test_an_adapter_beside_a_model_applies_to_the_converted_one(tmp_path: Path) -> None:
    source = save(tmp_path / "model")
    save_adapter(source, source, lora(), model_class=transformers.LlamaForCausalLM)
    folder = converted(source, "fp8")
    inputs = inputs_for("llama")
    with (
        load_streamed(folder, device="cpu", measure=False) as model,
        load_streamed(folder, device="cpu", measure=False, adapters={"same": source}) as both,
    ):
        logits = model(**inputs).logits
        assert bits_equal(both(**inputs, adapter="same").logits, logits)
    for path in folder.glob("adapter_*"):
        path.unlink()
    with load_streamed(folder, device="cpu", measure=False) as model:
        assert not torch.equal(model(**inputs).logits, logits)


def test_an_adapter_alone_is_not_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save(tmp_path / "model")
    adapter = save_adapter(
        base, tmp_path / "adapter", lora(), model_class=transformers.LlamaForCausalLM
    )
    assert main(["convert", str(adapter), str(tmp_path / "new"), "--to", "fp8"]) == 1
    error = capsys.readouterr().err
    assert f"{adapter} holds an adapter alone" in error
    assert f"convert its base model, {base}" in error
    assert not (tmp_path / "new").exists()


def test_the_report_tells_the_error_of_each_layer_and_what_was_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "model", "gpt-oss")
    folder = converted(source, "int8", "--json")
    report = json.loads(capsys.readouterr().out)
    layers = report["layers"]
    assert list(layers) == ["model.layers.0", "model.layers.1"]
    weights = load_file(source / "model.safetensors")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn."
    errors, squares = 0.0, 0.0
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = weights[f"{name}{part}.weight"].double()
        numbers = stored[f"{name}{part}.weight_packed"].view(torch.uint8).double() - 128
        plain = (numbers * stored[f"{name}{part}.weight_scale"].double()).bfloat16().double()
        errors += float((plain - weight).square().sum())
        squares += float(weight.square().sum())
    assert layers["model.layers.1"] == pytest.approx((errors / squares) ** 0.5, rel=1e-6)
    assert report["left"]["model.layers.0.mlp.experts.down_proj"] == "experts in one tensor"
    assert report["left"]["lm_head.weight"] == "an embedding or a head"
    assert report["left"]["model.layers.0.mlp.router.weight"] == "a router"
    assert len(report["converted"]) == 8
    assert report["total_bytes"] == (folder / "model.safetensors").stat().st_size
    main(["convert", str(source), str(tmp_path / "text"), "--to", "int8"])
    text = capsys.readouterr().out
    assert "model.layers.*.mlp.experts.down_proj (2 tensors): experts in one tensor" in text
    assert f"model.layers.1  {layers['model.layers.1']:.3%}" in text
