"""On a GPU, models compute what they compute unstreamed: ``pytest -m cuda``, or a stand-in.

Needs pytest and what the library needs, nothing else.
"""

import asyncio

import pytest
import torch
import transformers
from support.gpu_models import (
    SMALL,
    equal_bits,
    on,
    open_streaming,
    reference,
    tensors_of,
    wide_model,
)
from support.gpus import SECONDS, SLEEP_CYCLES, StandIn, needs_cuda
from support.loop import run
from support.models import inputs_for, save_model
from support.selection import covering

from layerstream.pipeline import Budget, StreamedModel, load_streamed

ARCHITECTURES = [
    "llama",
    "llama-tied",
    "qwen3",
    "qwen3-moe",
    "gpt-oss",
    "deepseek-v3",
    "gemma3",
    "gpt2",
    "falcon",
    "mamba",
    "bert",
    "t5",
    "vit",
    "whisper",
]
GENERATIVE = {"llama", "llama-tied", "qwen3", "qwen3-moe", "gemma3", "gpt2", "falcon", "t5"}


@covering(case=ARCHITECTURES, dtype=[torch.float32, torch.bfloat16])
def test_results_are_those_of_the_unstreamed_model_bit_for_bit(gpu, case, dtype, tmp_path):
    folder = save_model(tmp_path / "model", case, dtype)
    model, inputs = reference(folder, case, dtype, gpu), inputs_for(case, dtype)
    generation = {"max_new_tokens": 5, "do_sample": False}

    def unstreamed():
        with torch.no_grad():
            here = on(gpu.torch_device, inputs)
            results = tensors_of(model(**here, use_cache=False) if case != "vit" else model(**here))
            if case in GENERATIVE:
                results.append(model.generate(here["input_ids"], **generation))
        return results

    try:
        expected = unstreamed()
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(gpu, StandIn):
            raise
        pytest.skip(f"transformers itself cannot compute {case} here: {error}")
    if not equal_bits(expected, unstreamed()):
        pytest.skip(f"{case} does not repeat its results here, streamed or not")

    async def main():
        async with await open_streaming(folder, dtype=dtype) as streamed:
            assert streamed.plan.device == "cuda:0"
            extra = {} if case == "vit" else {"use_cache": False}
            results = tensors_of(await streamed.forward(**inputs, **extra))
            if case in GENERATIVE:
                results.append(await streamed.generate(inputs["input_ids"], **generation))
            return results

    assert equal_bits(run(main(), seconds=SECONDS), expected)


def test_a_model_that_streams_every_layer_computes_like_the_one_that_does_not(gpu, tmp_path):
    folder = wide_model(tmp_path)
    model = reference(folder, "llama", torch.bfloat16, gpu)
    ids = inputs_for("llama")["input_ids"]
    with torch.no_grad():
        expected = tensors_of(model(input_ids=ids.to(gpu.torch_device), use_cache=False))

    async def main():
        async with await open_streaming(folder) as streamed:
            assert sum(batch.streamed for batch in streamed.plan.batches) >= 4
            return [
                tensors_of(await streamed.forward(input_ids=ids, use_cache=False)) for _ in range(5)
            ]

    assert all(equal_bits(each, expected) for each in run(main(), seconds=SECONDS))


def test_two_models_share_one_gpu(gpu, tmp_path):
    cases = ("llama", "gpt2")
    folders = [save_model(tmp_path / case, case) for case in cases]
    inputs = [inputs_for(case) for case in cases]
    expected = []
    for folder, case, case_inputs in zip(folders, cases, inputs, strict=True):
        with torch.no_grad():
            model = reference(folder, case, torch.float32, gpu)
            expected.append(tensors_of(model(**on(gpu.torch_device, case_inputs), use_cache=False)))

    def compute(folder, case_inputs):
        budget = Budget(vram="256MiB", host="256MiB")
        with load_streamed(folder, device="auto", workload=SMALL, budget=budget) as model:
            here = on(gpu.torch_device, case_inputs)
            return [tensors_of(model(**here, use_cache=False)) for _ in range(5)][-1]

    async def main():
        pairs = zip(folders, inputs, strict=True)
        return await asyncio.gather(*(asyncio.to_thread(compute, *pair) for pair in pairs))

    assert all(map(equal_bits, run(main(), seconds=SECONDS), expected))


@pytest.mark.cuda
@needs_cuda
def test_a_model_computes_on_the_stream_of_its_caller(tmp_path):
    folder, ids = save_model(tmp_path / "model", "llama"), inputs_for("llama")["input_ids"]
    model = transformers.LlamaForCausalLM.from_pretrained(folder).to("cuda:0")
    with torch.no_grad():
        expected = model(input_ids=ids.to("cuda:0")).logits

    async def main():
        async with StreamedModel.open(folder, device="cuda:0", workload=SMALL) as streamed:
            stream, late = torch.cuda.Stream(), torch.zeros_like(ids, device="cuda:0")
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(SLEEP_CYCLES)
                late.copy_(ids)  # only what runs on this stream sees it
                answer = asyncio.ensure_future(streamed.forward(input_ids=late))
                await asyncio.sleep(0)  # it records the stream
            output = await answer
            stream.synchronize()
            return output.logits

    assert torch.equal(run(main(), seconds=SECONDS), expected)


def test_a_request_computes_on_the_stream_that_was_current_when_it_was_made(monkeypatch, tmp_path):
    folder, ids = save_model(tmp_path / "model", "llama"), inputs_for("llama")["input_ids"]
    device = StandIn(monkeypatch).opened
    stream, used, computing_on = device.new_stream(), [], device.computing_on

    def record_and_compute(stream):
        used.append(stream)
        return computing_on(stream)

    async def main():
        async with StreamedModel.open(folder, device="cuda:0", workload=SMALL) as streamed:
            monkeypatch.setattr(device, "computing_on", record_and_compute)
            with computing_on(stream):
                answer = asyncio.ensure_future(streamed.forward(input_ids=ids))
                await asyncio.sleep(0)  # it records the stream
            await answer

    run(main(), seconds=SECONDS)
    assert used == [stream]
