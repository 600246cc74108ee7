"""``save_pretrained`` of a streamed model writes what transformers writes: file to file, and as a whole or not at all."""

import asyncio
import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.gguf_models import save_gguf_model
from support.leaks import nothing_left_behind
from support.models import CASES, inputs_for, save_model
from support.quantized import save_quantised
from support.streaming import bits_equal, tensors_of

from layerstream.pipeline import (
    AdmissionError,
    Budget,
    ModelError,
    StreamedModel,
    load_streamed,
    saving,
)

SMALL = {"device": "cpu", "measure": False, "budget": Budget(host="64MiB"), "layer_batch_size": 1}


def kind_of(case: str) -> Any:
    return getattr(transformers, CASES[case].model)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files in ``folder``."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_files(ours: Path, theirs: Path) -> None:
    """Both folders hold the same tensors, bit for bit, and the same configs."""
    found, expected = weights_in(ours), weights_in(theirs)
    assert found.keys() == expected.keys()
    assert all(bits_equal(found[name], expected[name]) for name in found)
    configs = sorted(path.name for path in theirs.glob("*config.json"))
    assert configs == sorted(path.name for path in ours.glob("*config.json"))
    for name in configs:
        assert (ours / name).read_text() == (theirs / name).read_text()


@pytest.mark.parametrize(
    "case",
    [
        *("llama", "llama-tied", "gpt2", "t5", "wav2vec2", "qwen3-next", "mixtral", "deepseek-v3"),
        *("gpt-oss", "perceiver", "qwen4-exp", "marian", "mamba2", "clip"),
    ],
)
def test_a_saved_model_is_what_transformers_saves(case: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", case)
    inputs = inputs_for(case)
    kind_of(case).from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    with nothing_left_behind(), load_streamed(folder, **SMALL) as model:
        model.save_pretrained(tmp_path / "ours")
        with torch.no_grad():
            expected = list(tensors_of(model(**inputs)))
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    with torch.no_grad():
        saved = kind_of(case).from_pretrained(tmp_path / "ours")(**inputs)
    assert all(map(bits_equal, tensors_of(saved), expected))


@pytest.mark.parametrize("case", ["llama-tied", "qwen3-moe"])
def test_the_size_of_shards_is_honoured(case: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", case)
    with load_streamed(folder, **SMALL) as model:
        model.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
        parameters = model.num_parameters()
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 3
    assert all(
        len(load_file(path)) == 1 or sum(each.nbytes for each in load_file(path).values()) <= 20_000
        for path in files
    )
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == parameters
    assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
    expected = weights_in(folder)
    found = weights_in(tmp_path / "ours")
    assert all(bits_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", ["llama", "llama-tied", "mixtral"])
def test_edited_weights_are_saved_as_they_are_now(case: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", case)
    reference = kind_of(case).from_pretrained(folder)
    with load_streamed(folder, **SMALL) as model:
        for each in (model, reference):
            torch.manual_seed(1)
            shape = each.model.layers[0].self_attn.q_proj.weight.shape
            each.model.layers[0].self_attn.q_proj.weight.data = torch.randn(shape)
            table = each.model.embed_tokens
            table.weight.data = torch.randn(table.weight.shape)
        model.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


def test_a_chosen_dtype_is_what_is_saved(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    kind = kind_of("llama")
    kind.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "theirs")
    with load_streamed(folder, dtype=torch.bfloat16, **SMALL) as model:
        model.save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("form", ["fp8-blocks", "int4-groups", "gguf"])
def test_packed_weights_are_saved_as_they_compute(form: str, tmp_path: Path) -> None:
    if form == "gguf":
        source = save_gguf_model(tmp_path / "model.gguf", "llama")
    else:
        source = save_quantised(tmp_path / "model", "llama", form)
    ids = torch.tensor([[3, 4, 5]])
    with load_streamed(source, **SMALL) as model, torch.no_grad():
        expected = model(ids).logits
        model.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert bits_equal(saved(ids).logits, expected)


def test_saving_beside_requests_changes_neither(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "mixtral")
    inputs = inputs_for("mixtral")
    results: list[torch.Tensor] = []
    with load_streamed(folder, **SMALL) as model:

        def compute() -> None:
            results.extend(model(**inputs).logits for _ in range(6))

        thread = threading.Thread(target=compute)
        thread.start()
        for number in range(3):
            model.save_pretrained(tmp_path / str(number))
        thread.join(60)
    expected = weights_in(folder)
    for number in range(3):
        found = weights_in(tmp_path / str(number))
        assert all(bits_equal(found[name], expected[name]) for name in expected)
    assert len(results) == 6
    assert all(bits_equal(each, results[0]) for each in results)


@pytest.mark.parametrize("folder_exists", [True, False])
def test_a_save_that_fails_leaves_nothing_of_it(
    folder_exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")
    target = tmp_path / "deep" / "ours"
    if folder_exists:
        target.mkdir(parents=True)
        (target / "notes.txt").write_text("mine")
    write, writes = saving.write_at, []

    def fail_at_the_tenth(*args: Any) -> None:
        writes.append(args)
        if len(writes) == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    with load_streamed(folder, **SMALL) as model:
        before = model(**inputs).logits
        monkeypatch.setattr(saving, "write_at", fail_at_the_tenth)
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(target)
        assert {path.name for path in tmp_path.rglob("*")} == (
            {"model", "deep", "ours", "notes.txt"} if folder_exists else {"model"}
        ) | {path.name for path in folder.iterdir()}
        assert bits_equal(model(**inputs).logits, before)
        model.save_pretrained(target)
    assert_same_files(target, folder)


def test_shards_of_an_earlier_save_are_removed_and_other_files_stay(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    with load_streamed(folder, **SMALL) as model:
        model.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
        (tmp_path / "ours" / "tokenizer.json").write_text("{}")
        model.save_pretrained(tmp_path / "ours", max_shard_size="40KB")
    files = {path.name for path in (tmp_path / "ours").iterdir()}
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert {name for name in files if name.endswith(".safetensors")} == {
        *index["weight_map"].values()
    }
    assert "tokenizer.json" in files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda folder: (folder,), "streams from, which are not overwritten"),
        (lambda folder: (folder / "config.json",), "is a file; give a folder"),
        (lambda folder: (folder.parent / "other", True, None, True), "call its method push_to_hub"),
    ],
)
def test_what_cannot_be_saved_is_refused(arguments: Any, message: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with load_streamed(folder, **SMALL) as model, pytest.raises(ModelError, match=message):
        model.save_pretrained(*arguments(folder))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_the_state_of_a_part_is_saved_as_it_was_given(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    with load_streamed(folder, **SMALL) as model:
        state = {name: each for name, each in model.state_dict().items() if "layers.1" in name}
        model.save_pretrained(tmp_path / "ours", state_dict=state)
        renamed = {f"other.{name}": each for name, each in state.items()}
        with pytest.raises(ModelError, match=r"other\.model\.layers\.1.* under another name"):
            model.save_pretrained(tmp_path / "others", state_dict=renamed)
    expected = weights_in(folder)
    found = weights_in(tmp_path / "ours")
    assert found.keys() == state.keys()
    assert all(bits_equal(found[name], expected[name]) for name in found)


def test_push_to_hub_uploads_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "model", "llama")
    uploaded: dict[str, bytes] = {}

    class Hub:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            self.repo_id = repo_id
            return self

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("card")

    def upload(_: Any, working_dir: str, repo_id: str, **__: Any) -> str:
        uploaded.update({path.name: path.read_bytes() for path in Path(working_dir).iterdir()})
        return repo_id

    hub = transformers.utils.hub
    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    with load_streamed(folder, **SMALL) as model:
        assert model.push_to_hub("org/name") == "org/name"
    assert uploaded.keys() == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors")
    }


def test_the_module_of_a_streamed_model_saves_in_a_thread_and_refuses_on_the_event_loop(
    tmp_path: Path,
) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with StreamedModel.open(folder, **SMALL) as model:
            with pytest.raises(ModelError, match="on the event loop"):
                model.module.save_pretrained(tmp_path / "ours")
            assert not (tmp_path / "ours").exists()
            await asyncio.to_thread(model.module.save_pretrained, tmp_path / "ours")

    asyncio.run(main())
    kind_of("llama").from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


def padded(case: str, rows: int) -> dict[str, torch.Tensor]:
    """Inputs with ids below ``rows``, and the last of them."""
    inputs = inputs_for(case)
    last = rows - 1
    return {
        name: torch.where(each == each.max(), last, each.clamp(max=last))
        for name, each in inputs.items()
    }


@pytest.mark.parametrize("rows", [113, 90])
@pytest.mark.parametrize("case", ["llama", "llama-tied", "gpt2", "bert", "t5", "gemma3"])
def test_resized_embeddings_are_those_of_transformers(case: str, rows: int, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", case)
    reference = kind_of(case).from_pretrained(folder)
    torch.manual_seed(1)
    reference.resize_token_embeddings(rows)
    inputs = padded(case, rows)
    with (
        nothing_left_behind(),
        load_streamed(folder, **SMALL) as model,
        torch.no_grad(),
    ):
        model(**inputs_for(case))
        torch.manual_seed(1)
        assert model.resize_token_embeddings(rows) is model.get_input_embeddings()
        assert model.config.vocab_size == rows
        expected = reference(**inputs).logits
        assert bits_equal(model(**inputs).logits, expected)
        if model.can_generate():
            options = {"max_new_tokens": 4, "do_sample": False}
            tokens = model.generate(**inputs, **options)
            assert torch.equal(tokens, reference.generate(**inputs, **options))
        model.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


def test_resized_embeddings_take_memory_of_requests_and_are_refused_where_there_is_none(
    tmp_path: Path,
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")
    with load_streamed(folder, **SMALL) as model:
        stats = model._layerstream_close.model.stats
        reservable_bytes = stats().reservable_bytes
        before = model(**inputs).logits
        with pytest.raises(AdmissionError, match=r"resize_token_embeddings needs .* larger budget"):
            model.resize_token_embeddings(10**9)
        assert bits_equal(model(**inputs).logits, before)
        assert model.resize_token_embeddings() is model.get_input_embeddings()
        assert stats().reservable_bytes == reservable_bytes
        model.resize_token_embeddings(1000, mean_resizing=False)
        model(**inputs)
        resident_bytes = 2 * 1000 * 32 * 4
        assert stats().reservable_bytes == reservable_bytes - resident_bytes
