"""How fast weights are unpacked on one core, beside copying memory in the same run.

For every encoding and output: bytes read plus bytes written per second, and their ratio to ``torch.Tensor.copy_`` on as many
bytes, which are more than the processor's caches hold. Each round measures both, one after the other, and the best of each
counts, in processor time of the thread. Random bytes stand for weights: the kernels do the same work for all, subnormal scales included.

    python -m layerstream.tools.benchmarks.unpacking --rounds 5
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch

from layerstream.stages.unpack.compiling import (
    compile_seconds,
    set_cache_folder,
    why_not_compiled,
)
from layerstream.stages.unpack.fp8 import Fp8Packing
from layerstream.stages.unpack.gguf import GGUF_BLOCKS, GgufPacking
from layerstream.stages.unpack.integers import IntPacking
from layerstream.stages.unpack.mxfp4 import Mxfp4Packing
from layerstream.stages.unpack.packing import Packing

__all__ = ["main"]

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
# Files of the first loader of transformers do not have these.
_FLOAT32_ONLY = ("Q5_0", "Q5_1", "MXFP4")


class _Case(NamedTuple):
    name: str
    packing: Packing
    parts: list[torch.Tensor]
    dtypes: tuple[str, ...]


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="encodings whose name has this in it")
    parser.add_argument("--kernel-folder", help="where compiled kernels are kept")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    set_cache_folder(args.kernel_folder)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread,")
    print(f"{args.rows} x {args.columns}, best of {args.rounds}. {why_not_compiled() or ''}\n")
    print("| encoding | output | GB/s | memcpy GB/s | ratio | packed GB/s |")
    print("|---|---|---|---|---|---|")
    for case in _cases(args.rows, args.columns):
        if args.only.lower() in case.name.lower():
            for dtype in case.dtypes:
                print(_row(case, dtype, args), flush=True)
    print("\nSeconds spent on compiling, for all outputs of a kernel together:")
    print(", ".join(f"{name} {seconds:.2f}" for name, seconds in compile_seconds().items()))
    return 0


def _row(case: _Case, name: str, args: argparse.Namespace) -> str:
    out = torch.zeros(args.rows, args.columns, dtype=_DTYPES[name])
    packed_bytes = sum(part.nbytes for part in case.parts)
    moved_bytes = packed_bytes + out.nbytes
    source = torch.ones(moved_bytes // 2, dtype=torch.uint8)
    target = torch.zeros_like(source)
    # The first call compiles.
    case.packing.unpack(case.parts, 0, out[:1])
    copying, unpacking = [], []
    for _ in range(args.rounds):
        copying.append(_seconds(lambda: target.copy_(source)))
        unpacking.append(_seconds(lambda: case.packing.unpack(case.parts, 0, out)))
    memcpy, rate = 2 * len(source) / min(copying) / 1e9, moved_bytes / min(unpacking) / 1e9
    packed_rate = packed_bytes / min(unpacking) / 1e9
    return f"| {case.name} | {name} | {rate:.1f} | {memcpy:.1f} | {rate / memcpy:.2f} | {packed_rate:.1f} |"


def _seconds(call: Callable[[], object]) -> float:
    # Of this thread's processor time: others who use the machine would be counted in.
    began = time.thread_time()
    call()
    return time.thread_time() - began


def _cases(rows: int, columns: int) -> Iterator[_Case]:
    everything = ("bfloat16", "float32", "float16")
    for name, block in GGUF_BLOCKS.items():
        parts = [_bytes(rows, columns // block.columns * block.nbytes)]
        gguf = GgufPacking(encoding=name, columns=columns, arithmetic="float32")
        yield _Case(name, gguf, parts, everything)
        if name not in _FLOAT32_ONLY:
            gguf = GgufPacking(encoding=name, columns=columns, arithmetic="target")
            yield _Case(f"{name}, steps rounded", gguf, parts, ("bfloat16", "float16"))
    blocks = torch.rand(rows // 128, columns // 128)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        name = str(dtype).removeprefix("torch.float8_")
        parts = [_bytes(rows, columns).view(dtype), blocks]
        yield _Case(f"fp8 {name}, 128 x 128", Fp8Packing(), parts, everything)
    weights, scales = (
        _bytes(rows, columns).view(torch.float8_e4m3fn),
        torch.rand(rows, 1).bfloat16(),
    )
    fp8 = Fp8Packing(arithmetic="scale")
    yield _Case("fp8 e4m3, bfloat16 per row", fp8, [weights, scales], everything)
    nibbles, exponents = _bytes(rows, columns // 2), _bytes(rows, columns // 32)
    packed = [nibbles.view(torch.int8), exponents.view(torch.float8_e8m0fnu)]
    yield _Case("fp4, 1 x 32", Fp8Packing(packs_fp4=True), packed, everything)
    packed = [nibbles.view(rows, -1, 16), exponents]
    yield _Case("mxfp4", Mxfp4Packing(), packed, everything)
    bits: Literal[4, 8]
    for bits in (4, 8):
        words = _bytes(rows, columns * bits // 8).view(torch.int32)
        packing = IntPacking(bits=bits, columns=columns)
        grouped = [words, torch.rand(rows, columns // 128).bfloat16()]
        yield _Case(f"int{bits}, groups of 128", packing, grouped, everything)
        zeros = _bytes(rows, columns // 128).view(torch.int8)
        yield _Case(
            f"int{bits}, groups of 128, zero points", packing, [*grouped, zeros], everything
        )
    weights, scales = _bytes(rows, columns).view(torch.int8), torch.rand(rows, 1)
    yield _Case(
        "int8, float32 per row", IntPacking(bits=8, columns=columns), [weights, scales], everything
    )


def _bytes(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, columns), dtype=torch.uint8)


if __name__ == "__main__":
    sys.exit(main())
