"""Clients that others wrote, on a real server process: each gets what transformers' ``generate`` says."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from clients.catalogue import CLIENTS
from clients.echo_server import echo_server
from clients.expectations import agent_case, plain_case, save_model_for_agents
from support.server import Server, running_server
from support.service import Reference

pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")
pytest.importorskip("transformers.utils.chat_parsing", reason="needs a newer transformers")

pytestmark = pytest.mark.timeout(600)  # some take a minute to be imported

FOLDER = Path(__file__).parent
# Nothing is reported to anybody, and no list of prices is fetched.
QUIET = {
    "DO_NOT_TRACK": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_COLOR": "1",
}


@pytest.fixture(scope="module")
def agents_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_for_agents(tmp_path_factory.mktemp("agents") / "model")


@pytest.fixture(scope="module")
def agents_server(agents_folder: Path) -> Iterator[Server]:
    with running_server(agents_folder, "--served-model-name", "tools") as server:
        yield server


@pytest.fixture(scope="module")
def case(
    server: Server, agents_server: Server, reference: Reference, agents_folder: Path
) -> dict[str, Any]:
    tools = agent_case(agents_folder, agents_server.url)
    return plain_case(reference, server.url) | {"tools": tools}


def command(name: str) -> list[str]:
    """What runs the script of a client; skips where that is not installed."""
    client = CLIENTS[name]
    installed = Path(os.environ.get("LAYERSTREAM_CLIENTS", "-")) / name
    if client.is_node:
        interpreter, ready = "node", (installed / "node_modules").is_dir()
    elif installed.is_dir():
        interpreter, ready = str(installed / "bin/python"), True
    else:  # one of the packages that all tests need
        interpreter, ready = sys.executable, find_spec(name.replace("-", "_")) is not None
    if not ready:
        pytest.skip(f"{name} is not installed here: tests/clients/run.sh {name}")
    return [interpreter, str(FOLDER / client.script)]


def outcomes(name: str, case: dict[str, Any], folder: Path) -> dict[str, str | None]:
    """What became of the checks of a client: None, or its error."""
    (folder / "case.json").write_text(json.dumps(case), "utf-8")
    made = folder / "outcomes.json"
    environment = {"CLIENT_CASE": str(folder / "case.json"), "CLIENT_OUTCOMES": str(made)}
    kept = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
    done = subprocess.run(
        command(name),
        cwd=folder,
        env={**kept, **QUIET, **environment, "HOME": str(folder), **node_path(name)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    sys.stdout.write(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr
    return json.loads(made.read_text("utf-8"))


def node_path(name: str) -> dict[str, str]:
    """Where scripts for node find their packages."""
    folder = os.environ.get("LAYERSTREAM_CLIENTS")
    return {} if folder is None else {"CLIENT_MODULES": str(Path(folder) / name / "node_modules")}


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_gets_what_the_model_says(name: str, case: dict[str, Any], tmp_path: Path) -> None:
    failed = {check: error for check, error in outcomes(name, case, tmp_path).items() if error}
    assert failed == {}


@pytest.mark.parametrize("name", CLIENTS)
def test_no_check_of_a_client_passes_with_an_echo(
    name: str, case: dict[str, Any], tmp_path: Path
) -> None:
    with echo_server() as url:
        echoed = case | {"url": url, "tools": case["tools"] | {"url": url}}
        found = outcomes(name, echoed, tmp_path)
    assert found != {}
    assert [check for check, error in found.items() if error is None] == []
