"""The memory that streaming adds stays within its budget, as the kernel counts it."""

import json
from pathlib import Path

from support.cgroup import memory_cgroup, run_in
from support.models import save_model

MIB = 1 << 20

# Prints the anonymous memory of a process that has all of its imports but no model, then streams one.
PROGRAM = """
import asyncio, gc, json, re, sys
import torch
from layerstream.pipeline import Budget, StreamedModel, Workload
from transformers import LlamaForCausalLM
import transformers.generation

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

folder, budget = sys.argv[1], int(sys.argv[2])
ids = torch.arange(3, 19)[None]

async def main():
    torch.nn.Linear(64, 64)(torch.ones(1, 64))
    gc.collect()
    idle = anonymous()
    if budget == 0:
        print(json.dumps({"idle": idle}))
        return
    async with StreamedModel.open(
        folder,
        device="cpu",
        budget=Budget(host=budget),
        workload=Workload(prompt_tokens=16, new_tokens=4),
    ) as model:
        used = model.plan.host_memory.used_bytes
        tokens = await model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        for _ in range(6):
            await model.forward(input_ids=ids)
        print(json.dumps({"idle": idle, "added": anonymous() - idle, "planned": used,
                          "streamed": model.plan.disk_bytes_per_sweep, "tokens": tokens.shape[1]}))

asyncio.run(main())
"""


def test_a_model_streams_in_a_cgroup_of_the_idle_process_and_its_budget(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}
    folder = save_model(
        tmp_path / "model", "llama", **sizes, vocab_size=8000, head_dim=256, max_shard_size="200MB"
    )
    model_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    budget = 256 * MIB
    assert model_bytes > 2 * budget
    with memory_cgroup() as group:
        idle = json.loads(
            run_in(group, PROGRAM, str(folder), "0", limit_bytes=4 << 30).stdout.splitlines()[-1]
        )
        allowed = int(idle["idle"] + 1.05 * budget)
        result = run_in(group, PROGRAM, str(folder), str(budget), limit_bytes=allowed)
    assert result.returncode == 0, f"killed or failed in {allowed} bytes: {result.stderr[-2000:]}"
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["tokens"] == 20
    assert report["streamed"] > budget
    assert report["added"] <= 1.05 * budget
