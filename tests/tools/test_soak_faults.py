"""The soak with faults and budgets, in a short form: all texts are right, and nothing grows."""

import json
import sys
from pathlib import Path

import pytest
from support.models import save_model

from layerstream.tools.benchmarks import soak_faults


@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_requests_beside_faults_and_changing_budgets_have_the_right_tokens(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reader: str,
) -> None:
    folder = save_model(tmp_path / "model", "llama", num_hidden_layers=6)
    # In so few sweeps, each of them has to happen often.
    monkeypatch.setattr(soak_faults, "_BETWEEN_PLANS", 5)
    monkeypatch.setattr(soak_faults, "_BETWEEN_OUTAGES", 30)
    monkeypatch.setattr(soak_faults, "_FAULTS", 0.05)
    options = ["--sweeps", "150", "--seconds", "20", "--reader", reader]
    monkeypatch.setattr(sys, "argv", ["soak", str(folder), *options])
    code = soak_faults.main()
    result = json.loads(capsys.readouterr().out)
    assert result["wrong"] == []
    assert code == 0, result["idle"]
    assert result["fates"]["finished"]
    assert result["plans"]["adopted"]
