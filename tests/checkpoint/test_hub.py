"""Model ids: a local cache laid out as huggingface_hub does it, and a small hub on loopback."""

import hashlib
import json
import os
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from support.hub import COMMIT, Hub, HubHandler

from layerstream.pipeline.checkpoint.hub import (
    Lookup,
    resolve_model_path,
)
from layerstream.pipeline.checkpoint.weight_choice import WeightChoice
from layerstream.stages.errors import CheckpointError

hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SHARDED = {
    "config.json": b"{}",
    INDEX: json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode(),
    SHARDS[0]: b"first shard",
    SHARDS[1]: b"second shard",
}
SINGLE = {"config.json": b"{}", "model.safetensors": b"weights"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty local cache, in offline mode; tests that need a hub use ``online_hub``."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)
    return folder


def put_in_cache(cache, files, *, model_id="org/name", ref="main"):
    """Put ``files`` into the cache as huggingface_hub does: blobs, a ref, a snapshot of links."""
    repo = cache / f"models--{model_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / ref).write_text(COMMIT)
    for name, content in files.items():
        blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture
def online_hub(monkeypatch):
    with Hub({**SHARDED, "README.md": b"#", "consolidated.safetensors": b"twice"}) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        _go_online(monkeypatch, server.url)
        yield server
        hub.close_session()
        server.shutdown()
        thread.join()


def _go_online(monkeypatch, url):
    hub.close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def refusal(source, **kwargs):
    with pytest.raises(CheckpointError) as caught:
        resolve_model_path(source, Lookup(**kwargs))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_existing_folder_or_file_is_taken_as_it_is(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    assert resolve_model_path(tmp_path) == tmp_path
    assert resolve_model_path(str(file)) == file


def test_a_folder_here_wins_over_a_model_in_the_cache(cache):
    put_in_cache(cache, SINGLE)
    Path("org/name").mkdir(parents=True)
    assert resolve_model_path("org/name") == Path("org/name")


def test_a_revision_of_a_folder_is_refused_instead_of_ignored(tmp_path):
    assert "revision" in refusal(tmp_path, revision="main")


@pytest.mark.parametrize(
    "source",
    [
        "/no/such/folder",
        "./org/name",
        "a/b/c",
        "model.safetensors",
        "model.gguf",
        Path("org/name"),
        "org/name:file.bin",
        "org/name:../file.gguf",
        "org/name:/file.gguf",
        "org/name:",
    ],
    ids=str,
)
def test_what_cannot_be_a_model_id_is_a_missing_path(source):
    assert "No such file or folder" in refusal(source)


@pytest.mark.parametrize("files", [SINGLE, SHARDED], ids=["single", "sharded"])
def test_a_model_in_the_cache_is_found_without_the_network(cache, files):
    snapshot = put_in_cache(cache, files)
    assert resolve_model_path("org/name") == snapshot


def test_a_model_without_an_organisation_is_found_in_the_cache(cache):
    snapshot = put_in_cache(cache, SINGLE, model_id="gpt2")
    assert resolve_model_path("gpt2") == snapshot


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision_is_found_in_the_cache_by_name_or_commit(cache, revision):
    snapshot = put_in_cache(cache, SINGLE, ref="v1")
    assert resolve_model_path("org/name", Lookup(revision=revision)) == snapshot


def test_the_tensors_of_a_cached_snapshot_can_be_read_through_its_links(cache):
    put_in_cache(cache, SINGLE)
    folder = resolve_model_path("org/name")
    assert (folder / "model.safetensors").is_symlink()
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_model_that_is_nowhere_is_refused_offline():
    message = refusal("org/name")
    assert "org/name is neither a file or folder here nor complete in the local cache" in message
    assert "HF_HUB_OFFLINE" in message


@pytest.mark.parametrize("lost", [SHARDS[1], "config.json"])
def test_a_snapshot_that_was_cached_in_part_is_not_taken(cache, lost):
    put_in_cache(cache, {name: content for name, content in SHARDED.items() if name != lost})
    assert "nor complete in the local cache" in refusal("org/name")


def test_a_cached_link_whose_blob_is_gone_counts_as_missing(cache):
    snapshot = put_in_cache(cache, SHARDED)
    (snapshot / SHARDS[0]).resolve().unlink()
    assert "nor complete in the local cache" in refusal("org/name")


def test_an_invalid_index_is_left_for_the_checkpoint_to_refuse(cache):
    snapshot = put_in_cache(cache, {**SHARDED, INDEX: b"[]"})
    assert resolve_model_path("org/name") == snapshot


def test_an_unreachable_hub_fails_at_once_and_says_so(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
    _go_online(monkeypatch, url)  # the server is closed
    message = refusal("org/name", revision=COMMIT)
    assert "the hub could not give it (ConnectError" in message
    hub.close_session()


def test_a_model_that_is_not_cached_is_downloaded_once_without_unneeded_files(cache, online_hub):
    folder = resolve_model_path("org/name")
    assert folder == cache / "models--org--name" / "snapshots" / COMMIT
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == SHARDED
    online_hub.requests.clear()
    assert resolve_model_path("org/name") == folder
    assert online_hub.requests == []


def test_a_snapshot_that_was_cached_in_part_is_completed(cache, online_hub):
    put_in_cache(cache, {"config.json": SHARDED["config.json"], INDEX: SHARDED[INDEX]})
    folder = resolve_model_path("org/name")
    assert all((folder / shard).read_bytes() == SHARDED[shard] for shard in SHARDS)
    assert any(path.endswith(SHARDS[0]) for _, path in online_hub.requests)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ((404, "RepoNotFound"), "the hub has no such model"),
        ((404, "RevisionNotFound"), "has no revision 'v2'"),
        ((401, "GatedRepo"), "is gated"),
        ((500, ""), "the hub could not give it (HfHubHTTPError"),
    ],
    ids=["unknown", "revision", "gated", "down"],
)
@pytest.mark.usefixtures("cache")
def test_what_the_hub_refuses_is_explained_in_one_sentence(online_hub, failure, expected):
    online_hub.info_failure = failure
    assert expected in refusal("org/name", revision="v2")


@pytest.mark.usefixtures("cache")
def test_a_model_whose_files_are_gated_is_refused_with_the_remedy(online_hub):
    online_hub.file_failure = (403, "GatedRepo")
    assert "hf auth login" in refusal("org/name")


@pytest.mark.usefixtures("cache")
def test_a_model_without_weights_is_refused(online_hub):
    online_hub.files = {"config.json": b"{}", "tf_model.h5": b"other"}
    assert "lacks *.safetensors" in refusal("org/name")


BIN_INDEX = "pytorch_model.bin.index.json"
BIN_SHARDS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
BINS = {
    "one file": {"config.json": b"{}", "pytorch_model.bin": b"weights"},
    "shards": {
        "config.json": b"{}",
        BIN_INDEX: json.dumps({"weight_map": dict(zip("ab", BIN_SHARDS, strict=True))}).encode(),
        **dict.fromkeys(BIN_SHARDS, b"shard"),
    },
}


@pytest.mark.parametrize("files", BINS.values(), ids=BINS.keys())
@pytest.mark.usefixtures("cache")
def test_files_of_torch_are_downloaded_once_where_there_are_no_safetensors(online_hub, files):
    online_hub.files = {**files, "training_args.bin": b"unneeded"}
    folder = resolve_model_path("org/name")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    online_hub.requests.clear()
    assert resolve_model_path("org/name") == folder
    assert online_hub.requests == []


@pytest.mark.usefixtures("cache")
def test_files_of_torch_are_not_downloaded_beside_safetensors(online_hub):
    online_hub.files = {**SINGLE, **BINS["shards"]}
    folder = resolve_model_path("org/name")
    assert {file.name for file in folder.iterdir()} == {*SINGLE, BIN_INDEX}


def test_a_shard_of_torch_that_is_not_cached_is_missed(cache):
    put_in_cache(
        cache, {name: text for name, text in BINS["shards"].items() if name != BIN_SHARDS[1]}
    )
    assert "nor complete in the local cache" in refusal("org/name")


PARTS = [f"Q8/m-{number:05}-of-00002.gguf" for number in (1, 2)]
QUANTISED = {"m-Q4_K_M.gguf": b"four", **dict.fromkeys(PARTS, b"eight"), "README.md": b"#"}


def test_one_gguf_file_of_a_repository_is_downloaded_once_and_alone(cache, online_hub):
    online_hub.files = QUANTISED
    path = resolve_model_path("org/name:m-Q4_K_M.gguf")
    assert path == cache / "models--org--name" / "snapshots" / COMMIT / "m-Q4_K_M.gguf"
    assert path.read_bytes() == b"four"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    online_hub.requests.clear()
    assert resolve_model_path("org/name:m-Q4_K_M.gguf") == path
    assert online_hub.requests == []


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.usefixtures("cache")
def test_all_parts_of_a_gguf_model_are_downloaded(online_hub, part):
    online_hub.files = QUANTISED
    path = resolve_model_path(f"org/name:{part}")
    assert path.name == Path(PARTS[0]).name
    assert sorted(file.name for file in path.parent.iterdir()) == [Path(p).name for p in PARTS]


@pytest.mark.usefixtures("cache")
def test_a_repository_of_gguf_models_says_which_there_are(online_hub):
    online_hub.files = QUANTISED
    assert f"({', '.join(PARTS)}, m-Q4_K_M.gguf): name one, as in" in refusal("org/name")
    assert f"has no Q2.gguf: it has {PARTS[0]}" in refusal("org/name:Q2.gguf")


@pytest.mark.usefixtures("cache")
def test_a_gguf_file_of_a_repository_without_any_is_refused(online_hub):
    online_hub.files = SINGLE
    assert "it has no GGUF files" in refusal("org/name:Q2.gguf")


def test_the_cache_and_the_folder_that_are_given_are_looked_in(tmp_path):
    files = {f"inner/{name}": content for name, content in SINGLE.items()}
    other = tmp_path / "other"
    snapshot = put_in_cache(other, SINGLE)
    put_in_cache(other, files)
    assert resolve_model_path("org/name", Lookup(cache_dir=other)) == snapshot
    assert (
        resolve_model_path("org/name", Lookup(cache_dir=other, subfolder="inner"))
        == snapshot / "inner"
    )
    assert "nor complete in the local cache" in refusal("org/name")
    assert str(other) in refusal("org/name", cache_dir=other, subfolder="outer")


def test_local_files_only_forbids_a_download_and_force_download_downloads_what_is_cached(
    cache, online_hub
):
    assert "local_files_only" in refusal("org/name", local_files_only=True)
    assert online_hub.requests == []
    put_in_cache(cache, SHARDED)
    resolve_model_path("org/name", Lookup(force_download=True, token=False))
    assert any(path.endswith(SHARDS[0]) for _, path in online_hub.requests)


def test_a_variant_that_is_not_cached_is_downloaded(cache, online_hub):
    snapshot = put_in_cache(cache, SINGLE)
    online_hub.files = {**SINGLE, "model.fp16.safetensors": b"halves"}
    variant = Lookup(weights=WeightChoice(variant="fp16"))
    assert resolve_model_path("org/name") == snapshot
    assert online_hub.requests == []
    folder = resolve_model_path("org/name", variant)
    assert (folder / "model.fp16.safetensors").read_bytes() == b"halves"


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_alone_is_complete_without_a_model(cache, weights):
    snapshot = put_in_cache(cache, {"adapter_config.json": b"{}", weights: b"weights"})
    assert resolve_model_path("org/name") == snapshot
