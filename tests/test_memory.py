"""The memory that streaming adds stays within its budget, as the kernel counts it."""

import asyncio
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cgroup import memory_cgroup, run_in
from support.models import save_model
from support.quantized import save_quantised

from layerstream.pipeline import Budget, Checkpoint, Hardware, StreamedModel, opening

MIB = 1 << 20
pytestmark = pytest.mark.timeout(400)  # for a minute's work, on a busy machine

# Prints the anonymous memory of a process that has all of its imports but no model, then streams one.
PROGRAM = """
import asyncio, gc, json, re, sys
import torch
from layerstream.pipeline import Budget, StreamedModel, Workload
from transformers import LlamaForCausalLM
import transformers.generation

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

folder = sys.argv[1]
host = {"none": None}.get(sys.argv[2], sys.argv[2])
ids = torch.arange(3, 19)[None]

async def main():
    torch.nn.Linear(64, 64)(torch.ones(1, 64))
    gc.collect()
    idle = anonymous()
    if host == "idle":
        print(json.dumps({"idle": idle}))
        return
    async with StreamedModel.open(
        folder,
        device="cpu",
        budget=Budget(host=host),
        workload=Workload(prompt_tokens=16, new_tokens=4),
    ) as model:
        memory = model.plan.host_memory
        tokens = await model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        for _ in range(3):
            await model.forward(input_ids=ids)
        print(json.dumps({"idle": idle, "added": anonymous() - idle, "planned": memory.used_bytes,
                          "budget": memory.budget_bytes,
                          "streamed": model.plan.disk_bytes_per_sweep, "tokens": tokens.shape[1]}))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of more than half a GiB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}
    path = tmp_path_factory.mktemp("memory") / "model"
    return save_model(path, "llama", **sizes, vocab_size=8000, head_dim=256, max_shard_size="200MB")


@pytest.fixture(scope="module")
def idle_bytes(folder: Path) -> int:
    """The anonymous memory of the process before it has a model."""
    with memory_cgroup() as group:
        result = run_in(group, PROGRAM, str(folder), "idle", limit_bytes=4 << 30)
    return int(json.loads(result.stdout.splitlines()[-1])["idle"])


def test_a_model_streams_in_a_cgroup_of_the_idle_process_and_its_budget(
    folder: Path, idle_bytes: int
) -> None:
    model_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    budget = 256 * MIB
    assert model_bytes > 2 * budget
    with memory_cgroup() as group:
        allowed = int(idle_bytes + 1.05 * budget)
        result = run_in(group, PROGRAM, str(folder), str(budget), limit_bytes=allowed)
    assert result.returncode == 0, f"killed or failed in {allowed} bytes: {result.stderr[-2000:]}"
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["tokens"] == 20
    assert report["streamed"] > budget
    assert report["added"] <= 1.05 * budget


@pytest.mark.parametrize(
    "quantiser", ["int4-groups", pytest.param("fp8-blocks", marks=pytest.mark.extended)]
)
def test_a_packed_model_streams_within_its_budget(
    tmp_path: Path, idle_bytes: int, quantiser: str
) -> None:
    """What compiles the kernels, and what they unpack to, count too."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    folder = save_quantised(
        tmp_path / "model", "llama", quantiser, **sizes, vocab_size=8000, head_dim=256
    )
    model_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    budget = 240 * MIB
    with memory_cgroup() as group:
        allowed = int(idle_bytes + 1.05 * budget)
        result = run_in(group, PROGRAM, str(folder), str(budget), limit_bytes=allowed)
    assert result.returncode == 0, f"killed or failed in {allowed} bytes: {result.stderr[-2000:]}"
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["tokens"] == 20
    assert report["streamed"] > 0
    assert model_bytes > budget
    assert report["added"] <= 1.05 * budget


def test_without_a_budget_a_model_streams_within_the_limit_of_its_cgroup(
    folder: Path, idle_bytes: int
) -> None:
    """The limit is that of a container: the machine's memory beyond it does not count."""
    with memory_cgroup() as group:
        allowed = idle_bytes + 300 * MIB
        result = run_in(group, PROGRAM, str(folder), "none", limit_bytes=allowed)
    assert result.returncode == 0, f"killed or failed in {allowed} bytes: {result.stderr[-2000:]}"
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["tokens"] == 20
    assert report["streamed"] > 256 * MIB
    assert report["planned"] <= report["budget"] < 300 * MIB
    assert report["added"] <= 300 * MIB


def test_a_machine_is_measured_in_the_memory_that_there_is(
    folder: Path, idle_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first command on it was killed while it measured copies, which takes 128 MiB."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with memory_cgroup() as group:
        allowed = idle_bytes + 132 * MIB
        result = run_in(group, PROGRAM, str(folder), "none", limit_bytes=allowed)
    assert result.returncode == 0, f"killed or failed in {allowed} bytes: {result.stderr[-2000:]}"


# Many requests at once, of many lengths; prints the most memory that was ever added, measured at every token.
MANY_REQUESTS = """
import asyncio, gc, json, re, sys
import torch
from layerstream.pipeline import Budget, StreamedModel, Workload
from transformers import LlamaForCausalLM
import transformers.generation

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

folder, host, prompt, rows = sys.argv[1], *map(int, sys.argv[2:5])
lengths = json.loads(sys.argv[5])

async def main():
    gc.collect()
    idle = most = anonymous()
    async with StreamedModel.open(
        folder,
        device="cpu",
        budget=Budget(host=host),
        workload=Workload(batch_size=rows, prompt_tokens=prompt, new_tokens=4),
        reader="direct",
        layer_batch_size=1,
        measure=False,
    ) as model:
        async def one(length):
            nonlocal most
            ids = torch.arange(length)[None] % 90 + 3
            async for _ in model.stream(input_ids=ids, max_new_tokens=4, do_sample=False):
                most = max(most, anonymous())

        await asyncio.gather(*map(one, lengths))
        print(json.dumps({"added": most - idle, "requests": model.stats().requests_completed,
                          "streamed": model.plan.disk_bytes_per_sweep,
                          "decode_residents": len(model.plan.decode_residents)}))

asyncio.run(main())
"""


def report_of_many(folder: Path, budget: int, prompt: int, rows: int, lengths: list[int]) -> Any:
    """What ``MANY_REQUESTS`` prints."""
    arguments = [str(folder), *map(str, (budget, prompt, rows)), json.dumps(lengths)]
    result = subprocess.run(
        [sys.executable, "-c", MANY_REQUESTS, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("host", [48 * MIB, None])
def test_trials_and_measuring_get_what_opening_has_left_of_the_budget(
    host: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int | None] = []

    async def probe(checkpoint: Checkpoint, **named: Any) -> Hardware:
        given.append(named["most_bytes"])
        return await Hardware.probe(checkpoint, device="cpu", measure=False)

    class NotedAssembly(opening.Assembly):
        def __init__(self, *args: Any, **named: Any) -> None:
            given.append(named["most_bytes"])
            super().__init__(*args, **named)

    monkeypatch.setattr(opening, "Hardware", SimpleNamespace(probe=probe))
    monkeypatch.setattr(opening, "Assembly", NotedAssembly)

    async def open_it() -> None:
        async with StreamedModel.open(folder, device="cpu", budget=Budget(host=host)):
            pass

    folder = save_model(tmp_path / "model")
    asyncio.run(open_it())
    assert len(given) == 2  # trials of products, then measuring
    for bytes_left in given:
        assert bytes_left is None if host is None else bytes_left is not None and bytes_left <= host


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_requests_of_many_lengths_stay_within_the_budget(dtype: str, tmp_path: Path) -> None:
    """MKL keeps packed matrices for each thread and size, oneDNN a compiled kernel for each length."""
    folder = save_model(
        tmp_path / "model",
        "llama",
        dtype=getattr(torch, dtype),
        hidden_size=640,
        intermediate_size=2560 if dtype == "float32" else 5120,
        num_hidden_layers=4,
    )
    budget = 100 * MIB
    choose = random.Random(7)
    lengths = [*range(1, 64), *(choose.randrange(1, 64) for _ in range(24))]
    report = report_of_many(folder, budget, 64, 2, lengths)
    assert report["requests"] == 63 + 24
    assert report["streamed"] > 0
    assert report["added"] <= 1.05 * budget


def test_decode_residents_and_the_memory_of_a_prompt_are_never_held_together(
    tmp_path: Path,
) -> None:
    """Memory that activations have left in the heap is returned before decode residents are added."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    folder = save_model(tmp_path / "model", "llama", **sizes, **heads)
    budget = 190 * MIB
    report = report_of_many(folder, budget, 1024, 1, [1024] * 3)
    assert report["decode_residents"] > 1
    assert report["streamed"] > 0
    assert report["added"] <= 1.05 * budget


def test_a_mixture_whose_experts_are_read_on_demand_stays_within_the_budget(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2}
    folder = save_model(tmp_path / "model", "mixtral", **sizes, **heads, num_hidden_layers=6)
    budget = 190 * MIB  # of which a prompt takes 117, and its experts in sum 150
    report = report_of_many(folder, budget, 1024, 1, [1024] * 3)
    assert report["added"] <= 1.05 * budget
