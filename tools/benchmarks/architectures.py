"""Every architecture of transformers, tiny: does the drop-in compute what transformers' own model does?

    python -m layerstream.tools.benchmarks.architectures --results FILE

Each class is built with a small config and random weights, saved, and opened with from_pretrained and with load_streamed, within
the least memory that it streams in; in float32 and in bfloat16. Compared bit for bit are a forward pass, passes with the cache that
they return, and greedy generation. Each class has a process of its own. What FILE has rows of is not run again; the tables of
``architectures.md`` are written from it.

With ``--mixtures``, those with experts that can be read on demand: with few cells and with all, under transformers' default
implementation and its eager one; see ``experts.md``.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerstream.tools.benchmarks.architecture_check import check
from layerstream.tools.benchmarks.mixture_check import (
    check_mixture,
    expert_classes,
    has_expert_class,
)
from layerstream.tools.benchmarks.tiny_models import model_classes

__all__ = ["main", "summary_of"]

Check = Callable[[str, Path], dict[str, Any]]

_SAME, _REFUSED, _NOT_BUILT = "equal", "refused", "not built"


def _run_alone(name: str, seconds: float, check: Check) -> dict[str, Any]:
    """Check the class in a child process; a row for it, however it ends."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_child(name, writing, check)
    os.close(writing)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    began = time.monotonic()
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    took = time.monotonic() - began
    if text:
        return {**json.loads(text), "seconds": round(took, 1)}
    ended = f"ended with status {status}"
    return {"outcome": "took too long" if took >= seconds else "crashed", "detail": ended}


def _be_child(name: str, writing: int, check: Check) -> None:
    """Check the class, write the row, and end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        with tempfile.TemporaryDirectory() as folder:
            row = check(name, Path(folder))
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is this row's
        row = {"outcome": "failed", "detail": repr(error), "trace": traceback.format_exc()[-2000:]}
    with os.fdopen(writing, "w") as pipe:
        json.dump(row, pipe)
    os._exit(0)


def summary_of(rows: dict[str, dict[str, Any]]) -> str:
    """The tables of the report, in Markdown."""
    lines = ["| outcome | classes |", "|---|---|"]
    for outcome, count in Counter(row["outcome"] for row in rows.values()).most_common():
        lines.append(f"| {outcome} | {count} |")
    lines += ["", "| class | outcome | detail |", "|---|---|---|"]
    for name, row in sorted(rows.items(), key=lambda item: (item[1]["outcome"], item[0])):
        if row["outcome"] != _SAME:
            detail = re.sub(r"\s+", " ", str(row.get("detail", ""))).replace("|", "/")
            lines.append(f"| {name} | {row['outcome']} | {detail:.300} |")
    if kinds := {kind for row in rows.values() for kind in row.get("kinds", [])}:
        compared = {k for row in rows.values() if row.get("compared") for k in row.get("kinds", [])}
        missing = ", ".join(sorted(expert_classes() - compared))
        lines += ["", f"Expert classes: {len(expert_classes())}, built {len(kinds)}"]
        lines += [f"Compared: {len(compared)}; not: {missing or 'none'}"]
    return "\n".join(lines)


def _import_beforehand() -> None:
    """Import what each child needs, once for all."""
    import transformers
    from transformers import conversion_mapping, generation, masking_utils, modeling_layers
    from transformers.models.llama import modeling_llama

    del generation, masking_utils, modeling_layers, modeling_llama
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # type: ignore[no-untyped-call] # makes a table of all
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def main() -> int:
    """Run what has no row yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--results", type=Path, required=True, help="a file of rows, which is gone on with"
    )
    parser.add_argument(
        "--all", action="store_true", help="all classes, not one of each architecture"
    )
    parser.add_argument(
        "--mixtures", action="store_true", help="those with experts that can be read on demand"
    )
    parser.add_argument(
        "--only", default="", help="a regular expression of the classes to run, again"
    )
    parser.add_argument("--retry", default="", help="an outcome whose classes are run again")
    parser.add_argument("--seconds", type=float, default=180, help="the most time for a class")
    args = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if args.results.exists():
        for line in args.results.read_text().splitlines():
            row = json.loads(line)
            rows[row.pop("class")] = row
    _import_beforehand()
    names = list(model_classes(all_of_them=args.all))
    if args.mixtures:
        names = [name for name in names if has_expert_class(name)]
    with args.results.open("a") as results:
        for name in names:
            before = rows.get(name, {"outcome": args.retry})["outcome"]
            if not re.search(args.only, name) if args.only else before != args.retry:
                continue
            print(f"\r{name:60}", end="", file=sys.stderr, flush=True)
            rows[name] = _run_alone(name, args.seconds, check_mixture if args.mixtures else check)
            results.write(json.dumps({"class": name, **rows[name]}) + "\n")
            results.flush()
    print(summary_of(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
