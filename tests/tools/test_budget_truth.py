"""The benchmark of budgets runs a row, and tells what it took."""

import json
import subprocess
import sys
from pathlib import Path


def test_a_row_of_a_model_of_images_keeps_its_budget(tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "layerstream.tools.benchmarks.budget_truth", str(results)]
    command += ["--only", "vit", "--megabytes", "8", "--dtypes", "bfloat16", "--batches", "2"]
    ran = subprocess.run(
        [*command, "--factors", "1.02"], check=False, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (row,) = map(json.loads, results.read_text().splitlines())
    assert row["status"] == "done", row
    assert row["budget_bytes"] == int(1.02 * row["least_bytes"])
    assert 0 < row["peaks"]["forward"] <= row["peak_bytes"]
    assert any("measured on the meta device" in note for note in row["notes"])
