"""GGUF models: the weights and logits of transformers' own from_pretrained, bit for bit."""

import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from support.gguf_models import MODELS, auto_class, save_gguf_model
from support.ggufs import BLOCK_TYPES, random_blocks, write_gguf
from support.loop import run
from support.streaming import bits_equal

from layerstream.pipeline import Checkpoint, Hardware, ModelError, StreamedModel
from layerstream.pipeline.modeling import gguf_reading
from layerstream.pipeline.modeling.replacing import for_this_thread
from layerstream.pipeline.modeling.tracing import config_of, resolve_model_class, trace_model

IDS = torch.arange(9)[None] + 1
WIDE = {"hidden_size": 256, "intermediate_size": 512}
# Of two loaders in transformers: the older one unpacks in float32, the newer one in the model's dtype.
LOADERS = ["llama", "lfm2"]
OLDER_ONLY = {"Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4"}


def inputs(architecture):
    decoder = {"decoder_input_ids": IDS[:, :4]} if architecture == "t5" else {}
    return {"input_ids": IDS, **decoder}


def reference(path, architecture="llama", dtype="auto"):
    return auto_class(architecture).from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)


def expected_logits(path, architecture, dtype="auto"):
    with torch.no_grad():
        return reference(path, architecture, dtype)(**inputs(architecture)).logits


def test_a_model_is_planned_with_rates_of_the_dtype_that_it_is_opened_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked, probe = tmp_path / "model.gguf", [], Hardware.probe
    save_gguf_model(path, "llama")

    async def recorded(*arguments, dtype, **options):
        asked.append(dtype)
        return await probe(*arguments, dtype=dtype, **options)

    monkeypatch.setattr(Hardware, "probe", recorded)
    run(logits(path, "llama", torch.bfloat16))
    assert asked == ["bfloat16"]


async def logits(path, architecture, dtype="auto"):
    async with StreamedModel.open(path, dtype=dtype) as model:
        return (await model.forward(**inputs(architecture))).logits


def traced(path, dtype="auto"):
    checkpoint = Checkpoint.open(path)
    config, _ = config_of(checkpoint)
    model = trace_model(
        checkpoint, config=config, model_class=resolve_model_class(config), dtype=dtype
    )
    return checkpoint, model


def stored(checkpoint, name):
    info = checkpoint.tensors[name]
    content = np.fromfile(
        checkpoint.files[info.file].path, np.uint8, count=info.nbytes, offset=info.offset
    )
    return torch.from_numpy(content).view(getattr(torch, info.dtype)).view(info.shape)


def assert_weights_are_those_of_transformers(path, dtype="auto"):
    checkpoint, model = traced(path, dtype)
    expected = reference(path, dtype=dtype).state_dict()
    for name, recipe in model.recipes.items():
        made = recipe.replay({each: stored(checkpoint, each) for each in recipe.sources})
        assert made.stride() == expected[name].stride()
        # Whatever the bits of one that is no number.
        assert torch.equal(made.isnan(), expected[name].isnan()), name
        assert bits_equal(made.nan_to_num(), expected[name].nan_to_num()), name


@pytest.mark.parametrize("architecture", MODELS)
def test_logits_are_those_of_transformers(tmp_path, architecture):
    path = save_gguf_model(tmp_path / "model.gguf", architecture)
    expected = expected_logits(path, architecture)
    assert expected.dtype == torch.float32
    assert bits_equal(run(logits(path, architecture)), expected)


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe", "gemma3", "gpt2", "lfm2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_another_dtype_has_the_logits_of_transformers_in_that_dtype(tmp_path, architecture, dtype):
    path = save_gguf_model(tmp_path / "model.gguf", architecture)
    expected = expected_logits(path, architecture, dtype)
    assert expected.dtype == dtype
    assert bits_equal(run(logits(path, architecture, dtype)), expected)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.parametrize("architecture", LOADERS)
def test_the_default_dtype_is_that_which_transformers_takes_for_the_file(
    tmp_path, architecture, kind
):
    kind = gguf.GGMLQuantizationType[kind]
    path = save_gguf_model(tmp_path / "model.gguf", architecture, kind=kind)
    expected = expected_logits(path, architecture)
    assert expected.dtype == (torch.float32 if architecture == "llama" else expected.dtype)
    assert bits_equal(run(logits(path, architecture)), expected)


@pytest.mark.filterwarnings("ignore:.*encountered in")  # scales that are no numbers
@pytest.mark.parametrize(
    ("architecture", "dtype", "kind"),
    [
        *(("llama", torch.float32, kind) for kind in BLOCK_TYPES),
        *(("lfm2", torch.bfloat16, kind) for kind in BLOCK_TYPES if kind.name not in OLDER_ONLY),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_every_block_type_is_unpacked_to_the_bits_of_transformers(
    tmp_path, kind, architecture, dtype
):
    path = save_gguf_model(
        tmp_path / "model.gguf", architecture, kind=kind, changes=WIDE, blocks=random_blocks
    )
    assert_weights_are_those_of_transformers(path, dtype)


@pytest.mark.parametrize("architecture", ["llama", "lfm2", "qwen3moe"])
def test_a_model_in_parts_has_the_logits_of_the_whole(tmp_path, architecture):
    whole = save_gguf_model(tmp_path / "whole.gguf", architecture)
    (tmp_path / "parts").mkdir()
    save_gguf_model(tmp_path / "parts" / "m.gguf", architecture, split_max_tensors=6)
    assert len(list((tmp_path / "parts").iterdir())) > 2
    expected = expected_logits(whole, architecture)
    assert bits_equal(run(logits(tmp_path / "parts", architecture)), expected)


@pytest.mark.parametrize("architecture", MODELS)
def test_the_config_is_that_of_transformers_without_taking_vocabularies_apart(
    tmp_path, architecture, monkeypatch
):
    monkeypatch.setattr(gguf_reading, "_MAX_VALUES", 50)  # the vocabulary is longer
    path = save_gguf_model(tmp_path / "model.gguf", architecture)
    expected = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name).to_dict()
    found = config_of(Checkpoint.open(path))[0].to_dict()
    assert found | {"architectures": None} == expected | {"architectures": None}
    assert found["architectures"]


def test_the_generation_config_is_that_of_transformers(tmp_path):
    path = save_gguf_model(tmp_path / "model.gguf", "llama", changes={"eos_token_id": 5})
    _, model = traced(path)
    expected = reference(path).generation_config
    assert model.module.generation_config.to_dict() == expected.to_dict()


def test_functions_that_are_replaced_while_a_model_loads_are_as_ever_in_other_threads():
    results = {}
    with for_this_thread(torch, "zeros", lambda *_: "replaced") as original:
        thread = threading.Thread(target=lambda: results.update(other=torch.zeros(2)))
        thread.start()
        thread.join()
        results["own"] = torch.zeros(2)
    assert results["own"] == "replaced"
    assert torch.equal(results["other"], torch.tensor([0.0, 0.0]))
    assert torch.zeros is original


def unknown_architecture(path):
    values = np.zeros((2, 32), np.float32)
    return write_gguf(path, {"t": (values, gguf.GGMLQuantizationType.F32)}, architecture="clip")


def without_a_tensor(path):
    return save_gguf_model(path, "llama", without="blk.1.ffn_down.weight")


def blocks_of_the_older_loader(path):
    return save_gguf_model(path, "lfm2", kind=gguf.GGMLQuantizationType.Q5_0)


def other_shapes(path):
    return save_gguf_model(path, "llama", told={"llama.embedding_length": 128})


REFUSED = {
    "an unknown architecture": (unknown_architecture, "architecture clip is not supported"),
    "a missing tensor": (without_a_tensor, "lacks 1 of the"),
    "blocks that its newer loader does not know": (
        blocks_of_the_older_loader,
        "ggml type 6, which is not supported yet",
    ),
    "other shapes": (other_shapes, "has shape"),
}


@pytest.mark.parametrize(("prepare", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_transformers_cannot_load_is_refused_with_the_reason(tmp_path, prepare, says):
    path: Path = prepare(tmp_path / "model.gguf")
    with pytest.raises(ModelError) as caught:
        traced(path)
    assert says in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_package_that_transformers_needs_is_asked_for_by_name(tmp_path, monkeypatch, package):
    path = save_gguf_model(tmp_path / "model.gguf", "llama")
    find = gguf_reading.importlib.util.find_spec
    monkeypatch.setattr(
        gguf_reading.importlib.util,
        "find_spec",
        lambda name: None if name == package else find(name),
    )
    with pytest.raises(ModelError, match=f"needs {package}: pip install"):
        traced(path)
