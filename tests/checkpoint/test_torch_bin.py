"""Files of torch.save: what torch.load reads of them, and what is refused."""

import asyncio
import json
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.torch_files import assert_same, write_archive

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.stages.errors import CheckpointError

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.uint16, torch.uint32,
    torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def loaded(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    "opened",
    [Checkpoint.open, lambda path: asyncio.run(Checkpoint.open_async(path))],
    ids=["open", "open_async"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_any_dtype_open_as_torch_loads_them(tmp_path, dtype, opened):
    path = tmp_path / "pytorch_model.bin"
    values = torch.arange(48).to(torch.uint8)
    tensors = {
        "b.matrix": values.view(dtype).view(2, -1),
        "a.scalar": values[:8].clone().view(dtype)[0],
        "empty": torch.zeros(0, 3, dtype=dtype),
    }
    torch.save(tensors, path)
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    checkpoint = opened(tmp_path)
    assert checkpoint.format == "torch.save"
    assert checkpoint.config == {"model_type": "x"}
    assert_same(checkpoint, loaded(path))


def test_shared_and_strided_memory_is_read_where_it_is(tmp_path):
    whole = torch.arange(60.0).view(5, 12)
    state = OrderedDict(
        whole=whole,
        again=whole,
        transposed=whole.T,
        rows=whole[1:3],
        columns=whole[:, 2:5],
        every_other=whole.view(-1)[3::2],
        repeated=whole[0].expand(4, 12),
        parameter=torch.nn.Parameter(whole[2]),
    )
    state._metadata = {"": {"version": 1}}  # what state_dict() of a module has
    torch.save(state, tmp_path / "m.bin")
    checkpoint = Checkpoint.open(tmp_path / "m.bin")
    assert_same(checkpoint, loaded(tmp_path / "m.bin"))
    places = {checkpoint.tensors[name].offset for name in ("whole", "again", "transposed")}
    assert len(places) == 1


def test_shards_open_through_their_index(tmp_path):
    for number in (1, 2):
        torch.save({f"t{number}": torch.ones(number)}, tmp_path / f"pytorch_model-{number}.bin")
    weight_map = {f"t{number}": f"pytorch_model-{number}.bin" for number in (1, 2)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save({"lr": 1}, tmp_path / "optimizer.bin")
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == {"t1", "t2"}
    assert checkpoint.ignored_files == ("optimizer.bin",)


def test_safetensors_are_preferred_as_in_transformers(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    save_file({"b": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert list(Checkpoint.open(tmp_path).tensors) == ["b"]


def test_an_archive_of_a_large_one_s_kind_is_read(tmp_path):
    """With 64-bit sizes in the directory, as archives beyond 4 GiB have them."""
    torch.save({"a": torch.arange(100.0)}, tmp_path / "m.bin")
    with (
        zipfile.ZipFile(tmp_path / "m.bin") as source,
        zipfile.ZipFile(tmp_path / "large.bin", "w") as target,
    ):
        for name in source.namelist():
            with target.open(name, "w", force_zip64=True) as stream:
                stream.write(source.read(name))
    content = bytearray((tmp_path / "large.bin").read_bytes())
    end = content.rfind(b"PK\x05\x06")
    count, size, offset = struct.unpack_from("<HII", content, end + 10)
    large = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    content[end + 8 : end + 20] = b"\xff" * 12
    (tmp_path / "large.bin").write_bytes(content[:end] + large + locator + content[end:])
    assert_same(Checkpoint.open(tmp_path / "large.bin"), loaded(tmp_path / "m.bin"))


class Evil:
    def __reduce__(self):
        return print, ("never",)


def rewritten(path, change, *, compression=zipfile.ZIP_STORED):
    """A file of torch.save whose entries ``change`` has changed."""
    torch.save({"a": torch.arange(10.0)}, path.with_name("original"))
    with zipfile.ZipFile(path.with_name("original")) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    entries = {name.replace("original/", "m/"): content for name, content in entries.items()}
    change(entries)
    write_archive(path, entries, compression)


def saved(state, **options):
    return lambda path: torch.save(state, path, **options)


def changed(change, **options):
    return lambda path: rewritten(path, change, **options)


def with_pickle(content):
    return changed(lambda entries: entries.update({"m/data.pkl": content}))


def cut(path):
    torch.save({"a": torch.zeros(10)}, path)
    path.write_bytes(path.read_bytes()[:-200])


BAD = {
    "code": (saved({"a": Evil()}), "pickle that is of '__builtin__.print', which is no tensor"),
    "other objects": (saved({"a": np.zeros(2)}), "which is no tensor"),
    "a number": (saved({"a": torch.zeros(2), "epoch": 3}), "holds int by the name 'epoch'"),
    "states of a training": (saved({"model": {"a": torch.zeros(2)}}), "holds Dict by the name"),
    "a list": (saved([torch.zeros(2)]), "holds a list, not a dict of tensors"),
    "the old format": (
        saved({"a": torch.zeros(2)}, _use_new_zipfile_serialization=False),
        "is in torch's format from before version 1.6: load it with torch.load",
    ),
    "a conjugated tensor": (saved({"a": torch.zeros(2, dtype=torch.complex64).conj()}), "pending operations"),
    "a sparse tensor": (saved({"a": torch.eye(3).to_sparse()}), "which is no tensor"),
    "compressed entries": (changed(lambda _: None, compression=zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
    "no pickle": (changed(lambda entries: entries.pop("m/data.pkl")), "has no data.pkl"),
    "no memory": (changed(lambda entries: entries.pop("m/data/0")), "of 40 bytes, which is not there"),
    "too little memory": (changed(lambda entries: entries.update({"m/data/0": b"1234"})), "of 40 bytes, which has 4"),
    "another byte order": (changed(lambda entries: entries.update({"m/byteorder": b"big"})), "of a big-endian machine"),
    "a program": (changed(lambda entries: entries.update({"m/constants.pkl": b""})), "is a TorchScript program"),
    "a truncated file": (cut, "has no directory at its end"),
    "nothing": (lambda path: path.write_bytes(b""), "has no directory at its end"),
    "a pickle that ends early": (with_pickle(b"\x80\x02}q"), "ends before its last instruction"),
    "a pickle that never ends": (with_pickle(b"\x80\x02" + b"(" * 50), "ends before its last instruction"),
    "a pickle without a stack": (with_pickle(b"\x80\x02R."), "damaged"),
    "an instruction of later protocols": (with_pickle(b"\x80\x04\x95" + bytes(8) + b"."), "instructions that are not allowed"),
    "keys of tuples": (with_pickle(b"\x80\x02})Ns."), "a dict with a tuple as a key"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("prepare", "says"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused_in_one_sentence(tmp_path, prepare, says, capsys):
    path = tmp_path / "m.bin"
    prepare(path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    message = str(caught.value)
    assert says in message
    assert str(path) in message
    assert "\n" not in message
    assert capsys.readouterr().out == ""


def test_a_pickle_of_nested_memos_takes_no_time(tmp_path):
    """Tuples of tuples of tuples, of which each is in the next one twice."""
    doubled = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(200))
    content = b"\x80\x02}X\1\0\0\0a" + b")" + doubled + b"s."
    assert len(pickle.loads(content)) == 1  # noqa: S301 - our own
    rewritten(tmp_path / "m.bin", lambda entries: entries.update({"m/data.pkl": content}))
    with pytest.raises(CheckpointError, match="holds tuple by the name 'a'"):
        Checkpoint.open(tmp_path / "m.bin")
