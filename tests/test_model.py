"""Streamed transformers models: equal bit for bit to transformers' own, for every architecture alike."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import CASES, inputs_for, save_model
from support.selection import covering
from support.streaming import SMALL, bits_equal, open_streaming, tensors_of

from layerstream.pipeline import (
    ModelError,
    StreamedModel,
)

GREEDY = {"max_new_tokens": 8, "do_sample": False}


@covering(case=list(CASES), dtype=[torch.float32, torch.bfloat16])
def test_outputs_and_greedy_tokens_are_those_of_from_pretrained(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", case, dtype)
    reference = getattr(transformers, CASES[case].model).from_pretrained(folder)
    inputs = inputs_for(case, dtype)
    prompt = {name: value for name, value in inputs.items() if not name.startswith("decoder")}
    with torch.no_grad():
        expected = list(tensors_of(reference(**inputs)))

    async def main() -> None:
        async with await open_streaming(folder, reader="direct") as model:
            assert any(batch.streamed for batch in model.plan.batches)
            for _ in range(2):
                output = list(tensors_of(await model.forward(**inputs)))
                assert all(map(bits_equal, expected, output))
                assert len(output) == len(expected)
            if reference.can_generate():
                tokens = await model.generate(**prompt, **GREEDY)
                assert torch.equal(tokens, reference.generate(**prompt, **GREEDY))

    with nothing_left_behind():
        run(main())


@pytest.mark.parametrize("reader", ["direct", "mmap"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_readers_and_layer_batch_sizes_change_nothing(
    reader: str, size: int, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama", max_shard_size="40KB", num_hidden_layers=7)
    inputs = inputs_for("llama")
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = reference(**inputs).logits

    async def main() -> None:
        model = await open_streaming(folder, reader=reader, layer_batch_size=size)
        async with model:
            assert bits_equal((await model.forward(**inputs)).logits, expected)

    run(main())


def test_a_model_comes_from_a_folder_a_file_or_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = tmp_path / "hub" / "models--org--name"
    snapshot = cached / "snapshots" / "0123"
    for directory in (snapshot, cached / "blobs", cached / "refs"):
        directory.mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123")
    for file in folder.iterdir():
        (cached / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    ids = inputs_for("llama")["input_ids"]

    async def logits(source: str | Path) -> torch.Tensor:
        async with StreamedModel.open(source, device="cpu", workload=SMALL) as model:
            output = await model.forward(ids)
        return output.logits

    expected = run(logits(folder))
    assert bits_equal(run(logits(folder / "model.safetensors")), expected)
    assert bits_equal(run(logits("org/name")), expected)


def test_a_pass_takes_one_sweep_and_reads_each_streamed_byte_once(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", num_hidden_layers=6)

    async def main() -> None:
        async with await open_streaming(folder, reader="direct") as model:
            await model.generate(**inputs_for("llama"), **GREEDY)
            timings = model.timings()
            assert timings.sweeps == 8
            read = timings.stages[0].bytes
            ahead = 3 * max(batch.read_bytes for batch in model.plan.batches)
            assert read <= 8 * model.plan.first_sweep_bytes + ahead

    run(main())


def test_an_encoder_is_not_read_again_while_the_decoder_generates(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "t5", num_layers=4, num_decoder_layers=4)

    async def main() -> None:
        async with await open_streaming(folder, reader="direct") as model:
            encoder = [b for b in model.plan.batches if b.layers[0].startswith("encoder")]
            assert encoder
            await model.generate(input_ids=inputs_for("t5")["input_ids"], **GREEDY)
            before = model.timings().stages[2].bytes
            await model.generate(input_ids=inputs_for("t5")["input_ids"], **GREEDY)
            computed = model.timings().stages[2].bytes - before
            once = sum(view.nbytes for b in model.plan.batches for view in b.tensors)
            again = sum(view.nbytes for b in encoder for view in b.tensors)
            assert computed <= 8 * once - 7 * again

    run(main())


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
        {"cache_implementation": "static", "do_sample": False},
        {"output_scores": True, "return_dict_in_generate": True, "do_sample": False},
    ],
    ids=["beams", "sampling", "prompt lookup", "static cache", "scores"],
)
def test_generate_takes_whatever_transformers_takes(
    options: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama", num_hidden_layers=4)
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8}
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    expected = list(tensors_of(reference.generate(**inputs, **options)))

    async def main() -> None:
        async with await open_streaming(folder) as model:
            torch.manual_seed(3)
            output = list(tensors_of(await model.generate(**inputs, **options)))
            assert all(map(bits_equal, expected, output))

    run(main())


def test_stream_yields_the_new_tokens_one_by_one(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    expected = reference.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()

    async def main() -> None:
        async with await open_streaming(folder) as model:
            assert [token async for token in model.stream(**inputs, **GREEDY)] == expected
            with pytest.raises(ModelError, match="one sequence"):
                await anext(model.stream(input_ids=inputs["input_ids"].repeat(2, 1), **GREEDY))

    run(main())


def test_concurrent_requests_each_get_their_own_result(tmp_path: Path) -> None:
    settings = {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
        "max_position_embeddings": 8,
    }
    folder = save_model(tmp_path / "model", "llama", **settings)
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    prompts = [torch.arange(3, 3 + length)[None] for length in (4, 12, 6, 20)]
    expected = []
    for ids in prompts:
        # The frequencies that a long prompt leaves behind in a shared module are not a fresh model's.
        fresh = transformers.LlamaForCausalLM.from_pretrained(folder)
        expected.append(fresh.generate(input_ids=ids, **GREEDY))
    assert reference.config.rope_parameters["rope_type"] == "dynamic"

    async def main() -> None:
        async with await open_streaming(folder) as model:
            results = await asyncio.gather(
                *(model.generate(input_ids=ids, **GREEDY) for ids in prompts)
            )
            assert all(map(torch.equal, expected, results))

    run(main())


def test_the_module_refuses_to_be_called_on_the_event_loop(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            with pytest.raises(ModelError, match="event loop"):
                model.module(**inputs_for("llama"))
            output = await asyncio.to_thread(lambda: model.module(**inputs_for("llama")))
            assert output.logits.isfinite().all()

    run(main())


def test_tensors_that_the_model_does_not_use_are_no_error(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.left.over"] = torch.ones(5)
    save_file(tensors, folder / "model.safetensors")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            assert (await model.forward(**inputs_for("llama"))).logits.isfinite().all()

    run(main())


@pytest.mark.parametrize("saved", ["CLIPModel", "CLIPTextModel"])
def test_a_model_class_that_is_a_part_reads_its_own_part_of_the_config(
    saved: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "clip")
    if saved == "CLIPTextModel":
        transformers.CLIPTextModel.from_pretrained(folder).save_pretrained(folder)
    ids = inputs_for("clip")["input_ids"]
    with torch.no_grad():
        expected = transformers.CLIPTextModel.from_pretrained(folder)(input_ids=ids)

    async def main() -> None:
        async with await open_streaming(folder, model_class=transformers.CLIPTextModel) as model:
            output = await model.forward(input_ids=ids)
            assert bits_equal(output.last_hidden_state, expected.last_hidden_state)

    run(main())


def test_a_type_that_transformers_does_not_list_needs_a_model_class(tmp_path: Path) -> None:
    kind = transformers.BarkSemanticModel
    config = kind.config_class(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        input_vocab_size=100,
        output_vocab_size=100,
        block_size=64,
    )
    assert config.model_type not in transformers.CONFIG_MAPPING
    kind(config).save_pretrained(tmp_path)
    ids = inputs_for("llama")["input_ids"]
    with torch.no_grad():
        expected = kind.from_pretrained(tmp_path)(input_ids=ids).logits

    async def main() -> None:
        with pytest.raises(ModelError, match="pass model_class="):
            await open_streaming(tmp_path)
        async with await open_streaming(tmp_path, model_class=kind) as model:
            assert bits_equal((await model.forward(input_ids=ids)).logits, expected)

    run(main())


def test_opens_and_closes_leave_nothing(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        for _ in range(10):
            async with StreamedModel.open(folder, device="cpu", workload=SMALL) as model:
                await model.forward(**inputs_for("llama"))

    with nothing_left_behind():
        run(main())
