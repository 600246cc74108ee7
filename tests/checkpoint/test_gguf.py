"""GGUF files: what gguf's own reader reads, which files are the model, and what is refused."""

import asyncio
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.ggufs import BLOCK_TYPES, random_blocks, write_gguf

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.formats.format import BLOCKS
from layerstream.pipeline.checkpoint.layers import LayerKind, group_layers
from layerstream.pipeline.machine.probe_compute import block_shapes, main_dtype
from layerstream.pipeline.planning.expert_names import split_experts
from layerstream.stages.errors import CheckpointError

F32 = gguf.GGMLQuantizationType.F32
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def matrix(rows=2, columns=32):
    return np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)


def describe(writer, vocabulary=7):
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length([64, 96])
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_token_list([f"token {number}" for number in range(vocabulary)])
    writer.add_array("nested", [[1, 2], [3, 4]])


def model(path, **options):
    tensors = {
        "token_embd.weight": (matrix(7), Q8_0),
        "output_norm.weight": (matrix(1)[0], F32),
        **{
            f"blk.{layer}.{name}.weight": (matrix(), Q8_0)
            for layer in range(2)
            for name in ("attn_norm", "attn_q", "ffn_up", "ffn_down_exps")
        },
        "output.weight": (matrix(7), F32),
    }
    return write_gguf(path, tensors, describe=describe, **options)


def parts(folder, **options):
    """A model in parts, as gguf-split writes it."""
    model(folder / "m.gguf", split_max_tensors=4, **options)
    return sorted(folder.glob("m-*.gguf"))


def assert_same(checkpoint, files):
    """That a checkpoint holds what gguf's reader finds in ``files``."""
    found = {}
    for file in files:
        reader = gguf.GGUFReader(file)
        found |= {tensor.name: (file, tensor) for tensor in reader.tensors}
    assert set(checkpoint.tensors) == set(found)
    for name, (file, tensor) in found.items():
        info = checkpoint.tensors[name]
        assert checkpoint.files[info.file].path == file
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert info.logical_shape == tuple(reversed(tensor.shape.tolist()))
        assert info.shape == tensor.data.shape or info.dtype == "bfloat16"
        assert info.encoding in {None, tensor.tensor_type.name}


@pytest.mark.parametrize(
    "opened",
    [Checkpoint.open, lambda path: asyncio.run(Checkpoint.open_async(path))],
    ids=["open", "open_async"],
)
def test_a_model_opens_with_the_config_that_its_metadata_state(tmp_path, opened):
    path = model(tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    checkpoint = opened(path)
    assert_same(checkpoint, [path])
    assert checkpoint.format == "GGUF"
    assert checkpoint.config == {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 96,
        "max_position_embeddings": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 7, "tie_word_embeddings": False,
    }  # fmt: skip


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_every_block_type_is_known_by_the_sizes_of_the_gguf_package(tmp_path, kind):
    assert BLOCKS[kind.name] == gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("t", random_blocks(kind, 3, 512), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = Checkpoint.open(tmp_path)
    assert_same(checkpoint, [tmp_path / "model.gguf"])
    assert checkpoint.tensors["t"].encoding == kind.name


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"], ids=str)
def test_plain_numbers_have_the_dtypes_of_torch(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    content = np.zeros((2, 4 * gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    dtypes = {
        "F32": "f4",
        "F16": "f2",
        "F64": "f8",
        "I8": "i1",
        "I16": "i2",
        "I32": "i4",
        "I64": "i8",
    }
    if kind.name == "BF16":
        writer.add_tensor("t", content, raw_dtype=kind)
    else:
        writer.add_tensor("t", content.view(dtypes[kind.name]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = Checkpoint.open(tmp_path)
    assert_same(checkpoint, [tmp_path / "model.gguf"])
    assert checkpoint.tensors["t"].shape == (2, 4)


def test_layers_are_found_by_the_names_of_ggml(tmp_path):
    layers = group_layers(Checkpoint.open(model(tmp_path / "model.gguf")))
    assert [(layer.name, layer.kind) for layer in layers] == [
        ("token_embd", LayerKind.EMBEDDING),
        ("blk.0", LayerKind.BLOCK),
        ("blk.1", LayerKind.BLOCK),
        ("output_norm+output", LayerKind.HEAD),
    ]


def test_a_plan_knows_experts_and_unpacked_shapes_from_the_header_alone(tmp_path):
    experts = (np.zeros((4, 16, 32), np.float32), Q8_0)
    block = {f"blk.1.ffn_{name}_exps.weight": experts for name in ("gate", "up")}
    tensors = {"blk.1.attn_q.weight": (matrix(), Q8_0), "a": (matrix(8, 8), F32), **block}
    checkpoint = Checkpoint.open(write_gguf(tmp_path / "m.gguf", tensors, describe=describe))
    trunk, sources = split_experts(checkpoint, list(checkpoint.tensors))
    assert trunk == ("blk.1.attn_q.weight", "a")
    assert [(each.module, each.experts, each.per_token) for each in sources] == [("blk.1", 4, 2)]
    assert [each.shape for each in sources[0].tensors] == [(16, 34)] * 2
    assert main_dtype(checkpoint) == "float32"
    assert block_shapes(checkpoint) == ((2, 32),)


def test_a_large_header_is_read_in_growing_ranges(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, {"t": (matrix(), F32)}, describe=lambda w: describe(w, vocabulary=200_000))
    checkpoint = Checkpoint.open(path)
    assert_same(checkpoint, [path])
    assert checkpoint.config["vocab_size"] == 200_000


@pytest.mark.parametrize("opened", [0, 1, None], ids=["first part", "second part", "folder"])
def test_a_model_in_parts_opens_whole(tmp_path, opened):
    files = parts(tmp_path)
    assert len(files) == 3
    checkpoint = Checkpoint.open(tmp_path if opened is None else files[opened])
    assert_same(checkpoint, files)
    assert checkpoint.config["num_hidden_layers"] == 2


def test_the_projector_for_images_is_not_the_model(tmp_path):
    path = model(tmp_path / "model.gguf")
    (tmp_path / "mmproj-F16.gguf").write_bytes(b"not opened")
    checkpoint = Checkpoint.open(tmp_path)
    assert_same(checkpoint, [path])
    assert checkpoint.ignored_files == ("mmproj-F16.gguf",)


def two_models(at):
    for name in ("b.gguf", "a.gguf", "mmproj.gguf"):
        model(at / name)
    return at


def projector_only(at):
    return model(at / "mmproj.gguf").parent


def without_a_part(at):
    files = parts(at)
    files[1].unlink()
    return files[0]


def renamed_parts(at):
    files = parts(at)
    other = files[2].rename(at / "other")
    files[1].rename(files[2])
    other.rename(files[1])
    return at


def single_part(at):
    return parts(at)[1].rename(at / "alone.gguf")


UNCLEAR = {
    "two models": (two_models, "holds 2 GGUF models (a.gguf, b.gguf): open one of these"),
    "only a projector": (projector_only, "holds no GGUF model"),
    "a part is absent": (without_a_part, "m-00002-of-00003.gguf cannot be opened: it is not there"),
    "parts in disorder": (renamed_parts, "says that it is part 3 of 3, and was found as part 2"),
    "a part alone": (single_part, "says that it is part 2 of 3, and was found as part 1 of 1"),
}


@pytest.mark.parametrize(("prepare", "says"), UNCLEAR.values(), ids=UNCLEAR.keys())
def test_unclear_folders_are_refused_with_what_to_do(tmp_path, prepare, says):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(prepare(tmp_path))
    assert says in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def value(name=b"k", kind=4, content=b"\0\0\0\0") -> bytes:
    return text(name) + struct.pack("<I", kind) + content


def array(kind=4, count=1, content=b"\0\0\0\0") -> bytes:
    return value(kind=9, content=struct.pack("<IQ", kind, count) + content)


def tensor(name=b"t", sizes=(8,), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def header(*items, version=3, tensors=0, values=0, magic=b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, values) + b"".join(items) + bytes(160)


def tensors(*items) -> bytes:
    return header(*items, tensors=len(items))


def values(*items) -> bytes:
    return header(*items, values=len(items))


MALFORMED = {
    "no magic": (header(magic=b"GGML"), "does not begin with GGUF"),
    "version 1": (header(version=1), "is of GGUF version 1, where 2 and 3 are supported"),
    "version 4": (header(version=4), "is of GGUF version 4"),
    "big-endian": (header(version=3 << 24), "is a big-endian GGUF file"),
    "nothing": (b"", "truncated within its header"),
    "the start of a header": (b"GGUF\3\0\0\0", "truncated within its header"),
    "many tensors": (header(tensors=1 << 60), "more than it has room for"),
    "many values": (header(values=1 << 60), "more than it has room for"),
    "a long name": (values(struct.pack("<Q", 70_000)), "length that exceeds the file"),
    "a name that is no text": (values(value(name=b"\xff")), "name that is not UTF-8"),
    "a long string": (values(value(kind=8, content=struct.pack("<Q", 1 << 62))), "exceeds the file"),
    "a long array": (values(array(count=1 << 40)), "exceeds the file"),
    "many strings": (values(array(kind=8, count=150, content=text(b"a"))), "truncated"),
    "a long string in an array": (
        values(array(kind=8, count=3, content=text(b"a") + b"\xff" * 16)),
        "exceeds the file",
    ),
    "arrays in arrays": (values(array(kind=9, content=struct.pack("<IQ", 9, 1) * 8)), "arrays in arrays"),
    "an unknown value": (values(value(kind=13)), "of the unknown type 13"),
    "a value twice": (values(value(), value()), "has metadata 'k' twice"),
    "an odd alignment": (
        values(value(name=b"general.alignment", content=struct.pack("<I", 48))), "no power of two"
    ),
    "a long alignment": (
        values(value(name=b"general.alignment", kind=10, content=bytes(8))), "no unsigned 32-bit number"
    ),
    "five dimensions": (tensors(tensor(sizes=(1,) * 5)), "'t' has 5 dimensions"),
    "a huge shape": (tensors(tensor(sizes=(1 << 40, 1 << 40))), "more than 2**60 elements"),
    "a tensor twice": (tensors(tensor(), tensor(offset=32)), "'t' occurs twice"),
    "a tensor over another": (tensors(tensor(), tensor(name=b"u")), "'u' overlaps 't'"),
    "a tensor off the grid": (tensors(tensor(offset=4)), "starts at byte 4, no multiple of 32"),
    "a tensor beyond the end": (tensors(tensor(offset=320)), "which is truncated"),
    "rows of half blocks": (tensors(tensor(sizes=(40,), kind=2)), "no multiple of Q4_0's 32"),
    "a scalar of blocks": (tensors(tensor(sizes=(), kind=2)), "no multiple of Q4_0's 32"),
    "a withdrawn type": (tensors(tensor(kind=4)), "type Q4_2 (number 4), which cannot be unpacked"),
    "an unknown type": (tensors(tensor(kind=99)), "type unknown (number 99)"),
    "a safetensors file": (struct.pack("<Q", 42) + b"{}" + b" " * 40, "does not begin with GGUF"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "says"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_header_is_refused_by_name(tmp_path: Path, content, says):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    message = str(caught.value)
    assert says in message
    assert str(path) in message
    assert message.endswith(".")
    assert "\n" not in message
