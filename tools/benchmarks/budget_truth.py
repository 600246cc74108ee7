"""Whether plans keep their budgets: ``python -m layerstream.tools.benchmarks.budget_truth RESULTS.jsonl``.

For every architecture of transformers, a model of some megabytes is written, its least budget asked for, and plans run at 1.02, 1.2
and 2 times that, each in a process of its own: one request of exactly the workload, then a forward pass; or eight requests at
once with cancellations. What a process takes beside its loaded code is sampled from outside; with ``--cgroup``, the kernel kills
it if that is more than the budget by a byte. Rows are appended to the file of results, and those in it are not run again. A row
fails that is killed, or takes 2 % or 4 MiB more than its budget, whichever is more.

With ``--packed fp8,int4,Q4_K``, it is a Llama of 270 MB whose weights are packed so, with exact and with fused kernels.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from layerstream.stages.text import format_bytes
from layerstream.tools.benchmarks.budget_models import (
    Architecture,
    architectures,
    fitted_config,
    write_model,
)
from layerstream.tools.benchmarks.budget_row import BudgetRow, run_row
from layerstream.tools.console.arguments import positive_int
from layerstream.tools.console.tables import print_table

__all__ = ["main"]

_ALLOWED_SHARE, _ALLOWED_BYTES = 0.02, 4 << 20
_WASTED_TIMES = 3
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_NAMES = ("concurrent", "batch", "prompt", "reader", "factor")
_PACKED = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 16_384,
}


def main() -> int:
    """Run what is missing in the results, and print the worst rows; exit code 1 if any exceeds its budget."""
    args = _parser().parse_args()
    _load_libraries()
    done = _read(args.results)
    if not args.table:
        _run_all(args, done)
    rows = _read(args.results).values()
    _print_worst(list(rows), count=args.worst)
    return 1 if any(_excess(row) > 0 or row["status"] == "killed" for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="a file of JSON lines, which is added to")
    parser.add_argument("--models", type=positive_int, help="at most so many architectures")
    parser.add_argument("--only", help="names of architectures, separated by commas")
    parser.add_argument("--seconds", type=positive_int, default=600, help="(default: 600)")
    parser.add_argument("--row-seconds", type=positive_int, default=120, help="(default: 120)")
    parser.add_argument(
        "--megabytes", type=positive_int, default=80, help="of a model (default: 80)"
    )
    parser.add_argument("--layers", type=positive_int, default=4, help="(default: 4)")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--factors", default="1.02,1.2", help="of the least budget")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--prompts", default="700")
    parser.add_argument("--readers", default="direct")
    parser.add_argument(
        "--cgroup", action="store_true", help="in a memory cgroup of what is idle, and the budget"
    )
    parser.add_argument("--concurrent", action="store_true", help="eight requests at once, too")
    parser.add_argument("--packed", help="encodings of a Llama to run instead, separated by commas")
    parser.add_argument(
        "--measure", action="store_true", help="probe the machine, with an empty cache"
    )
    parser.add_argument("--folder", type=Path, help="for the models (default: a temporary one)")
    parser.add_argument("--table", action="store_true", help="only print the table of the results")
    parser.add_argument("--worst", type=positive_int, default=20, help="rows (default: 20)")
    return parser


def _load_libraries() -> None:
    """Load what every process needs, before any of them is forked."""
    import importlib.util

    import torch
    import transformers.generation

    import layerstream.pipeline.starting

    if importlib.util.find_spec("numba"):
        import numba.core.codegen

        del numba
    del torch, transformers, layerstream


def _run_all(args: argparse.Namespace, done: dict[str, dict[str, Any]]) -> None:
    until = time.monotonic() + args.seconds
    models = {each.name: each for each in architectures()}
    names = list(models) if args.only is None else args.only.split(",")
    if args.packed:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for row in _run_packed(args, models["llama"], Path(folder), done):
                _add(args, row)
                if time.monotonic() > until:
                    return
        return
    if unknown := set(names) - models.keys():
        raise SystemExit(f"no architectures of transformers: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name in names[: args.models]:
            for dtype in args.dtypes.split(","):
                for row in _run_model(args, models[name], dtype, Path(folder), done):
                    _add(args, row)
                    if time.monotonic() > until:
                        return


def _add(args: argparse.Namespace, row: dict[str, Any]) -> None:
    with args.results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(_line(row), flush=True)


def _choices(
    args: argparse.Namespace, *, generates: bool
) -> Iterator[tuple[bool, int, int, str, float]]:
    return itertools.product(
        (False, True) if args.concurrent and generates else (False,),
        map(int, args.batches.split(",")),
        map(int, args.prompts.split(",")),
        args.readers.split(","),
        map(float, args.factors.split(",")),
    )


def _run_packed(
    args: argparse.Namespace,
    architecture: Architecture,
    folder: Path,
    done: dict[str, dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Run all rows of packed models that are not done yet, and yield them."""
    config = architecture.config(**_PACKED)
    _in_process(lambda: write_model(architecture, config, folder / "plain", "bfloat16"))
    for name in args.packed.split(","):
        made: list[Path] = [folder / f"plain-{name}", folder / f"plain-{name}.gguf"]
        _in_process(lambda name=name: _pack(folder / "plain", name))  # type: ignore[misc]
        path = next(each for each in made if each.exists())
        for kernels, dtype in itertools.product(("exact", "fused"), args.dtypes.split(",")):
            about = {"name": f"{name} {kernels}", "model": architecture.model, "dtype": dtype}
            about |= {"megabytes": 270, "layers": 8, "cgroup": args.cgroup}
            for choice in _choices(args, generates=True):
                each = about | dict(zip(_NAMES, choice, strict=True))
                if _key(each) in done:
                    continue
                given: dict[str, Any] = {key: each[key] for key in ("model", "cgroup", *_NAMES)}
                row = BudgetRow(
                    folder=str(path),
                    measure=args.measure,
                    kernels=kernels,
                    dtype=dtype,
                    encodings=(name,),
                    **given,
                )
                yield {**each, **run_row(row, seconds=args.row_seconds)}


def _pack(plain: Path, name: str) -> None:
    from layerstream.tools.benchmarks.packed import VARIANTS

    VARIANTS[name](plain)


def _run_model(
    args: argparse.Namespace,
    architecture: Architecture,
    dtype: str,
    folder: Path,
    done: dict[str, dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Run all rows of one model that are not done yet, and yield them."""
    choices = _choices(args, generates=architecture.generates)
    about = {"name": architecture.name, "model": architecture.model, "dtype": dtype}
    about |= {"megabytes": args.megabytes, "layers": args.layers, "cgroup": args.cgroup}
    wanted = [about | dict(zip(_NAMES, choice, strict=True)) for choice in choices]
    missing = [each for each in wanted if _key(each) not in done]
    if not missing:
        return
    with tempfile.TemporaryDirectory(dir=folder) as model:
        try:
            _write(architecture, args, dtype, Path(model))
        except ValueError as error:  # what cannot be built is a result, too
            why = str(error)[:300]
            yield from ({**each, "status": "not built", "why": why} for each in missing)
            return
        nbytes = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
        for each in missing:
            given: dict[str, Any] = {name: each[name] for name in ("model", "cgroup", *_NAMES)}
            row = BudgetRow(folder=model, measure=args.measure, **given)
            yield {**each, **run_row(row, seconds=args.row_seconds), "model_bytes": nbytes}


def _write(architecture: Architecture, args: argparse.Namespace, dtype: str, folder: Path) -> None:
    def write() -> None:
        parameters = args.megabytes * 1_000_000 // _ITEM_BYTES[dtype]
        config = fitted_config(architecture, parameters, layers=args.layers)
        write_model(architecture, config, folder, dtype)

    _in_process(write)


def _in_process(work: Callable[[], object]) -> None:
    """Do ``work`` in a process of its own, whose threads and memory this one does not inherit."""
    import os

    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - told to the parent
            os.write(sending, (str(error) or type(error).__name__).encode()[:4000])
        finally:
            os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        why = pipe.read().decode(errors="replace")
    os.waitpid(child, 0)
    if why:
        raise ValueError(why)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    rows = map(json.loads, path.read_text().splitlines())
    return {_key(row): row for row in rows}


def _key(row: dict[str, Any]) -> str:
    names = ("name", "dtype", "megabytes", "layers", "cgroup", *_NAMES)
    return json.dumps([row[name] for name in names])


def _excess(row: dict[str, Any]) -> int:
    """Bytes above the budget and what is allowed above that; negative below."""
    budget = row.get("budget_bytes")
    if budget is None:
        return -1
    excess: int = row["peak_bytes"] - budget - max(int(_ALLOWED_SHARE * budget), _ALLOWED_BYTES)
    return excess


def _line(row: dict[str, Any]) -> str:
    what = f"{row['name']} {row['dtype']} {row['batch']}x{row['prompt']} {row['reader']} {row['factor']}"
    what += " eight" if row["concurrent"] else ""
    what += " cgroup" if row["cgroup"] else ""
    if "budget_bytes" not in row:
        return f"{what}: {row['status']} {row.get('why', '')}"
    figures = f"{format_bytes(row['peak_bytes'])} of {format_bytes(row['budget_bytes'])}"
    bad = " EXCEEDS" if _excess(row) > 0 else ""
    return f"{what}: {figures}{bad} {row['status']} {row.get('why', '')}"


def _print_worst(rows: Sequence[dict[str, Any]], *, count: int) -> None:
    measured = [row for row in rows if "budget_bytes" in row and row["status"] == "done"]
    failed = [row for row in rows if row["status"] not in {"done", "not built"}]
    above = [row for row in measured if _excess(row) > 0]
    wasted = [r for r in measured if r["least_bytes"] > _WASTED_TIMES * max(r["peak_bytes"], 1)]
    print(
        f"{len(measured)} rows of {len({row['name'] for row in measured})} architectures, {len(above)} above the budget; "
        f"{len(failed)} failed, {len(wasted)} with a least budget of {_WASTED_TIMES} times what was used"
    )
    measured.sort(key=lambda row: row["peak_bytes"] / row["budget_bytes"], reverse=True)
    columns = ("architecture", "dtype", "rows x tokens", "x least", "budget", "peak", "of it", "in")
    lines = [
        (
            row["name"],
            row["dtype"],
            f"{row['batch']} x {row['prompt']}" + (" (eight)" if row["concurrent"] else ""),
            f"{row['factor']:g}",
            format_bytes(row["budget_bytes"]),
            format_bytes(row["peak_bytes"]),
            f"{100 * row['peak_bytes'] / row['budget_bytes']:.0f} %",
            max(row["peaks"], key=row["peaks"].get),
        )
        for row in measured[:count]
    ]
    print_table("the worst", columns, lines)


if __name__ == "__main__":
    sys.exit(main())
