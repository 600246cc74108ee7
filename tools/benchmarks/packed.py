"""Steps of a checkpoint and of its packed variants, alternating: what fewer bytes bring.

Variants have the shapes of a plain Llama-shaped checkpoint, and random packed weights: the time of a step does not depend on
their values. Each is made once, beside the plain one. One token a step, without a cache, so that nothing but weights counts.
Times are medians; processor time, of all threads together, is the least of all steps.

    layerstream make-checkpoint /data/bench-3gb --like bench-3gb
    python -m layerstream.tools.benchmarks.packed /data/bench-3gb --throttle 800MB --host 1GiB
    python -m layerstream.tools.benchmarks.packed /data/bench-3gb --resident
"""

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from layerstream.pipeline import Budget, StreamedModel, Workload
from layerstream.stages.text import format_bytes
from layerstream.tools.console.arguments import byte_rate, positive_int

__all__ = ["VARIANTS", "main"]

Parts = dict[str, torch.Tensor]
_GROUP = 128
# GGUF's block types: values and bytes of a block, and where its scales are, in halves.
_BLOCKS = {"Q8_0": (32, 34, (0,)), "Q4_0": (32, 18, (0,)), "Q4_K": (256, 144, (0, 2))}
# The names that GGUF has for the tensors of a Llama.
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OTHERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def main(argv: list[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a plain checkpoint, Llama-shaped")
    parser.add_argument("--throttle", type=byte_rate, help="read at this rate")
    parser.add_argument("--host", default="1GiB", help="the host budget (default: %(default)s)")
    parser.add_argument("--resident", action="store_true", help="everything stays in memory")
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--steps", type=positive_int, default=2, help="timed, in each round")
    parser.add_argument("--only", help="variants, with commas between them")
    parser.add_argument(
        "--new-tokens",
        type=positive_int,
        default=2,
        help="that the plan expects; for many, it keeps residents unpacked (default: %(default)s)",
    )
    parser.add_argument(
        "--requests", type=positive_int, help="compare one request with so many at once, instead"
    )
    args = parser.parse_args(argv)
    chosen = args.only.split(",") if args.only else list(VARIANTS)
    paths = {name: VARIANTS[name](args.folder) for name in chosen}
    if args.requests:
        for name, path in paths.items():
            asyncio.run(_compare_requests(name, path, args))
        return 0
    seconds: dict[tuple[str, str], list[float]] = {}
    processor: dict[tuple[str, str], list[float]] = {}
    predicted: dict[tuple[str, str], float] = {}
    for number in range(args.rounds):
        for name, path in paths.items():
            for kernels in ("exact",) if name == "bf16" else ("exact", "fused"):
                found = asyncio.run(_steps(path, kernels, args))
                if found is None:
                    print(f"{name} is not there", file=sys.stderr)
                    continue
                seconds.setdefault((name, kernels), []).extend(found[0])
                processor.setdefault((name, kernels), []).extend(found[1])
                predicted[name, kernels] = found[2]
                print(
                    f"round {number + 1}: {name} {kernels} {found[0]}", file=sys.stderr, flush=True
                )
    print(
        "| variant | kernels | file GB | step s | predicted s | steps of bf16 | processor s | of bf16 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    plain = statistics.median(seconds["bf16", "exact"])
    # Others who use the machine make it longer only: the least is nearest to what a quiet one takes.
    plain_processor = min(processor["bf16", "exact"])
    for (name, kernels), times in seconds.items():
        median = statistics.median(times)
        size = sum(file.stat().st_size for file in _files(paths[name])) / 1e9
        print(
            f"| {name} | {kernels} | {size:.2f} | {median:.3f} | {predicted[name, kernels]:.3f} | "
            f"{plain / median:.2f} x | {min(processor[name, kernels]):.3f} | "
            f"{plain_processor / min(processor[name, kernels]):.2f} x |"
        )
    return 0


async def _steps(
    path: Path, kernels: str, args: argparse.Namespace
) -> tuple[list[float], list[float], float] | None:
    options: dict[str, Any] = {"reader": "throttled", "throttle_bytes_per_second": args.throttle}
    if not args.throttle:
        options = {"reader": "direct"}
    budget = Budget() if args.resident else Budget(host=args.host)
    async with StreamedModel.open(
        path,
        device="cpu",
        budget=budget,
        kernels=kernels,
        dtype=torch.bfloat16,
        workload=Workload(prompt_tokens=1, new_tokens=args.new_tokens),
        **options,
    ) as model:
        ids = torch.tensor([[5]])
        for _ in range(3 if args.resident else 2):  # residents are read, prefetching is under way
            await model.forward(input_ids=ids, use_cache=False)
        found, processor = [], []
        for _ in range(args.steps):
            began, used = time.perf_counter(), time.process_time()
            await model.forward(input_ids=ids, use_cache=False)
            found.append(round(time.perf_counter() - began, 4))
            processor.append(time.process_time() - used)
        return found, processor, model.plan.prediction.decode.seconds


async def _compare_requests(name: str, path: Path, args: argparse.Namespace) -> None:
    """Print how much is unpacked, and how long that takes, for one request and for many that share a sweep."""
    async with StreamedModel.open(
        path,
        device="cpu",
        budget=Budget() if args.resident else Budget(host=args.host),
        dtype=torch.bfloat16,
        workload=Workload(batch_size=args.requests, prompt_tokens=1, new_tokens=args.new_tokens),
        max_requests=args.requests,
    ) as model:
        ids = torch.tensor([[5]])

        async def step(requests: int) -> tuple[float, int, float]:
            before, began = model.timings().unpacking, time.perf_counter()
            await asyncio.gather(
                *(model.forward(input_ids=ids, use_cache=False) for _ in range(requests))
            )
            seconds, after = time.perf_counter() - began, model.timings().unpacking
            assert before is not None and after is not None  # noqa: S101, PT018
            return (
                seconds,
                after.bytes - before.bytes,
                after.busy_seconds - before.busy_seconds,
            )

        for _ in range(3):
            await step(args.requests)
        print(f"{name}: {format_bytes(model.plan.unpacked_once_bytes)} are for sharing")
        for _ in range(args.rounds):
            for requests in (1, args.requests):
                seconds, nbytes, busy = await step(requests)
                print(
                    f"  {requests} at once: {seconds:.3f} s; {nbytes / 1e6:.0f} MB unpacked in {busy:.3f} s",
                    flush=True,
                )


def _files(path: Path) -> Iterator[Path]:
    yield from [path] if path.is_file() else path.glob("*.safetensors")


def _variant(
    folder: Path, name: str, settings: dict[str, Any], pack: Callable[[str, tuple[int, ...]], Parts]
) -> Path:
    """The safetensors variant ``name``, made unless it is there."""
    target = folder.with_name(f"{folder.name}-{name}")
    done = target / "config.json"
    if done.exists():
        return target
    target.mkdir(exist_ok=True)
    weight_map: dict[str, str] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors: Parts = {}
        with safe_open(shard, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - no mapping
                shape = tuple(opened.get_slice(key).get_shape())
                if len(shape) > 1 and "proj" in key:
                    tensors |= pack(key.removesuffix(".weight"), shape)
                else:
                    tensors[key] = opened.get_tensor(key)
        save_file(tensors, target / shard.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    done.write_text(json.dumps({**config, "quantization_config": settings}))
    return target


def _bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _fp8(folder: Path) -> Path:
    def pack(stem: str, shape: tuple[int, ...]) -> Parts:
        rows, columns = shape
        return {
            # Without the two bytes that are no numbers.
            f"{stem}.weight": (_bytes(rows, columns) & 0xBF).view(torch.float8_e4m3fn),
            f"{stem}.weight_scale_inv": torch.rand(rows // _GROUP, columns // _GROUP) / 100,
        }

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    return _variant(folder, "fp8", settings | {"weight_block_size": [_GROUP, _GROUP]}, pack)


def _integers(bits: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        def pack(stem: str, shape: tuple[int, ...]) -> Parts:
            rows, columns = shape
            return {
                f"{stem}.weight_packed": _bytes(rows, columns * bits // 8).view(torch.int32),
                f"{stem}.weight_scale": (torch.rand(rows, columns // _GROUP) / 100).bfloat16(),
                f"{stem}.weight_shape": torch.tensor(shape),
            }

        weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": _GROUP}
        group = {"targets": ["Linear"], "weights": {**weights, "symmetric": True, "dynamic": False}}
        settings = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        }
        return _variant(folder, f"int{bits}", settings, pack)

    return make


def _gguf(kind: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        import gguf
        import numpy as np

        from layerstream.tools.benchmarks.gguf_files import describe_llama

        target = folder.with_name(f"{folder.name}-{kind}.gguf")
        if target.exists():
            return target
        values, nbytes, scales = _BLOCKS[kind]
        config = json.loads((folder / "config.json").read_text())
        unfinished = target.with_suffix(".unfinished")
        writer = gguf.GGUFWriter(str(unfinished), "llama")
        describe_llama(writer, config)
        for shard in sorted(folder.glob("*.safetensors")):
            with safe_open(shard, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - no mapping
                    shape = tuple(opened.get_slice(key).get_shape())
                    if len(shape) == 1:
                        writer.add_tensor(_gguf_name(key), opened.get_tensor(key).float().numpy())
                        continue
                    blocks = _bytes(shape[0], shape[1] // values, nbytes).numpy()
                    for at in scales:
                        blocks[..., at : at + 2] = np.frombuffer(
                            np.float16(0.01).tobytes(), np.uint8
                        )
                    writer.add_tensor(
                        _gguf_name(key),
                        blocks.reshape(shape[0], -1),
                        raw_dtype=gguf.GGMLQuantizationType[kind],
                    )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        shutil.move(unfinished, target)
        return target

    return make


def _gguf_name(key: str) -> str:
    if key in _OTHERS:
        return _OTHERS[key]
    _, _, layer, *rest = key.split(".")
    return f"blk.{layer}.{_NAMES['.'.join(rest[:-1])]}.weight"


VARIANTS: dict[str, Callable[[Path], Path]] = {
    "bf16": lambda folder: folder,
    "fp8": _fp8,
    "int8": _integers(8),
    "int4": _integers(4),
    **{kind: _gguf(kind) for kind in _BLOCKS},
}


if __name__ == "__main__":
    sys.exit(main())
