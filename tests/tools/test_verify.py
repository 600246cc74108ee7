"""`layerstream verify`: damaged files are found and named."""

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.models import save_model

from layerstream.pipeline.checkpoint.digests import FileDigests, FilePiece
from layerstream.tools.cli import main
from layerstream.tools.integrity import changes_of


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_shards(folder: Path) -> list[Path]:
    """Three shards with an index, as save_pretrained writes them."""
    folder.mkdir(parents=True)
    names = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    for number, name in enumerate(names):
        save_file({f"layers.{number}.weight": torch.full((64, 64), number)}, folder / name)
    index = {"weight_map": {f"layers.{number}.weight": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return [folder / name for name in names]


def flip(path: Path, at: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def verify(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main(["verify", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return save_shards(tmp_path / "model")


@pytest.fixture
def digests(shards: list[Path], tmp_path: Path) -> Path:
    """The digests of the shards and the config, as sha256sum writes them."""
    files = [*shards, shards[0].with_name("config.json")]
    path = tmp_path / "SHA256SUMS"
    path.write_text(
        "".join(f"{sha256(file)} {' *'[n % 2]}{file.name}\n" for n, file in enumerate(files))
    )
    return path


def test_without_digests_the_structure_is_checked_and_that_is_said(
    shards: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = verify(capsys, shards[0].parent)
    assert (code, err) == (0, "")
    assert "3 tensors, each whole" in out
    assert f"no digest is recorded of {', '.join(shard.name for shard in shards)}" in out


def test_a_flipped_byte_is_found_and_its_file_is_named(
    shards: list[Path], digests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = verify(capsys, shards[0].parent, "--digests", digests)
    assert code == 0
    assert "4 of 4 files equal their SHA-256 digests" in out
    flip(shards[1])
    code, out, err = verify(capsys, shards[0].parent, "--digests", digests)
    assert (code, out) == (1, "")
    assert [name.name in err for name in shards] == [False, True, False]
    assert "is corrupt" in err
    code, out, _ = verify(capsys, shards[0].parent, "--digests", digests, "--json")
    report = json.loads(out)
    assert (code, report["intact"], len(report["problems"])) == (1, False, 1)
    assert [file["name"] for file in report["files"] if file["problem"]] == [shards[1].name]


def test_all_faults_are_told_not_just_the_first(
    shards: list[Path], digests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(shards[0])
    shards[0].with_name("config.json").unlink()
    lines = digests.read_text().splitlines(keepends=True)
    digests.write_text("".join([*lines[:2], *lines[3:]]))
    code, _, err = verify(capsys, shards[0].parent, "--digests", digests)
    assert code == 1
    assert f"{shards[0]} is corrupt" in err
    assert f"{shards[2]} has no digest" in err
    assert "config.json is not there" in err


@pytest.mark.parametrize("as_json", [True, False])
def test_a_missing_shard_is_named(
    shards: list[Path], as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    shards[2].unlink()
    code, out, err = verify(capsys, shards[0].parent, *(["--json"] if as_json else []))
    assert code == 1
    assert f"{shards[2].name} is not there" in (json.loads(out)["problems"][0] if as_json else err)


def test_files_in_the_hubs_cache_are_compared_with_their_names(
    tmp_path: Path, shards: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    blobs, snapshot = (
        tmp_path / "models--org--name/blobs",
        tmp_path / "models--org--name/snapshots/main",
    )
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in shards[0].parent.iterdir():
        name = sha256(file) if file in shards else hashlib.sha1(file.read_bytes()).hexdigest()  # noqa: S324
        file.rename(blobs / name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / name)
    code, out, _ = verify(capsys, snapshot)
    assert code == 0
    assert "3 of 3 files equal" in out
    flip(snapshot / shards[0].name)
    code, _, err = verify(capsys, snapshot)
    assert code == 1
    assert f"{snapshot / shards[0].name} is corrupt" in err


def test_files_that_the_hub_downloaded_to_a_folder_have_digests_beside_them(
    shards: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    beside = shards[0].parent / ".cache/huggingface/download"
    beside.mkdir(parents=True)
    for shard in shards:
        (beside / f"{shard.name}.metadata").write_text(
            f"{'0' * 40}\n{sha256(shard)}\n1700000000.5\n"
        )
    flip(shards[2])
    code, _, err = verify(capsys, shards[0].parent)
    assert code == 1
    assert f"{shards[2]} is corrupt" in err


def test_recorded_digests_name_the_tensor_and_generate_checks_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    generate = ["generate", str(folder), "--prompt-ids", "5,6", "--max-new-tokens", "2"]
    assert main([*generate, "--verify"]) == 1
    assert "no SHA-256 digest is recorded of model.safetensors" in capsys.readouterr().err
    assert verify(capsys, folder, "--record")[0] == 0
    assert main([*generate, "--verify"]) == 0
    flip(folder / "model.safetensors")
    for command in (["verify", str(folder)], [*generate, "--verify"]):
        capsys.readouterr()
        assert main(command) == 1
        assert "is corrupt: tensor 'model.norm.weight'" in capsys.readouterr().err


def test_digests_that_cannot_be_written_are_an_error(
    shards: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = verify(capsys, shards[0].parent, "--record", shards[0] / "sums")
    assert code == 1
    assert "cannot be recorded" in err


def test_a_record_of_other_content_is_replaced_only_when_told(
    shards: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shards[0].parent
    record = folder / "layerstream.sha256"
    assert verify(capsys, folder, "--record")[0] == 0
    before = record.read_bytes()
    assert verify(capsys, folder, "--record")[0] == 0
    flip(shards[1])
    code, _, err = verify(capsys, folder, "--record")
    assert code == 1
    assert f"{shards[1].name} has other bytes in tensor 'layers.1.weight'" in err
    assert shards[0].name not in err
    assert record.read_bytes() == before
    assert verify(capsys, folder, "--record", "--overwrite")[0] == 0
    assert record.read_bytes() != before
    assert verify(capsys, folder)[0] == 0


def test_a_file_that_is_no_record_of_tensors_is_not_replaced_by_one(
    shards: list[Path], digests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests.read_bytes()
    for content in (before, b"notes"):
        digests.write_bytes(content)
        assert verify(capsys, shards[0].parent, "--record", digests)[0] == 1
        assert digests.read_bytes() == content
    assert verify(capsys, shards[0].parent, "--record", digests, "--overwrite")[0] == 0


def test_changes_of_a_record_are_named() -> None:
    def file(*pieces: tuple[str | None, str]) -> FileDigests:
        return FileDigests(
            size_bytes=len(pieces),
            pieces=tuple(
                FilePiece(at, 1, tensor, digest) for at, (tensor, digest) in enumerate(pieces)
            ),
        )

    before = {"a": file((None, "1"), ("t", "2")), "b": file(("t", "3")), "c": file(("t", "4"))}
    now = {"a": file((None, "5"), ("t", "2")), "d": file(("t", "3")), "c": file()}
    assert changes_of(before, now) == [
        "b is gone",
        "a has other bytes in its header",
        "d is new",
        "c has lost 't'",
    ]
    moved = {
        "a": FileDigests(
            size_bytes=9, pieces=(FilePiece(0, 4, None, "9"), FilePiece(4, 1, "t", "2"))
        )
    }
    assert changes_of({"a": before["a"]}, moved) == ["a has other bytes in its header"]
    assert changes_of(before, before) == []


def test_a_record_for_which_there_is_no_room_leaves_the_old_one(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shards[0].parent
    assert verify(capsys, folder, "--record")[0] == 0
    before = (folder / "layerstream.sha256").read_bytes()

    def full(path: Path, _: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "replace", full)
    code, _, err = verify(capsys, folder, "--record", "--overwrite")
    assert code == 1
    assert "No space left" in err
    assert (folder / "layerstream.sha256").read_bytes() == before
    assert [path.name for path in folder.glob("*layerstream.sha256*")] == ["layerstream.sha256"]


def test_what_recording_has_done_is_said(
    shards: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shards[0].parent
    assert "are recorded in" in verify(capsys, folder, "--record")[1]
    assert "the content is that of" in verify(capsys, folder, "--record")[1]
    code, _, err = verify(capsys, folder, "--overwrite")
    assert code == 1
    assert "--overwrite goes with --record" in err


@pytest.mark.parametrize("kind", ["gguf", "bin"])
def test_a_file_of_another_format_that_ends_early_is_refused(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ("model.gguf" if kind == "gguf" else "pytorch_model.bin")
    if kind == "gguf":
        gguf = pytest.importorskip("gguf", reason="needs layerstream[hf]")
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("a", np.ones((32, 64), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        torch.save({"a": torch.ones(32, 64)}, path)
    assert verify(capsys, path)[0] == 0
    path.write_bytes(path.read_bytes()[:-4096])
    code, _, err = verify(capsys, path)
    assert (code, err.count("\n")) == (1, 1)
    assert str(path) in err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("abc  model.safetensors", "line 1, is not"),
        (f"{'0' * 64}  ../x", "not in the model's folder"),
    ],
)
def test_digests_that_cannot_be_meant_are_refused(
    shards: list[Path], tmp_path: Path, line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sums").write_text(line)
    code, _, err = verify(capsys, shards[0].parent, "--digests", tmp_path / "sums")
    assert code == 1
    assert says in err
