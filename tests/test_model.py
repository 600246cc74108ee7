"""Streamed transformers models: equal bit for bit to transformers' own, for every architecture alike."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import CASES, inputs_for, save_model
from support.streaming import SMALL, bits_equal, open_streaming, tensors_of

from layerstream.pipeline import (
    Budget,
    CheckpointError,
    ClosedError,
    DeviceError,
    ModelError,
    PlanError,
    StreamedModel,
    load_streamed,
)

GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
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
        run(main(), seconds=60)


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
    for made in (snapshot, cached / "blobs", cached / "refs"):
        made.mkdir(parents=True)
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


def test_a_stream_that_is_closed_early_ends_its_generation(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            stream = model.stream(**inputs, max_new_tokens=10_000, do_sample=False)
            assert isinstance(await anext(stream), int)
            await stream.aclose()
            assert torch.is_tensor(await model.generate(**inputs, **GREEDY))

    with nothing_left_behind():
        run(main())


def test_a_cancelled_request_is_unwound_and_the_next_one_is_served(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            for _ in range(20):
                request = asyncio.create_task(
                    model.generate(**inputs, max_new_tokens=10_000, do_sample=False)
                )
                await asyncio.sleep(0)
                request.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await request
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await model.generate(**inputs, max_new_tokens=10_000, do_sample=False)
            assert (await model.forward(**inputs)).logits.isfinite().all()

    with nothing_left_behind():
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


def test_closing_the_model_fails_what_runs_and_hangs_nothing(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            stream = model.stream(**inputs, max_new_tokens=10_000, do_sample=False)
            await anext(stream)
            await model.aclose()
            with pytest.raises(ClosedError):
                [token async for token in stream]
        with pytest.raises(ClosedError):
            await model.forward(**inputs)

    with nothing_left_behind():
        run(main())


def test_an_error_of_the_model_itself_reaches_the_caller_and_harms_nobody(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            with pytest.raises(IndexError):
                await model.forward(input_ids=torch.tensor([[1_000_000]]))
            with pytest.raises(ValueError, match="input_ids"):
                await model.forward()
            assert (await model.forward(**inputs)).logits.isfinite().all()

    with nothing_left_behind():
        run(main())


@pytest.mark.filterwarnings("ignore:module forward hook")  # torch tells of the second error, too
def test_a_device_that_fails_while_a_batch_goes_home_lets_the_next_request_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            device, calls = model._engine._device, 0
            record = device.record

            def failing(stream: object = None) -> Any:
                nonlocal calls
                calls += 1
                if calls > 1:  # the first is that of binding
                    raise RuntimeError("the device has failed")
                return record(stream)

            monkeypatch.setattr(device, "record", failing)
            with pytest.raises(RuntimeError, match="the device has failed"):
                await model.forward(**inputs)
            monkeypatch.undo()
            assert (await model.forward(**inputs)).logits.isfinite().all()

    run(main())


def test_a_failed_read_reaches_every_request(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", num_hidden_layers=6)
    inputs = inputs_for("llama")

    async def main() -> None:
        async with await open_streaming(folder, reader="direct") as model:
            await model.forward(**inputs)
            with (folder / "model.safetensors").open("r+b") as file:
                file.truncate(20_000)

            async def serve() -> None:
                for _ in range(3):  # what was read ahead may still serve the first
                    await model.forward(**inputs)

            with pytest.raises(CheckpointError, match=r"model\.safetensors.*(changed|shrunk)"):
                await serve()

    with nothing_left_behind():
        run(main())


def test_large_weights_are_absent_outside_of_a_pass_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerstream.pipeline.modeling.assembly.SMALL_WEIGHT_BYTES", 0)
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            await model.forward(**inputs_for("llama"))
            weight = model.module.model.layers[0].mlp.up_proj.weight
            assert (weight.shape, weight.device.type) == ((64, 32), "cpu")
            with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight is used"):
                weight + 1
            assert model.module.device.type == "cpu"

    run(main())


def test_small_weights_are_read_anew_outside_of_a_pass_but_not_written(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    name = "model.layers.0.mlp.up_proj.weight"
    stored = transformers.LlamaForCausalLM.from_pretrained(folder).get_parameter(name)

    async def main() -> None:
        async with await open_streaming(folder) as model:
            weight = model.module.get_parameter(name)
            assert torch.equal(weight.t() + 1, stored.t() + 1)
            with pytest.raises(ModelError, match="is used"), torch.no_grad():
                weight.zero_()

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


# -- the drop-in ---------------------------------------------------------------------------------


def test_the_drop_in_is_the_transformers_class_and_computes_like_it(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "gpt2")
    inputs = inputs_for("gpt2")
    reference = transformers.GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        expected = reference(**inputs).logits
    with (
        nothing_left_behind(),
        load_streamed(folder, device="cpu", budget=Budget(host="64MiB")) as model,
    ):
        assert isinstance(model, transformers.GPT2LMHeadModel)
        assert type(model).__name__ == "GPT2LMHeadModel"
        assert bits_equal(model(**inputs).logits, expected)
        tokens = model.generate(**inputs, **GREEDY)
        assert torch.equal(tokens, reference.generate(**inputs, **GREEDY))
    model.close()
    for call in (model, model.generate):
        with pytest.raises(ClosedError):
            call(**inputs)


def test_the_drop_in_serves_transformers_pipelines(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    words = ["?", *"abcdefghijklmnopqrstuvwxyz"]
    numbers = {word: number for number, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token=words[0]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=words[0])
    asked = {"max_new_tokens": 8, "do_sample": False, "return_tensors": True}
    reference = transformers.pipeline(
        "text-generation",
        model=transformers.LlamaForCausalLM.from_pretrained(folder),
        tokenizer=tokenizer,
    )
    expected = reference("a b c", **asked)
    with load_streamed(folder, device="cpu", budget=Budget(host="64MiB")) as model:
        generate = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        assert generate("a b c", **asked) == expected


def test_threads_may_share_a_drop_in(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")
    results: list[torch.Tensor] = []
    with load_streamed(folder, device="cpu", budget=Budget(host="64MiB")) as model:
        threads = [
            threading.Thread(target=lambda: results.append(model(**inputs).logits))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(results) == 4
    assert all(bits_equal(results[0], result) for result in results)


# -- bad input -----------------------------------------------------------------------------------


def lacks_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def has_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors")


def has_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def has_an_unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')


def has_a_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lacks_a_tensor, r"lacks 1 .*model\.layers\.1\.mlp\.up_proj\.weight"),
        (has_another_shape, r"model\.norm\.weight .*\(32,\).*\(7,\)"),
        (has_no_config, r"config\.json"),
        (has_an_unknown_type, "no-such-model"),
        (has_a_broken_config, r"config\.json"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_model_that_does_not_match_its_files_is_refused(
    spoil: Any, says: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    spoil(folder)

    async def main() -> None:
        async with StreamedModel.open(folder, device="cpu"):
            pass

    with nothing_left_behind(), pytest.raises((ModelError, CheckpointError), match=says):
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


def test_a_type_that_transformers_lists_nowhere_takes_a_model_class(tmp_path: Path) -> None:
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


def test_a_budget_too_small_says_need_have_and_remedy(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with StreamedModel.open(folder, device="cpu", budget=Budget(host="1MiB")):
            pass

    with nothing_left_behind(), pytest.raises(PlanError, match=r"1 MiB .* needed .* raise the"):
        run(main())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with StreamedModel.open(folder, device="cuda:0"):
            pass

    with nothing_left_behind(), pytest.raises(DeviceError, match="cuda:0 was asked for"):
        run(main())


def test_opens_and_closes_leave_nothing(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        for _ in range(10):
            async with StreamedModel.open(folder, device="cpu", workload=SMALL) as model:
                await model.forward(**inputs_for("llama"))

    with nothing_left_behind():
        run(main(), seconds=60)
