"""Opening checkpoints: real ones equal what safetensors reads, broken ones are refused in one clear sentence."""

import asyncio
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import aiofiles
import pytest
import torch
from safetensors.torch import load_file, save_file

from layerstream.pipeline.checkpoint import checkpoint as checkpoint_module
from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.stages.errors import CheckpointError
from layerstream.stages.readers import guard as guard_module

INDEX = "model.safetensors.index.json"
DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32,
    torch.uint64, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex64, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2,
    torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2,
]  # fmt: skip

openings = pytest.mark.parametrize(
    "opened",
    [Checkpoint.open, lambda path: asyncio.run(Checkpoint.open_async(path))],
    ids=["open", "open_async"],
)


def tensor_bytes(checkpoint: Checkpoint, name: str) -> bytes:
    info = checkpoint.tensors[name]
    with checkpoint.files[info.file].path.open("rb") as stream:
        stream.seek(info.offset)
        return stream.read(info.nbytes)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        info = checkpoint.tensors[name]
        assert (info.name, info.shape) == (name, tuple(tensor.shape))
        assert getattr(torch, info.dtype) == tensor.dtype
        assert tensor_bytes(checkpoint, name) == bytes_of(tensor)
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in expected.values())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("sharded")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=12,
        num_attention_heads=4,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    return folder


@openings
def test_a_sharded_model_of_transformers_opens(sharded, opened):
    checkpoint = opened(sharded)
    names = [file.path.name for file in checkpoint.files]
    assert len(names) > 10
    assert names == sorted(names)
    assert checkpoint.config["model_type"] == "llama"
    assert_same(
        checkpoint,
        {name: t for file in checkpoint.files for name, t in load_file(file.path).items()},
    )


@openings
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_file_of_any_dtype_opens_with_the_config_next_to_it(tmp_path, dtype, opened):
    tensors = {
        "matrix": torch.zeros(3, 16, dtype=torch.uint8).view(dtype),
        "empty": torch.zeros(0, 16, dtype=torch.uint8).view(dtype),
        "scalar": torch.tensor(1.5),
    }
    save_file(tensors, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "x", "limit": Infinity}')
    checkpoint = opened(tmp_path / "weights.safetensors")
    assert_same(checkpoint, tensors)
    assert checkpoint.config["model_type"] == "x"


def test_shards_without_an_index_open_in_natural_order(tmp_path):
    for number in (10, 9, 1):
        save_file({f"t{number}": torch.zeros(2)}, tmp_path / f"part-{number}.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == ["t1", "t9", "t10"]
    assert checkpoint.config is None


def test_only_shards_that_the_index_names_are_opened(tmp_path):
    save_file({"a": torch.zeros(2), "unlisted": torch.zeros(2)}, tmp_path / "one.safetensors")
    (tmp_path / "stray.safetensors").write_bytes(b"not opened")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "one.safetensors"}}')
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == {"a", "unlisted"}
    assert checkpoint.ignored_files == ("stray.safetensors",)


def test_the_index_decides_which_of_two_tensors_of_a_name_counts(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2), "c": torch.zeros(2)}, tmp_path / "two.safetensors")
    weight_map = {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert tensor_bytes(Checkpoint.open(tmp_path), "a") == bytes_of(torch.ones(2))


def test_the_single_file_wins_over_an_index_that_an_earlier_save_left_behind(tmp_path):
    """As in transformers, whose save_pretrained removes old shards, but not their index."""
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    checkpoint = Checkpoint.open(tmp_path)
    assert [file.name for file in checkpoint.files] == ["model.safetensors"]
    assert checkpoint.ignored_files == ("adapter_model.safetensors",)


def test_a_snapshot_of_the_hub_cache_opens_through_its_links(sharded, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sharded.iterdir()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert Checkpoint.open(snapshot).tensors == Checkpoint.open(sharded).tensors


def test_a_relative_path_is_made_absolute(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert Checkpoint.open(".").files[0].path == tmp_path / "model.safetensors"


def weights(folder: Path, name: str = "model.safetensors", tensor: str = "a") -> Path:
    save_file({tensor: torch.zeros(2)}, folder / name)
    return folder


def index(folder: Path, text: str) -> Path:
    (folder / INDEX).write_text(text)
    return folder


def mapped(folder: Path, tensor: str, file: str) -> Path:
    return index(folder, json.dumps({"weight_map": {"a": "one.safetensors", tensor: file}}))


def write(folder: Path, name: str, content: bytes = b"") -> Path:
    (folder / name).write_bytes(content)
    return folder


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path.parent


ONE = "one.safetensors"
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a missing folder": (lambda at: at / "absent", "absent cannot be opened: it is not there"),
    "a file in the place of a folder": (
        lambda at: weights(at) / "model.safetensors" / "more",
        "a part of its path is a file",
    ),
    "a path with a NUL byte": (lambda at: at / "a\0b", "cannot be opened"),
    "a pipe": (lambda at: pipe(at / "model.safetensors"), "is not a regular file"),
    "an empty folder": (lambda at: at, "holds no weights"),
    "other pickles": (
        lambda at: write(at, "training_args.bin"),
        "holds no weights: give the folder that model.safetensors or pytorch_model.bin or *.gguf",
    ),
    "weights of another framework": (
        lambda at: write(at, "tf_model.h5"), "tf_model.h5 is not supported: convert it"
    ),
    "a file of another framework": (lambda at: write(at, "a.h5") / "a.h5", "is not supported: convert it"),
    "a folder named as weights": (
        lambda at: (at / ONE).mkdir() or mapped(at, "a", ONE),
        f"{ONE} is not a regular file",
    ),
    "a dangling link": (lambda at: link(at / ONE, "nowhere"), "it is not there"),
    "links in a circle": (lambda at: link(at / ONE, ONE), "links lead round in a circle"),
    "a shard that is absent": (
        lambda at: mapped(weights(at, ONE), "b", "two.safetensors"),
        f"two.safetensors is not there, but {INDEX} names it",
    ),
    "an index that climbs out": (
        lambda at: mapped(weights(at, ONE), "b", "sub/../../two.safetensors"),
        "places tensor 'b' in 'sub/../../two.safetensors', outside its own folder",
    ),
    "an index that points away": (
        lambda at: mapped(weights(at, ONE), "b", "/etc/passwd"),
        "places tensor 'b' in '/etc/passwd', outside its own folder",
    ),
    "an index with a NUL byte": (
        lambda at: mapped(weights(at, ONE), "b", "two\0"), "cannot be opened"
    ),
    "an index with a number": (
        lambda at: index(weights(at, ONE), '{"weight_map": {"b": 1}}'), "which is no file name"
    ),
    "an index without a map": (lambda at: index(weights(at, ONE), "{}"), "has no weight_map"),
    "an index that is a list": (lambda at: index(weights(at, ONE), "[]"), "holds a JSON list"),
    "an index that is no JSON": (lambda at: index(weights(at, ONE), "{"), "is not valid JSON"),
    "two indices": (
        lambda at: write(write(at, "x.safetensors.index.json"), "y.safetensors.index.json"),
        "several indices",
    ),
    "an index that names the wrong shard": (
        lambda at: mapped(weights(weights(at, ONE), "two.safetensors", "b"), "b", ONE)
        and index(at, f'{{"weight_map": {{"b": "{ONE}", "c": "two.safetensors"}}}}'),
        f"tensor 'b' in {ONE}, which lacks it; it is in two.safetensors",
    ),
    "an index that names a tensor in no file": (
        lambda at: mapped(weights(at, ONE), "b", ONE), f"tensor 'b' in {ONE}, which lacks it;"
    ),
    "a tensor in two shards": (
        lambda at: weights(weights(at, ONE), "two.safetensors"),
        f"tensor 'a' is in {ONE} and in two.safetensors",
    ),
    "a broken config": (lambda at: write(weights(at), "config.json", b"{"), "is not valid JSON"),
}  # fmt: skip


@openings
@pytest.mark.parametrize(("prepare", "says"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_in_one_sentence_that_names_the_file(tmp_path, prepare, says, opened):
    path = prepare(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        opened(path)
    message = str(caught.value)
    assert says in message
    assert str(tmp_path) in message
    assert "\n" not in message


@openings
def test_every_broken_shard_is_named(tmp_path, opened):
    names = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.ones(3)}, tmp_path / name)
    weight_map = {f"t{number}": name for number, name in enumerate(names)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / names[0]).unlink()
    for name in names[1:3]:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="3 files of ") as caught:
        opened(tmp_path)
    assert [name in str(caught.value) for name in names] == [True, True, True, False]
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    (weights(tmp_path) / "model.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match="permission denied"):
        Checkpoint.open(tmp_path)


@openings
@pytest.mark.parametrize(("times", "opens"), [(3, True), (4, False)])
def test_headers_that_cannot_be_read_for_a_moment_are_read_at_the_fourth_attempt(
    opened, times, opens, sharded, monkeypatch
):
    failed = {}

    def failing(works):
        def fail_first(path, *given, **named):
            failed[path] = failed.get(path, 0) + 1
            if failed[path] <= times:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return works(path, *given, **named)

        return fail_first

    monkeypatch.setattr(guard_module, "_PAUSES_SECONDS", (0.001, 0.001, 0.001))
    monkeypatch.setattr(checkpoint_module.Path, "open", failing(Path.open))
    monkeypatch.setattr(checkpoint_module.aiofiles, "open", failing(aiofiles.open))
    if opens:
        assert opened(sharded).tensors
    else:
        with pytest.raises(CheckpointError, match="Input/output error"):
            opened(sharded)
