"""Mutated GGUF files are refused in one sentence, or read exactly as gguf's own reader reads them."""

import random

import gguf
import numpy as np
import pytest
from support.gguf_models import byte_tokens, save_gguf_model
from support.ggufs import write_gguf
from support.mutations import assert_refused_or_read, mutated

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint

Q8_0, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32


def describe(writer):
    writer.add_context_length(8)
    writer.add_custom_alignment(64)
    writer.add_array("nested", [[1, 2], [3, 4]])
    writer.add_array("flags", [True, False])
    writer.add_token_list(["a", "bb", "ccc"])
    writer.add_float64("ratio", 0.5)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Files, each with the bytes of its header."""
    folder = tmp_path_factory.mktemp("originals")
    values = np.zeros((2, 3, 32), np.float32)
    small = {"a": (values, Q8_0), "b": (values[0], F32), "c": (values[:1], Q8_0)}
    paths = [
        write_gguf(folder / "small.gguf", small, describe=describe),
        write_gguf(folder / "plain.gguf", {"t": (values, F32)}),
        save_gguf_model(
            folder / "model.gguf", "llama", tokens=byte_tokens, changes={"vocab_size": 260}
        ),
    ]
    found = []
    for path in paths:
        content = path.read_bytes()
        first = min(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors)
        found.append((content, first))
    return found


def check(path, checkpoint):
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors.keys() == checkpoint.tensors.keys()
    for name, info in checkpoint.tensors.items():
        tensor = tensors[name]
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert info.logical_shape == tuple(reversed(tensor.shape.tolist()))
        assert info.encoding in {None, tensor.tensor_type.name}


def test_mutated_files_are_refused_or_read_as_they_are(tmp_path, originals, mutations):
    source = random.Random(14)
    path = tmp_path / "model.gguf"
    read = 0
    for number in range(mutations):
        content, header_bytes = originals[number % len(originals)]
        path.write_bytes(mutated(content, source, header_bytes=header_bytes))
        read += assert_refused_or_read(path, Checkpoint.open, check)
    assert mutations * 0.02 < read < mutations * 0.8
