"""What only a GPU can prove: ``pytest -m cuda``. Everything here also runs on a stand-in, where there is none.

The stand-in plays the GPU with host memory, by the same plans and through the same stages. It proves the
tests, not the GPU. Needs pytest and what the library needs, nothing else.
"""

import asyncio
import copy
import gc
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers
from support.checkpoints import GPU, arranged, plan_for, write_checkpoint
from support.fake_device import POISON, FakeDevice
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import CASES, inputs_for, save_model

from layerstream.pipeline import (
    AdmissionError,
    Budget,
    DeviceError,
    Hardware,
    Pipeline,
    PlanError,
    StreamedModel,
    Workload,
    load_streamed,
)
from layerstream.pipeline import opening as opening_module
from layerstream.pipeline import starting as runtime_module
from layerstream.stages.arena import RingArena
from layerstream.stages.devices.cuda import CudaDevice
from layerstream.stages.process.usage import anonymous_bytes

# Some 10 ms of a GPU of 2 GHz: long beside the copy of a small layer, short beside a test.
SLEEP_CYCLES = 20_000_000
SECONDS = 70
SMALL = Workload(prompt_tokens=16, new_tokens=16)
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


class SlowCopies(CudaDevice):
    """Before each copy its destination is poisoned, and the copy comes late."""

    sleep_cycles = SLEEP_CYCLES

    def copy(self, copies, *, after):
        for event in after:
            event.wait(self._stream)
        with torch.cuda.stream(self._stream):
            for destination, _ in copies:
                destination.fill_(POISON)
            torch.cuda._sleep(self.sleep_cycles)
        return super().copy(copies, after=())


class SlowCopiesNobodyWaitsFor(SlowCopies):
    """As if the compute stage forgot to wait for copies."""

    sleep_cycles = 3 * SLEEP_CYCLES  # later than the kernels, however the two began

    def wait(self, event):
        pass


class HastyCopies(SlowCopies):
    """As if the transfer stage forgot to wait for the computation that reads the slot."""

    sleep_cycles = 1  # earlier than the kernels

    def copy(self, copies, *, after):  # noqa: ARG002 - that it is not used is the point
        return super().copy(copies, after=())


class Prompt(FakeDevice):
    """The fake device for computation that it does not see: waits are over before it begins."""

    def copy(self, copies, *, after):
        event = super().copy(copies, after=after)
        event.synchronize()
        return event

    def wait(self, event):
        event.synchronize()


class Cuda:
    """The GPU itself."""

    torch_device = torch.device("cuda:0")
    slow, forgetful, hasty = SlowCopies, SlowCopiesNobodyWaitsFor, HastyCopies

    def __init__(self, monkeypatch):
        _ = monkeypatch

    def device(self, kind=CudaDevice):
        return kind(self.torch_device)

    def new_stream(self, device):
        _ = device
        return torch.cuda.Stream()

    def launch(self, device, kernel):
        _ = device
        torch.cuda._sleep(SLEEP_CYCLES)
        kernel()

    def finish(self, device):
        device.drain()

    @contextmanager
    def peak(self):
        """A list that gets the highest of torch's counter and of the driver's, above what was there before."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        free, allocated = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
        lowest, stop, peaks = [free], threading.Event(), []

        def watch():
            while not stop.wait(0.001):
                lowest.append(min(lowest.pop(), torch.cuda.mem_get_info()[0]))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield peaks
        finally:
            stop.set()
            thread.join()
        peaks += [torch.cuda.max_memory_allocated() - allocated, free - lowest[0]]


class ForgetfulFake(FakeDevice):
    def __init__(self):
        super().__init__(hold_copies=True)

    def wait(self, event):
        pass


class HastyFake(FakeDevice):
    def copy(self, copies, *, after):  # noqa: ARG002 - that it is not used is the point
        return super().copy(copies, after=())


class StandIn:
    """Host memory that plays it."""

    torch_device = torch.device("cpu")
    slow, forgetful, hasty = FakeDevice, ForgetfulFake, HastyFake

    def __init__(self, monkeypatch):
        self.opened = Prompt()

        async def probe(checkpoint, device="auto", *, measure=True):
            _ = checkpoint, device, measure
            return replace(GPU, vram_free_bytes=self.opened.free_bytes())

        monkeypatch.setattr(Hardware, "probe", probe)
        for module in (opening_module, runtime_module):
            monkeypatch.setattr(module, "open_device", lambda _: self.opened)

    def device(self, kind=FakeDevice):
        return kind()

    def new_stream(self, device):
        return device.new_stream()

    def launch(self, device, kernel):
        device.launch(kernel)

    def finish(self, device):
        device.release_copies()
        device.finish()

    @contextmanager
    def peak(self):
        before, peaks = self.opened.free_bytes(), []
        yield peaks
        peaks.append(before - self.opened.free_bytes())


needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device here"
)
on_cuda = pytest.param(Cuda, id="cuda", marks=[pytest.mark.cuda, needs_cuda])


@pytest.fixture(params=[on_cuda, pytest.param(StandIn, id="stand-in")])
def gpu(request, monkeypatch):
    return request.param(monkeypatch)


def reference(folder, case, dtype, gpu):
    kind = getattr(transformers, CASES[case].model)
    return kind.from_pretrained(folder, dtype=dtype).eval().to(gpu.torch_device)


def on(device, inputs):
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def leaves(output):
    return [
        leaf
        for leaf in torch.utils._pytree.tree_leaves(tuple(dict(output).values()))
        if isinstance(leaf, torch.Tensor)
    ]


def same(these, those):
    """Whether both hold equal bits, NaN included."""
    return len(these) == len(those) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(map(at_least_1d, these), map(at_least_1d, those), strict=True)
    )


def at_least_1d(tensor):
    return tensor.reshape(1) if tensor.dim() == 0 else tensor


# -- results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_results_are_those_of_the_unstreamed_model_bit_for_bit(gpu, case, dtype, tmp_path):
    folder = save_model(tmp_path / "model", case, dtype)
    model, inputs = reference(folder, case, dtype, gpu), inputs_for(case, dtype)
    generates = {"max_new_tokens": 5, "do_sample": False}

    def unstreamed():
        with torch.no_grad():
            here = on(gpu.torch_device, inputs)
            results = leaves(model(**here, use_cache=False) if case != "vit" else model(**here))
            if case in GENERATIVE:
                results.append(model.generate(here["input_ids"], **generates))
        return results

    try:
        expected = unstreamed()
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(gpu, StandIn):
            raise
        pytest.skip(f"transformers itself cannot compute {case} here: {error}")
    if not same(expected, unstreamed()):
        pytest.skip(f"{case} does not repeat itself here, streamed or not")

    async def main():
        async with await open_streaming(folder, dtype=dtype) as streamed:
            assert streamed.plan.device == "cuda:0"
            extra = {} if case == "vit" else {"use_cache": False}
            results = leaves(await streamed.forward(**inputs, **extra))
            if case in GENERATIVE:
                results.append(await streamed.generate(inputs["input_ids"], **generates))
            return results

    assert same(run(main(), seconds=SECONDS), expected)


def test_a_model_that_streams_every_layer_computes_like_the_one_that_does_not(gpu, tmp_path):
    folder = wide_model(tmp_path)
    model = reference(folder, "llama", torch.bfloat16, gpu)
    ids = inputs_for("llama")["input_ids"]
    with torch.no_grad():
        expected = leaves(model(input_ids=ids.to(gpu.torch_device), use_cache=False))

    async def main():
        async with await open_streaming(folder) as streamed:
            assert sum(batch.streamed for batch in streamed.plan.batches) >= 4
            return [
                leaves(await streamed.forward(input_ids=ids, use_cache=False)) for _ in range(5)
            ]

    assert all(same(each, expected) for each in run(main(), seconds=SECONDS))


def wide_model(folder):
    """A llama of 8 layers, 25 MB each: large beside what allocators round up to."""
    return save_model(
        folder / "wide",
        "llama",
        torch.bfloat16,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )


async def open_streaming(folder, **options):
    """The model with the least budgets that it opens with: what need not stay streams."""
    options = {"device": "auto", "workload": SMALL, "layer_batch_size": 1, **options}
    async with StreamedModel.open(folder, **options) as model:
        plan = model.plan
    for slots in range(3, 20):  # what has to stay takes room beside three slots
        vram = plan.device_memory.reserved_bytes + slots * max(b.device_bytes for b in plan.batches)
        host = plan.host_memory.reserved_bytes + slots * max(b.host_bytes for b in plan.batches)
        budget = Budget(vram=vram, host=host)
        try:
            async with StreamedModel.open(folder, budget=budget, **options):
                return StreamedModel.open(folder, budget=budget, **options)
        except PlanError:
            continue
    raise AssertionError("no budget will do")


# -- slots -----------------------------------------------------------------------------------------


def swept(gpu, device, folder, monkeypatch, *, stream=None, sweeps=2):
    """Stream a checkpoint through two slots past slow kernels: what they saw, and what is right."""
    expected = write_checkpoint(folder, blocks=8)
    plan = arranged(plan_for(folder, GPU), slots=2)
    give_back = RingArena.give_back

    def poisoned(arena, slot, after=()):
        if not after and not slot._freed and slot.tensor.device.type == "cpu":
            slot.tensor.fill_(POISON)  # a host slot may be written from here on
        give_back(arena, slot, after)

    monkeypatch.setattr(RingArena, "give_back", poisoned)

    async def main():
        seen = {}
        async with Pipeline(plan, device=device) as pipeline:
            try:
                for _ in range(sweeps):
                    async for batch in pipeline.sweep():
                        with device.computing_on(stream or device.stream()):
                            tensors = batch.tensors
                            gpu.launch(device, lambda tensors=tensors: keep(seen, tensors))
                            if getattr(device, "holds_copies", False):
                                device.finish()
                                device.release_copies()
                if stream is not None:
                    await asyncio.to_thread(device.record(stream).synchronize)
            finally:
                gpu.finish(device)
        return seen

    return run(main(), seconds=SECONDS), expected


def keep(seen, tensors):
    for name, tensor in tensors.items():
        # The first of all sweeps that saw something else stays.
        seen.setdefault(name, []).append(tensor.clone())


def right(seen, expected):
    """Whether every look at every tensor saw what is in the file."""
    return seen.keys() == expected.keys() and all(
        torch.equal(look.cpu(), expected[name]) for name in expected for look in seen[name]
    )


def test_no_slot_is_written_while_it_is_read_by_slow_kernels_or_late_copies(
    gpu, tmp_path, monkeypatch
):
    assert right(*swept(gpu, gpu.device(gpu.slow), tmp_path, monkeypatch))


@pytest.mark.parametrize("kind", ["forgetful", "hasty"])
def test_a_missing_wait_would_be_seen(gpu, kind, tmp_path, monkeypatch):
    device = gpu.device(getattr(gpu, kind))
    assert not right(*swept(gpu, device, tmp_path, monkeypatch))


def test_computation_may_run_on_a_stream_of_the_callers(gpu, tmp_path, monkeypatch):
    device = gpu.device(gpu.slow)
    stream = gpu.new_stream(device)
    assert right(*swept(gpu, device, tmp_path, monkeypatch, stream=stream))


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
                asked = asyncio.ensure_future(streamed.forward(input_ids=late))
                await asyncio.sleep(0)  # it takes note of the stream
            output = await asked
            stream.synchronize()
            return output.logits

    assert torch.equal(run(main(), seconds=SECONDS), expected)


def test_a_request_computes_on_the_stream_that_was_current_when_it_was_asked_for(
    monkeypatch, tmp_path
):
    folder, ids = save_model(tmp_path / "model", "llama"), inputs_for("llama")["input_ids"]
    device = StandIn(monkeypatch).opened
    stream, used, computing_on = device.new_stream(), [], device.computing_on

    def noted(stream):
        used.append(stream)
        return computing_on(stream)

    async def main():
        async with StreamedModel.open(folder, device="cuda:0", workload=SMALL) as streamed:
            monkeypatch.setattr(device, "computing_on", noted)
            with computing_on(stream):
                asked = asyncio.ensure_future(streamed.forward(input_ids=ids))
                await asyncio.sleep(0)  # it takes note of the stream
            await asked

    run(main(), seconds=SECONDS)
    assert used == [stream]


@pytest.mark.parametrize("opened", ["pipeline", "model"])
def test_what_was_taken_of_a_device_is_given_back_to_everybody(monkeypatch, tmp_path, opened):
    device = StandIn(monkeypatch).opened
    left = []
    monkeypatch.setattr(device, "trim", lambda: left.append(device.host_memories))

    async def main():
        if opened == "pipeline":
            write_checkpoint(tmp_path, blocks=4)
            async with Pipeline(arranged(plan_for(tmp_path, GPU)), device=device):
                left.clear()  # of what was given back while it was opened
                return
        folder = save_model(tmp_path / "model", "llama")
        async with StreamedModel.open(folder, device="cuda:0", workload=SMALL):
            left.clear()
            return

    run(main(), seconds=SECONDS)
    assert left == [0]  # once, and behind everything else


@pytest.mark.parametrize("name", ["cpu", "cuda:0"])
def test_no_device_is_opened_on_the_event_loop_which_it_would_hold_for_seconds(
    monkeypatch, tmp_path, name
):
    folder = save_model(tmp_path / "model", "llama")
    if name == "cuda:0":
        StandIn(monkeypatch)
    threads = []

    def noted(open_device):
        def opened(device):
            threads.append(threading.get_ident())
            return open_device(device)

        return opened

    for module in (opening_module, runtime_module):
        monkeypatch.setattr(module, "open_device", noted(module.open_device))

    async def main():
        async with StreamedModel.open(folder, device=name, workload=SMALL, measure=False):
            return threading.get_ident()

    assert run(main(), seconds=SECONDS) not in threads
    assert len(threads) > 1


def test_two_pipelines_share_one_gpu(gpu, tmp_path):
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    expected = [write_checkpoint(folder, blocks=4 + i) for i, folder in enumerate(folders)]

    async def stream(folder, device):
        seen = {}
        async with Pipeline(arranged(plan_for(folder, GPU)), device=device) as pipeline:
            for _ in range(5):
                async for batch in pipeline.sweep():
                    tensors = batch.tensors
                    gpu.launch(device, lambda tensors=tensors: keep(seen, tensors))
            gpu.finish(device)
        return seen

    async def main():
        return await asyncio.gather(*(stream(folder, gpu.device()) for folder in folders))

    assert all(map(right, run(main(), seconds=SECONDS), expected))


def test_two_models_share_one_gpu(gpu, tmp_path):
    cases = ("llama", "gpt2")
    folders = [save_model(tmp_path / case, case) for case in cases]
    inputs = [inputs_for(case) for case in cases]
    expected = []
    for folder, case, given in zip(folders, cases, inputs, strict=True):
        with torch.no_grad():
            model = reference(folder, case, torch.float32, gpu)
            expected.append(leaves(model(**on(gpu.torch_device, given), use_cache=False)))

    def compute(folder, given):
        budget = Budget(vram="256MiB", host="256MiB")
        with load_streamed(folder, device="auto", workload=SMALL, budget=budget) as model:
            here = on(gpu.torch_device, given)
            return [leaves(model(**here, use_cache=False)) for _ in range(5)][-1]

    async def main():
        pairs = zip(folders, inputs, strict=True)
        return await asyncio.gather(*(asyncio.to_thread(compute, *pair) for pair in pairs))

    assert all(map(same, run(main(), seconds=SECONDS), expected))


# -- memory ----------------------------------------------------------------------------------------


def test_vram_stays_within_the_budget(gpu, tmp_path):
    folder, ids = wide_model(tmp_path), inputs_for("llama")["input_ids"]

    async def main():
        opening = await open_streaming(folder)
        # What the driver loads with a kernel's first launch is nobody's budget: all of them run once before.
        async with copy.copy(opening) as model:
            await model.generate(ids, max_new_tokens=4)
            budget = model.plan.device_memory.budget_bytes
            hardware = model.hardware  # nor is what probing takes
        del model
        with gpu.peak() as peaks:
            async with await same_budget(folder, budget, opening, hardware) as model:
                assert any(not batch.device_resident for batch in model.plan.batches)
                await model.generate(ids, max_new_tokens=4)
        return budget, peaks

    budget, peaks = run(main(), seconds=SECONDS)
    assert max(peaks) <= budget, (peaks, budget)


def test_a_kv_cache_that_vram_cannot_hold_lives_in_host_ram_and_changes_no_token(gpu, tmp_path):
    folder, ids = wide_model(tmp_path), inputs_for("llama")["input_ids"]
    model = reference(folder, "llama", torch.bfloat16, gpu)
    asked = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids.to(gpu.torch_device), **asked)
    del model
    large = Workload(batch_size=8, prompt_tokens=16, new_tokens=2032)
    cache = 2 * 8 * 1024 * 2 * 8 * 2048  # keys and values, layers, width, bytes, sequences, tokens
    options = {"device": "auto", "workload": large, "layer_batch_size": 1}

    async def main():
        async with StreamedModel.open(folder, **options) as roomy:
            assert not roomy.plan.kv_cache_on_host
            reserved = roomy.plan.device_memory.reserved_bytes
            layer = max(batch.device_bytes for batch in roomy.plan.batches)
            options["hardware"] = roomy.hardware  # what probing takes is nobody's budget
        budget = Budget(vram=reserved - cache // 4, host="1GiB")
        assert cache // 2 > 4 * layer  # so that it fits without the cache, and not with it
        with gpu.peak() as peaks:
            async with StreamedModel.open(folder, budget=budget, **options) as tight:
                assert tight.plan.kv_cache_on_host
                tokens = await tight.generate(ids, **asked)
                output = await tight.forward(input_ids=ids)
                alone = await tight.forward(input_ids=ids, use_cache=False)
                # There would be room in the two memories together.
                with pytest.raises(AdmissionError, match=r"8000 tokens needs .* of VRAM"):
                    await tight.forward(input_ids=torch.ones((1, 8000), dtype=torch.long))
        return tokens, output, alone, budget.vram, peaks

    tokens, output, alone, budget, peaks = run(main(), seconds=SECONDS)
    assert torch.equal(tokens, expected)
    assert {layer.keys.device.type for layer in output.past_key_values.layers} == {"cpu"}
    assert torch.equal(output.logits, alone.logits)
    assert max(peaks) <= budget, (peaks, budget)


@pytest.mark.parametrize("case", ["mamba", "t5"])
def test_a_cache_that_cannot_live_in_host_ram_is_refused_when_the_model_is_opened(
    monkeypatch, tmp_path, case
):
    StandIn(monkeypatch)
    folder = save_model(tmp_path / "model", case)
    planned = opening_module.make_plan

    def on_host(*args, **options):
        return replace(planned(*args, **options), kv_cache_on_host=True)

    monkeypatch.setattr(opening_module, "make_plan", on_host)

    async def main():
        with pytest.raises(PlanError, match="the VRAM budget cannot hold the KV cache"):
            async with StreamedModel.open(folder, device="cuda:0", workload=SMALL):
                pass

    with nothing_left_behind():
        run(main(), seconds=SECONDS)


async def same_budget(folder, budget, opening, hardware):
    host = opening._options.budget.host
    return StreamedModel.open(
        folder,
        device="auto",
        workload=SMALL,
        layer_batch_size=1,
        budget=Budget(vram=budget, host=host),
        hardware=hardware,
    )


def test_a_gpu_without_room_is_refused_and_the_next_pipeline_runs(gpu, tmp_path):
    expected = write_checkpoint(tmp_path, blocks=4)
    plan = arranged(plan_for(tmp_path, GPU))
    device = gpu.device()

    async def main():
        with pytest.raises(DeviceError, match=r"\d+ .*bytes"):
            async with Pipeline(replace(plan, device_arena_bytes=1 << 50), device=device):
                pass
        seen = {}
        async with Pipeline(plan, device=device) as pipeline:
            async for batch in pipeline.sweep():
                tensors = batch.tensors
                gpu.launch(device, lambda tensors=tensors: keep(seen, tensors))
            gpu.finish(device)
        return seen

    with nothing_left_behind_but_cuda(gpu):
        seen = run(main(), seconds=SECONDS)
    assert right(seen, expected)


@contextmanager
def nothing_left_behind_but_cuda(gpu):
    """On a GPU the driver opens descriptors when it likes: then only threads and maps count."""
    if isinstance(gpu, StandIn):
        with nothing_left_behind():
            yield
        return
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("layerstream")] == []


@pytest.mark.cuda
@needs_cuda
def test_a_computation_that_runs_out_of_memory_tells_its_caller_and_harms_nobody(tmp_path):
    expected = write_checkpoint(tmp_path, blocks=4)

    def greedy(batch, state):
        _ = batch, state
        return torch.empty(1 << 50, dtype=torch.uint8, device="cuda:0")

    def look(batch, state):
        keep(state, batch.tensors)
        return state

    async def main():
        async with Pipeline(arranged(plan_for(tmp_path, GPU))) as pipeline:
            with pytest.raises(torch.OutOfMemoryError):
                await pipeline.run(greedy, None)
            return await pipeline.run(look, {})

    seen = run(main(), seconds=SECONDS)
    assert right(seen, expected)


@pytest.mark.cuda
@needs_cuda
def test_memory_that_cannot_be_page_locked_leaves_no_error_for_the_next_kernel():
    device = CudaDevice(torch.device("cuda:0"))
    memory = device.host_memory(1 << 20)
    try:
        refusal = device._call_runtime(
            "cudaHostRegister", memory.address, 1 << 20, 0
        )  # a second time
        assert "already" in refusal
        assert torch.ones(4, device="cuda:0").sum().item() == 4
    finally:  # what stays registered refuses the next tests memory at this address
        device.release_host_memory(memory)
    assert torch.ones(4, device="cuda:0").sum().item() == 4


@pytest.mark.cuda
@needs_cuda
def test_closing_a_pipeline_unregisters_and_returns_all_host_memory(tmp_path, caplog):
    write_checkpoint(tmp_path, blocks=4)
    given = []

    class Recording(CudaDevice):
        def host_memory(self, nbytes):
            memory = super().host_memory(nbytes)
            given.append((memory.address, nbytes))
            return memory

    device = Recording(torch.device("cuda:0"))
    plan = arranged(plan_for(tmp_path, GPU), on_host=(1,))
    plan = replace(plan, host_arena_bytes=plan.host_arena_bytes + (256 << 20))

    async def main():
        async with Pipeline(plan, device=device) as pipeline:
            await pipeline.run(lambda _, state: state, None)

    run(main(), seconds=SECONDS)  # the driver's own tables grow the first time
    before, given[:] = anonymous_bytes(), []
    for _ in range(3):
        run(main(), seconds=SECONDS)
    assert len(given) == 6
    assert all(device._call_runtime("cudaHostUnregister", address) for address, _ in given)
    assert "cudaHostUnregister failed" not in caplog.text
    assert anonymous_bytes() - before < 64 << 20


def test_a_copy_may_lie_anywhere_in_a_large_registration(gpu):
    cuda = isinstance(gpu, Cuda)
    device = gpu.device()
    boundary = 1 << 30 if cuda else 1 << 20
    host = device.host_memory(boundary + (boundary >> 2))
    host.tensor.random_(0, 256)
    lengths = (1, 4096, 1 << 20, boundary // 2)
    for nbytes in lengths:
        start = boundary - nbytes // 2 - 1
        source = host.tensor[start : start + nbytes + 2]
        target = device.device_memory(source.numel())
        device.copy([(target, source)], after=()).synchronize()
        assert torch.equal(target.cpu(), source)
    del source
    device.release_host_memory(host)
