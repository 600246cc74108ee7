"""Mutated safetensors files and indexes are refused in one sentence, or read as safetensors and the index say."""

import json
import random
import struct

import pytest
import torch
from safetensors.torch import save_file
from support.mutations import assert_refused_or_read, mutated
from support.safetensors_files import assert_safetensors_agrees

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint

TENSORS = {
    "model.embed.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "layers.0.w": torch.arange(6, dtype=torch.float32),
    "layers.10.w": torch.arange(8, dtype=torch.uint8).reshape(2, 2, 2),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 5),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Files, each with the bytes of its header: as save_pretrained writes it, without metadata, and written by others."""
    folder = tmp_path_factory.mktemp("originals")
    save_file(TENSORS, folder / "plain")
    save_file(TENSORS, folder / "format", metadata={"format": "pt", "note": 'a "quoted" \u00e9'})
    found = [path.read_bytes() for path in (folder / "plain", folder / "format")]
    length = struct.unpack("<Q", found[0][:8])[0]
    spaced = json.dumps(json.loads(found[0][8 : 8 + length]), indent=1).encode()
    found.append(struct.pack("<Q", len(spaced)) + spaced + found[0][8 + length :])
    return [(content, 8 + struct.unpack("<Q", content[:8])[0]) for content in found]


def test_mutated_files_are_refused_or_read_as_they_are(tmp_path, originals, mutations):
    source = random.Random(15)
    path = tmp_path / "model.safetensors"
    read = 0
    for number in range(mutations):
        content, header_bytes = originals[number % len(originals)]
        path.write_bytes(mutated(content, source, header_bytes=header_bytes))
        read += assert_refused_or_read(
            path, Checkpoint.open, lambda path, _: assert_safetensors_agrees(path)
        )
    assert mutations * 0.02 < read < mutations * 0.8


def test_mutated_indexes_are_refused_or_meant(tmp_path, mutations):
    source = random.Random(16)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {}
    for number, name in enumerate(names):
        tensors = {f"layers.{number}.{key}": value for key, value in TENSORS.items()}
        save_file(tensors, tmp_path / name)
        weight_map |= dict.fromkeys(tensors, name)
    text = json.dumps({"metadata": {"total_size": 122}, "weight_map": weight_map}, indent=2)
    index = tmp_path / "model.safetensors.index.json"

    def check(_, checkpoint):
        said = json.loads(index.read_bytes())["weight_map"]
        for name, info in checkpoint.tensors.items():
            # A file may hold tensors that the index does not name: they are loaded with it.
            assert checkpoint.files[info.file].name == said.get(name, names[int(name[7])])
        for file in checkpoint.files:
            assert file.path.resolve().parent == tmp_path.resolve()

    read = 0
    for _ in range(mutations):
        index.write_bytes(mutated(text.encode(), source, header_bytes=len(text)))
        read += assert_refused_or_read(tmp_path, Checkpoint.open, check)
    assert mutations * 0.02 < read < mutations * 0.8
