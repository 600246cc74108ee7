"""``layerstream demo``: which model it takes, and what it shows."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.forked import run_forked
from support.hub import Hub
from support.server import save_chat_model

from layerstream.tools.cli import main

RUN = "from layerstream.tools.cli import main; raise SystemExit(main())"
TAKE = f"from layerstream.tools.commands import demo; demo.HUB_MODEL = 'org/name'; {RUN}"
ASK = "from layerstream.tools.commands import demo; demo._HUB_SECONDS = 0.5; print(demo._no_hub())"


def python(
    program: str, *arguments: str | Path, cache: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**kept, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **environment},
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("demo") / "model")


def test_it_takes_a_chat_model_from_a_hub_that_answers_and_asks_it_something(
    model: Path, tmp_path: Path
) -> None:
    options = ("--max-new-tokens", "4", "--host", "64MiB", "--device", "cpu")
    with Hub({path.name: path.read_bytes() for path in model.iterdir()}) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        result = python(TAKE, "demo", *options, cache=tmp_path, HF_ENDPOINT=hub.url)
        hub.shutdown()
    assert result.returncode == 0, result.stderr
    assert "Taking org/name" in result.stderr
    assert "> Why is the sky blue?" in result.stdout
    assert "direct, 4 requests" in result.stdout  # past the page cache
    again = python(TAKE, "demo", *options, cache=tmp_path, HF_HUB_OFFLINE="1")
    assert (again.returncode, "Taking org/name" in again.stderr) == (0, True)


def test_a_hub_that_cannot_be_asked_is_named_with_its_reason(tmp_path: Path) -> None:
    result = python(ASK, cache=tmp_path, HF_HUB_OFFLINE="1")
    assert "the hub cannot be asked: OfflineModeIsEnabled" in result.stdout, result.stderr


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        result = python(ASK, cache=tmp_path, HF_ENDPOINT=endpoint)
    assert "the hub" in result.stdout, result.stderr
    assert "None" not in result.stdout


def test_what_is_streamed_stands_beside_what_the_page_cache_gives(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    shape = ("--like", "demo", "--layers", "24", "--hidden", "1024")
    assert main(["make-checkpoint", str(folder), *shape]) == 0
    result = run_forked("demo", folder, "--max-new-tokens", "3", "--device", "cpu", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["host_budget_bytes"] == report["model_bytes"] // 3
    assert report["peak_added_bytes"] <= report["host_budget_bytes"]
    read = report["stages"][0]["bytes"]
    assert read > 2 * report["model_bytes"]  # in each of three sweeps, but for what stays
    assert report["page_cache"]["token_ids"] == report["token_ids"]
    assert report["page_cache"]["step_tokens_per_second"] > 0
