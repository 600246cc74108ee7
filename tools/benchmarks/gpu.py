"""The GPU benchmark: ``python -m layerstream.tools.benchmarks.gpu --out DIR``; tools/gpu_check.sh runs it.

Makes a checkpoint of 11 GB with random weights, measures row after row until its time is up, and writes the results
after each. A row that was not measured says so, and why.
"""

import argparse
import faulthandler
import gc
import json
import os
import platform
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from layerstream.stages.process.headroom import host_available_bytes
from layerstream.stages.text import format_bytes, format_table
from layerstream.tools.benchmarks.accelerator import Accelerator
from layerstream.tools.benchmarks.copying import claim_host_memory
from layerstream.tools.benchmarks.gpu_bench import Bench, GpuRow, NotMeasuredError
from layerstream.tools.benchmarks.gpu_rows import ROWS
from layerstream.tools.console.arguments import positive_int
from layerstream.tools.synthetic.checkpoints import CheckpointSpec, make_checkpoint
from layerstream.tools.synthetic.families import FAMILIES, scaled

__all__ = ["main"]

MIB = 1 << 20
# Host RAM for every row: the page-locked model of 11 GB, a peer's copy of it, and the page cache of its files.
_HOST_BYTES = 36 << 30
# Where a row works, it takes less than half of this.
_ROW_SECONDS = 120.0
_NOT_REACHED = "not reached"


def main() -> int:
    """Run the benchmark; exit code 1 if a test or a row failed."""
    args = _arguments()
    deadline = time.monotonic() + args.seconds
    if args.checkpoint_only:
        claim_host_memory(0 if args.rehearse else _HOST_BYTES)
        make_checkpoint(args.scratch / "model", _checkpoint_spec(rehearse=args.rehearse))
        if not args.rehearse:
            os.sync()  # so that nothing is written while the disk is measured
        return 0
    if not args.rehearse and not torch.cuda.is_available():
        print("there is no CUDA device here; --rehearse runs this on the CPU", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(device=torch.device("cpu" if args.rehearse else "cuda:0"))
    result: dict[str, Any] = _previous_result(args) or {
        "rehearsal": args.rehearse,
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(),
        "device": accelerator.describe(),
        "tests": _test_counts(args.tests),
        "rows": [_entry(row, _NOT_REACHED) for row in ROWS],
    }
    _write(args.out, result)
    with tempfile.TemporaryDirectory(prefix="layerstream-gpu-") as temporary:
        bench = _prepare(args, accelerator, args.scratch or Path(temporary), result)
        for index, row in enumerate(ROWS):
            if result["rows"][index]["why"] != _NOT_REACHED:  # done by an earlier process
                continue
            out_of_time = time.monotonic() > deadline
            with _time_limit(row, index, result, args, deadline):
                entry = (
                    _entry(row, "out of time")
                    if out_of_time
                    else _measure(row, bench, args.rehearse)
                )
            result["rows"][index] = entry
            result["found"] = bench.found
            _write(args.out, result)
    print((args.out / "gpu_check.txt").read_text(encoding="utf-8"), end="")
    failed = [entry for entry in result["rows"] if entry["failed"]]
    tests = result["tests"]
    return int(bool(failed) or (tests is not None and bool(tests["failed"] or not tests["passed"])))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), help="where results go (default: here)")
    parser.add_argument(
        "--scratch",
        type=Path,
        help="where the checkpoint is made, unless it is there, and left (default: TMPDIR, and removed)",
    )
    parser.add_argument(
        "--seconds", type=positive_int, default=330, help="no row begins after these"
    )
    parser.add_argument(
        "--checkpoint-only",
        action="store_true",
        help="make the checkpoint in --scratch, where the next run finds it, and no more",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on behind the rows that --out has"
    )
    parser.add_argument("--tests", type=Path, help="JUnit XML of the tests, to go into the result")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny, on the CPU: measures nothing"
    )
    args = parser.parse_args()
    if args.checkpoint_only and args.scratch is None:
        parser.error("--checkpoint-only needs --scratch")
    return args


def _previous_result(args: argparse.Namespace) -> dict[str, Any] | None:
    """The result of an earlier process, if this one resumes it."""
    if not args.resume:
        return None
    found: dict[str, Any] = json.loads((args.out / "gpu_check.json").read_text(encoding="utf-8"))
    return found


@contextmanager
def _time_limit(
    row: GpuRow, index: int, result: dict[str, Any], args: argparse.Namespace, deadline: float
) -> Iterator[None]:
    """Give up a row that hangs: a call of the driver cannot be ended, so a new process measures the other rows."""

    def give_up() -> None:
        why = f"failed: it had not come to its end in {_ROW_SECONDS:.0f} s"
        print(f"   {why}", file=sys.stderr)
        faulthandler.dump_traceback(2)
        result["rows"][index] = _entry(row, why, failed=True)
        _write(args.out, result)
        left = max(1, int(deadline - time.monotonic()))
        command = [*sys.argv[1:], "--resume", "--seconds", str(left)]
        module = ["-m", "layerstream.tools.benchmarks.gpu"]
        os.execv(sys.executable, [sys.executable, *module, *command])  # noqa: S606 - this program

    timer = threading.Timer(_ROW_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _prepare(
    args: argparse.Namespace, accelerator: Accelerator, scratch: Path, result: dict[str, Any]
) -> Bench:
    """Make the checkpoint and claim host memory; both are recorded in ``result``."""
    began = time.monotonic()
    try:
        made = make_checkpoint(scratch / "model", _checkpoint_spec(rehearse=args.rehearse))
    except Exception as error:
        for entry in result["rows"]:
            entry["why"] = f"no checkpoint: {error}"
        _write(args.out, result)
        raise
    result["model_bytes"] = made.total_bytes
    seconds = None if made.reused else time.monotonic() - began
    result.setdefault("seconds_to_make_the_model", seconds)
    # On a machine with less memory, rows that do not fit say so.
    claim_host_memory(0 if args.rehearse else _HOST_BYTES)
    result["machine"]["host_available_bytes"] = host_available_bytes()
    _write(args.out, result)
    return Bench(
        accelerator=accelerator,
        folder=made.folder,
        out=args.out,
        sweeps=2 if args.rehearse else 20,
        block_bytes=tuple(MIB << n for n in ((0, 1) if args.rehearse else range(0, 9, 2))),
        pin_bytes=4 * MIB if args.rehearse else 4 << 30,
        found=result.get("found", {}),
    )


def _machine() -> dict[str, Any]:
    """The machine without its GPU."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "host_available_bytes": host_available_bytes(),
    }


def _checkpoint_spec(*, rehearse: bool) -> CheckpointSpec:
    family = FAMILIES["llama-3.1-8b"]
    config = scaled(
        family.config,
        layers=4 if rehearse else 24,
        hidden=128 if rehearse else None,
        vocab=320 if rehearse else 32000,
    )
    # Without an end token, which random weights would sample sooner or later.
    config |= {"bos_token_id": 256, "eos_token_id": None}
    return CheckpointSpec(
        family="llama-3.1-8b",
        config=config,
        dtype="bfloat16",
        max_shard_bytes=MIB if rehearse else 1 << 30,
        seed=0,
        sparse=False,
    )


def _entry(row: GpuRow, why: str, *, failed: bool = False) -> dict[str, Any]:
    return {
        "name": row.name,
        "target": row.target,
        "measured": False,
        "why": why,
        "failed": failed,
        "result": None,
    }


def _measure(row: GpuRow, bench: Bench, rehearse: bool) -> dict[str, Any]:
    print(f".. {row.name}", file=sys.stderr, flush=True)
    gc.collect()  # models and page-locked memory of earlier rows, in reference cycles
    began = time.monotonic()
    try:
        found = row.measure(bench)
    except NotMeasuredError as error:
        return _entry(row, str(error))
    except Exception as error:  # noqa: BLE001 - the other rows are still measured
        print(f"   failed: {error!r}", file=sys.stderr)
        return _entry(row, f"failed: {type(error).__name__}: {error}"[:300], failed=True)
    if rehearse:  # a CPU's results are not recorded
        return _entry(row, "rehearsed")
    return _entry(row, "") | {
        "measured": True,
        "result": asdict(found),
        "seconds": time.monotonic() - began,
    }


def _test_counts(path: Path | None) -> dict[str, int] | None:
    """Read the counts from the JUnit XML that pytest wrote."""
    if path is None or not path.is_file():
        return None
    suites = list(ET.parse(path).getroot().iter("testsuite"))  # noqa: S314 - pytest's own output
    counts = {
        name: sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    }
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
    }


def _write(out: Path, result: dict[str, Any]) -> None:
    (out / "gpu_check.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    title = f"{result['device']['name']}, torch {result['device']['torch']}, {result['date']}"
    if "model_bytes" in result:
        title += f", model of {format_bytes(result['model_bytes'])}"
    tests = result["tests"]
    test_summary = (
        "tests: not run"
        if tests is None
        else f"tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
    )
    rows = [
        (
            entry["name"],
            entry["target"],
            _ratio_cell(entry),
            entry["result"]["says"] if entry["measured"] else entry["why"],
        )
        for entry in result["rows"]
    ]
    table = format_table(("row", "target", "ratio", ""), rows)
    (out / "gpu_check.txt").write_text(f"{title}\n{test_summary}\n{table}\n", encoding="utf-8")


def _ratio_cell(entry: dict[str, Any]) -> str:
    if not entry["measured"]:
        return "not measured"
    ratio = entry["result"]["ratio"]
    return "-" if ratio is None else f"{ratio:.3f}"


if __name__ == "__main__":
    sys.exit(main())
