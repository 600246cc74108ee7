"""Checkpoints that are packed in forms that are not read are refused by name in one sentence, with what runs them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.models import save_model

from layerstream.pipeline import Checkpoint, CheckpointError, ModelError, load_streamed
from layerstream.pipeline.checkpoint.quantization import refuse_packed_otherwise
from layerstream.tools.cli import main

METHODS = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "'gptq'.*package gptqmodel"),
    "awq": ({"quant_method": "awq", "bits": 4}, "'awq'.*package gptqmodel"),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "'bitsandbytes'.*package bitsandbytes",
    ),
    "old bitsandbytes": ({"load_in_8bit": True}, "'bitsandbytes'.*package bitsandbytes"),
    "torchao": ({"quant_method": "torchao"}, "'torchao'.*package torchao"),
    "exl2": ({"quant_method": "exl2"}, "'exl2'.*with exllamav2"),
    "bitnet": ({"quant_method": "bitnet"}, "'bitnet'.*with transformers"),
    "modelopt": ({"quant_method": "modelopt"}, "'modelopt'.*with vLLM"),
    "mlx": ({"group_size": 64, "bits": 4}, "'mlx'.*mlx-lm, on a Mac"),
    "old gptq": ({"group_size": 128, "bits": 4, "desc_act": False}, "'gptq'.*gptqmodel"),
    "unheard of": ({"quant_method": "new"}, "'new'.*the program that it was made for"),
    "no method": ({"x": 2}, "'no quant_method'"),
    "no object": ("int4", "that is 'int4', where an object"),
}
GROUP = {"weights": {"num_bits": 4, "type": "int", "symmetric": True}}
COMPRESSED = {
    "NVFP4": ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
    "3 bits": ({"config_groups": {"g": {"weights": {"num_bits": 3}}}}, r"3 bits \(config_groups.g"),
    "sparse": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    "activations": (
        {"config_groups": {"g": {**GROUP, "input_activations": {"num_bits": 8}}}},
        "quantised activations",
    ),
}
NAMES = {
    "a.qweight": "'gptq or awq' .it has a.qweight",
    "a.q_weight": "'exl2'",
    "a.trellis": "'exl3'",
    "a.W_q": "'hqq'",
    "a.SCB": "'bitsandbytes'",
    "a.weight_scale_2": "'modelopt'",
}


def checkpoint(
    folder: Path,
    config: dict[str, Any],
    name: str = "a.weight",
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    tensors = {name: torch.zeros(4, 4, dtype=dtype), "scalar": torch.zeros(())}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)


@pytest.mark.parametrize(("settings", "words"), METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("holder", [None, "text_config"])
def test_methods_are_refused_with_what_runs_them(
    tmp_path: Path, settings: Any, words: str, holder: str | None
) -> None:
    inner = {"quantization_config": settings}
    with pytest.raises(ModelError, match=words) as refused:
        refuse_packed_otherwise(checkpoint(tmp_path, {holder: inner} if holder else inner))
    assert "\n" not in str(refused.value)
    assert "the checkpoint that it was made from" in str(refused.value)


@pytest.mark.parametrize(("settings", "words"), COMPRESSED.values(), ids=COMPRESSED.keys())
def test_forms_of_compressed_tensors_are_refused(tmp_path: Path, settings: Any, words: str) -> None:
    given = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": GROUP},
    }
    refuse_packed_otherwise(checkpoint(tmp_path, {"quantization_config": given}))
    with pytest.raises(ModelError, match=words):
        refuse_packed_otherwise(checkpoint(tmp_path, {"quantization_config": given | settings}))


@pytest.mark.parametrize(("name", "words"), NAMES.items())
def test_without_a_config_names_tell(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        refuse_packed_otherwise(checkpoint(tmp_path, {}, name, torch.int32))


@pytest.mark.parametrize("name", ["a.W_q", "a.trellis", "a.qweight"])
def test_a_weight_that_is_not_packed_may_be_named_so(tmp_path: Path, name: str) -> None:
    refuse_packed_otherwise(checkpoint(tmp_path, {}, name))


def test_a_part_of_a_part_tells_too(tmp_path: Path) -> None:
    inner = {"quantization_config": {"quant_method": "awq"}}
    with pytest.raises(ModelError, match="'awq'"):
        refuse_packed_otherwise(checkpoint(tmp_path, {"thinker": {"text_config": inner}}))


def test_every_entry_refuses_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "model", "llama", torch.bfloat16)
    path = folder / "config.json"
    settings = {"quant_method": "gptq", "bits": 4}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    with pytest.raises(ModelError) as refused:
        load_streamed(folder)
    for command in (
        ["plan"],
        ["generate", "--prompt-ids", "1"],
        ["convert", str(tmp_path / "out"), "--to", "int4"],
    ):
        name, *rest = command
        assert main([name, str(folder), *rest]) == 1
        assert str(refused.value) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("model.onnx", "ONNX Runtime"),
        ("openvino_model.xml", "OpenVINO"),
        ("model.mlpackage/x", "Core ML"),
        ("model.llamafile", "llamafile"),
    ],
)
def test_what_was_made_for_one_program_is_refused_with_its_name(
    tmp_path: Path, name: str, program: str
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"only {program} runs"):
        Checkpoint.open(tmp_path)
    if file.suffix != ".xml":
        alone = file if file.parent == tmp_path else file.parent
        with pytest.raises(CheckpointError, match=f"is for {program} alone"):
            Checkpoint.open(alone)
