"""The scan of all architectures: what it finds of one, and how it goes on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from layerstream.tools.benchmarks.architectures import summary_of
from layerstream.tools.benchmarks.tiny_models import model_classes


def scan(results: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run the command; returns all rows in its file."""
    command = [sys.executable, "-P", "-m", "layerstream.tools.benchmarks.architectures"]
    subprocess.run([*command, "--results", str(results), *arguments], check=True, timeout=170)
    return [json.loads(line) for line in results.read_text().splitlines()]


def test_a_class_is_compared_in_both_dtypes_and_only_once(tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    others = [{"class": name, "outcome": "equal"} for name in model_classes()]
    wanted = [each for each in others if each["class"] != "GPTNeoForCausalLM"]
    results.write_text("".join(json.dumps(each) + "\n" for each in wanted))
    *before, row = scan(results)
    assert before == wanted
    assert (row["class"], row["outcome"]) == ("GPTNeoForCausalLM", "equal")
    assert row["compared"] == [
        f"{dtype} {call}"
        for dtype in ("float32", "bfloat16")
        for call in ("forward", "steps", "generate")
    ]


def test_a_mixture_is_read_on_demand_in_each_way(tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    (row,) = scan(results, "--mixtures", "--only", "^Qwen3MoeForCausalLM$")
    assert (row["outcome"], row["kinds"]) == ("equal", ["Qwen3MoeExperts"])
    assert row["compared"] == [
        f"{dtype} {implementation} {amount} {call}"
        for dtype in ("float32", "bfloat16")
        for implementation in ("default", "eager")
        for amount in ("least", "all")
        for call in ("forward", "steps", "generate")
    ]


def test_the_tables_tell_what_is_not_equal() -> None:
    rows = {
        "A": {"outcome": "equal"},
        "B": {"outcome": "different", "detail": "forward: by up to 0.5"},
    }
    assert summary_of(rows).splitlines()[-1] == "| B | different | forward: by up to 0.5 |"
    assert "| equal | 1 |" in summary_of(rows)
