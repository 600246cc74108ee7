"""Models in files of torch.save: the logits of transformers' own from_pretrained, bit for bit."""

import json

import pytest
import torch
import transformers
from support.loop import run
from support.models import save_model
from support.streaming import bits_equal

from layerstream.pipeline import StreamedModel

IDS = torch.arange(9)[None] + 1


def as_bin(folder, change=lambda state: state, *, shards=1):
    """Replace a model's safetensors by files of torch.save."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    state = change(dict(model.state_dict()))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = list(state)
    weight_map = {name: f"pytorch_model-{at % shards}.bin" for at, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: state[name] for name in names if weight_map[name] == file}
        torch.save(part, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


async def logits(folder):
    async with StreamedModel.open(folder) as model:
        return (await model.forward(input_ids=IDS)).logits


def assert_logits_are_those_of_transformers(folder):
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        expected = model(input_ids=IDS).logits
    found = run(logits(folder))
    assert found.dtype == expected.dtype
    assert bits_equal(found, expected)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_those_of_transformers(tmp_path, name, shards, dtype):
    folder = save_model(tmp_path / "model", name, dtype=dtype)
    as_bin(folder, shards=shards)
    assert_logits_are_those_of_transformers(folder)


def test_tied_weights_that_share_their_memory_are_read(tmp_path):
    folder = save_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    as_bin(folder)
    assert_logits_are_those_of_transformers(folder)


def test_strided_weights_keep_their_strides_as_in_transformers(tmp_path):
    def transpose(state):
        return {
            name: tensor.T.contiguous().T if "proj" in name else tensor
            for name, tensor in state.items()
        }

    folder = save_model(tmp_path / "model", "llama")
    as_bin(folder, transpose)
    assert_logits_are_those_of_transformers(folder)


def test_without_a_dtype_in_the_config_that_of_the_first_tensor_in_the_file_counts(tmp_path):
    def mix(state):
        first = list(state)[-1]
        return {first: state.pop(first).to(torch.bfloat16), **state}

    folder = save_model(tmp_path / "model", "llama")
    as_bin(folder, mix)
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    assert_logits_are_those_of_transformers(folder)
