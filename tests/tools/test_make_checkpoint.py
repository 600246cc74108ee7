"""Checkpoints made here are what transformers and safetensors would have written."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from layerstream.stages.errors import CheckpointError
from layerstream.stages.text import format_bytes, parse_bytes
from layerstream.tools.cli import main
from layerstream.tools.console.token_text import TerminalText, TokenText
from layerstream.tools.synthetic import checkpoints
from layerstream.tools.synthetic.checkpoints import CheckpointSpec, make_checkpoint
from layerstream.tools.synthetic.families import FAMILIES, scaled
from layerstream.tools.synthetic.shapes import tensors_of

TINY = ["--layers", "2", "--hidden", "64", "--vocab", "300"]

# Parameters of the public models; a tied table counts once.
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mixtral-8x7b": 46_702_792_704,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v3": 671_026_419_200,
    "gemma-3-1b": 999_885_952,
}


def make(folder, *arguments, like="demo"):
    assert main(["make-checkpoint", str(folder), "--like", like, *arguments]) == 0
    return folder


def tiny_spec(**changes):
    config = scaled(FAMILIES["demo"].config, layers=2, hidden=64, vocab=300)
    defaults = {"dtype": "bfloat16", "max_shard_bytes": 1 << 30, "seed": 0, "sparse": False}
    return CheckpointSpec(family="demo", config=config, **(defaults | changes))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error_line(capsys, *arguments):
    assert main(["make-checkpoint", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("layerstream: error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(("family", "count"), PARAMETERS.items(), ids=PARAMETERS)
def test_a_family_has_as_many_parameters_as_the_public_model(family, count):
    assert sum(tensor.numel for tensor in tensors_of(FAMILIES[family].config)) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_each_family_with_nothing_missing_or_unexpected(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    folder = make(tmp_path / "model", *TINY, like=family)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert type(model).__name__ == FAMILIES[family].config["architectures"][0]
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("like", ["demo", "mixtral-8x7b", "deepseek-v3"])
def test_files_are_byte_for_byte_what_safetensors_writes(tmp_path, dtype, like):
    folder = make(tmp_path / "model", *TINY, "--dtype", dtype, like=like)
    tensors = load_file(folder / "model.safetensors")
    own = {torch.float32} if like == "deepseek-v3" else set()
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)} | own
    save_file(tensors, tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert (folder / "model.safetensors").read_bytes() == (
        tmp_path / "again.safetensors"
    ).read_bytes()


def test_random_weights_have_the_usual_scale_and_do_not_repeat_between_tensors(tmp_path):
    tensors = load_file(make(tmp_path / "model", *TINY) / "model.safetensors")
    first = tensors["model.layers.0.mlp.up_proj.weight"].float()
    second = tensors["model.layers.1.mlp.up_proj.weight"].float()
    assert first.std().item() == pytest.approx(0.02, rel=0.1)
    assert first.mean().item() == pytest.approx(0, abs=0.002)
    assert not torch.equal(first, second)
    assert tensors["model.norm.weight"].eq(1).all()


def test_shards_hold_what_the_index_says_within_their_size(tmp_path):
    folder = make(tmp_path / "model", *TINY, "--max-shard-size", "64KiB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    held = {name: shard.name for shard in shards for name in load_file(shard)}
    assert held == index["weight_map"]
    whole = load_file(make(tmp_path / "whole", *TINY) / "model.safetensors")
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 64 << 10
        assert all(torch.equal(whole[name], tensor) for name, tensor in tensors.items())


def test_the_seed_decides_the_weights(tmp_path):
    same = [contents(make(tmp_path / name, *TINY))["model.safetensors"] for name in "ab"]
    other = contents(make(tmp_path / "c", *TINY, "--seed", "1"))["model.safetensors"]
    assert same[0] == same[1] != other


def test_a_sparse_405b_takes_almost_no_disk_and_has_true_headers(tmp_path, capsys):
    folder = tmp_path / "model"
    make(folder, "--sparse", "--json", like="llama-3.1-405b")
    report = json.loads(capsys.readouterr().out)
    files = list(folder.iterdir())
    assert report["total_bytes"] > 811 * 10**9
    assert sum(file.stat().st_size for file in files) > report["total_bytes"]
    assert sum(file.stat().st_blocks for file in files) * 512 < 16 << 20
    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][
        "model.layers.77.mlp.up_proj.weight"
    ]
    with (folder / shard).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["model.layers.77.mlp.up_proj.weight"]["shape"] == [53248, 16384]


def test_an_existing_checkpoint_is_reused(tmp_path, capsys):
    folder = make(tmp_path / "model", *TINY)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    make(folder, *TINY, "--json")
    assert json.loads(capsys.readouterr().out)["reused"] is True
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("harm", ["missing", "truncated", "interrupted"])
def test_an_incomplete_checkpoint_is_written_again(tmp_path, harm):
    folder = make(tmp_path / "model", *TINY)
    whole = contents(folder)
    weights = folder / "model.safetensors"
    if harm == "missing":
        weights.unlink()
    elif harm == "truncated":
        weights.write_bytes(whole[weights.name][:-1])
    else:
        record = json.loads(whole["layerstream-checkpoint.json"])
        (folder / "layerstream-checkpoint.json").write_text(
            json.dumps({**record, "complete": False})
        )
        (folder / "model.safetensors.partial").write_bytes(b"half")
    make(folder, *TINY)
    assert contents(folder) == whole


def test_another_spec_replaces_all_files_of_the_earlier_checkpoint(tmp_path):
    folder = make(tmp_path / "model", *TINY, "--max-shard-size", "64KiB")
    make(folder, *TINY)
    assert set(contents(folder)) == set(contents(make(tmp_path / "fresh", *TINY)))


def test_an_interruption_leaves_no_weights_behind_and_the_next_run_completes(tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path, tiny_spec(), advance=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["layerstream-checkpoint.json"]
    assert not make_checkpoint(tmp_path, tiny_spec()).reused
    assert make_checkpoint(tmp_path, tiny_spec()).reused


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("the only copy")
    assert "choose a new or empty folder" in error_line(capsys, tmp_path, "--like", "demo")
    assert contents(tmp_path) == {"thesis.txt": b"the only copy"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in error_line(capsys, file, "--like", "demo")
    assert "Not a directory" in error_line(capsys, file / "below", "--like", "demo", *TINY)


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"files": {"../thesis.txt": 1}}'])
def test_a_damaged_record_is_refused(tmp_path, capsys, record):
    (tmp_path / "thesis.txt").touch()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "layerstream-checkpoint.json").write_text(record)
    assert "is damaged" in error_line(capsys, folder, "--like", "demo", *TINY)
    assert (tmp_path / "thesis.txt").exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = checkpoints.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs .* KiB and the disk .* has 0\.977 KiB"):
        make_checkpoint(tmp_path / "model", tiny_spec())
    assert not (tmp_path / "model").exists()
    make_checkpoint(tmp_path / "model", tiny_spec(sparse=True))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--like", "nonesuch"],
        ["--like", "demo", "--layers", "0"],
        ["--like", "demo", "--hidden", "100"],
        ["--like", "demo", "--max-shard-size", "large"],
        ["--like", "demo", "--seed", "-1"],
        ["--like", "bench-moe", "--skew", "-1"],
        ["--like", "bench-moe", "--skew", "nan"],
        [],
    ],
    ids=str,
)
def test_wrong_usage_is_exit_code_2(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(["make-checkpoint", str(tmp_path / "model"), *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert "nonesuch" not in arguments or "llama-3.1-405b" in error


def test_transformers_loads_the_tokenizer_which_reproduces_every_text(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(make(tmp_path / "model", *TINY))
    text = "Es war einmal, 昔々, жил-был 🐉\n\ttabs  and spaces "
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer("</s>")["input_ids"] == [tokenizer.eos_token_id] == [257]
    stream = TokenText(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) == text
    assert "🐉" in pieces


def test_unknown_ids_are_shown_as_numbers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(make(tmp_path / "model", *TINY))
    stream = TerminalText(tokenizer)
    half, escape, end = 0xF0, 0x1B, 257
    tokens = [ord("a"), half, 299, ord("b"), escape, end, half]
    assert "".join(map(stream.add, tokens)) + stream.finish() == "a\ufffd<299>b\ufffd\ufffd"
    assert TerminalText(None).add(7) == "<7>"


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = make(tmp_path_factory.mktemp("bytes") / "model", *TINY)
    return transformers.AutoTokenizer.from_pretrained(folder)


@given(st.lists(st.sampled_from([*"🐉é b".encode(), 0xFF, 0x1B, 257, 299])))
def test_joined_pieces_are_the_text_of_all_tokens_at_once(byte_tokenizer, tokens):
    stream = TokenText(byte_tokenizer)
    pieces = "".join(map(stream.add, tokens)) + stream.finish()
    assert pieces == byte_tokenizer.decode(tokens, skip_special_tokens=True)


def test_making_headers_loads_neither_torch_nor_transformers(tmp_path):
    code = (
        "import sys; from layerstream.tools.cli import main;"
        "assert main(['make-checkpoint', sys.argv[1], '--like', 'demo', '--sparse']) == 0;"
        "sys.exit(', '.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("4GiB", 4 << 30), ("900 MB", 900 * 10**6), ("1.5kib", 1536), ("7b", 7)],
)
def test_sizes_are_read_with_and_without_units(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "1e9", "4 gigs", "1.2.3", "0.1B"])
def test_invalid_sizes_are_refused(text):
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1023.9 * 1024, "1 MiB"),
        (12_345_678, "11.8 MiB"),
        (811_707_020_523, "756 GiB"),
    ],
)
def test_sizes_are_printed_with_three_digits(count, text):
    assert format_bytes(count) == text
