"""`layerstream serve`: the page at `/`, and what it shows of the machine."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support.server import running_server, save_chat_model
from support.service import COMPLETIONS, MAX_ANSWERS, TEXT_BODY, gauge, idle

from layerstream.stages.telemetry.spans import Activity, Span

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "tools" / "serving" / "page"
FILES = sorted(path.name for path in PAGE.iterdir())
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


@pytest.fixture
def visitor(server: Any) -> Any:
    """A browser that knows no key."""
    with httpx.Client(base_url=server.url, timeout=60) as visitor:
        yield visitor


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in FILES)])
def test_the_page_is_served_without_a_key_and_can_load_nothing_of_others(
    path: str, visitor: Any
) -> None:
    answer = visitor.get(path)
    assert answer.status_code == 200
    kind = TYPES[Path(path).suffix or ".html"]
    assert answer.headers["content-type"].partition(";")[0] == kind
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(
        rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";")
    )
    assert (policy.pop("script-src"), policy.pop("connect-src")) == ("'self'", "'self'")
    assert policy.pop("style-src") == policy.pop("img-src") == "'self'"
    assert {"default-src", "base-uri", "form-action", "frame-ancestors"} == policy.keys()
    assert set(policy.values()) == {"'none'"}


def test_all_that_the_page_names_is_a_file_of_its_own(visitor: Any) -> None:
    texts = {name: (PAGE / name).read_text(encoding="utf-8") for name in FILES}
    named = set(re.findall(r"""["'](/page/[^"']+)["']""", "".join(texts.values())))
    assert {f"/page/{name}" for name in FILES} - named == {"/page/index.html"}
    for path in named:
        assert visitor.get(path).status_code == 200
    for name, text in texts.items():
        assert not re.findall(
            r"""(?:https?:)?//[\w.-]+\.\w""", text.replace("http://www.w3.org/2000/svg", "")
        ), name
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|innerHTML|<style", text), name


@pytest.mark.parametrize(
    "path", ["/page/", "/page/other.js", "/page/..%2Fapp.py", "/page/../app.py"]
)
def test_no_other_files_are_served(path: str, visitor: Any) -> None:
    answer = visitor.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


def test_what_the_machine_does_is_for_those_with_the_key(visitor: Any) -> None:
    assert visitor.get("/v1/machine").status_code == 401


def test_the_machines_figures_are_those_of_the_metrics(http: Any) -> None:
    assert http.post(COMPLETIONS, json=TEXT_BODY).status_code == 200
    assert idle(http)
    machine = http.get("/v1/machine").json()
    stats = machine["stats"]
    assert stats["tokens_generated"] == gauge(http, "layerstream_generated_tokens_total") > 0
    assert stats["sweeps"] == gauge(http, "layerstream_sweeps_total") > 0
    assert stats["tokens_per_sweep"] == gauge(http, "layerstream_tokens_per_sweep")
    assert machine["queue"] == {
        "running": 0,
        "waiting": 0,
        "open_answers": 0,
        "max_answers": MAX_ANSWERS,
    }
    assert machine["forecast"]["measured_seconds"] > 0
    assert (machine["model"], machine["trouble"]) == ("tiny", None)


def test_the_map_is_that_of_the_plan_and_memory_is_within_the_budget(http: Any) -> None:
    machine = http.get("/v1/machine").json()
    plan, layers = machine["plan"], machine["layers"]
    assert len(layers) == plan["layer_batches"]
    streamed = [each for each in layers if each["place"] in {"disk", "decoding"}]
    assert sum(each["bytes"] for each in streamed) == plan["disk_bytes_per_sweep"]
    assert {each["place"] for each in layers} <= machine["legend"].keys()
    (host,) = machine["memory"]
    assert host["budget_bytes"] == plan["host_budget_bytes"]
    assert 0 < sum(part["bytes"] for part in host["parts"]) <= host["budget_bytes"]


def test_the_stages_last_seconds_add_up_to_no_more_than_their_time(http: Any) -> None:
    assert http.post(COMPLETIONS, json=TEXT_BODY).status_code == 200
    stages = http.get("/v1/machine").json()["stages"]
    assert [stage["name"] for stage in stages] == ["read", "transfer", "compute"]
    assert stages[0]["busy_share"] > 0
    for stage in stages:
        assert all(
            share >= 0 and sum(shares) <= 1.01 for shares in stage["buckets"] for share in shares
        )


def test_without_a_page_there_is_none(folder: Path) -> None:
    with running_server(folder, "--no-page") as server:
        for path in ("/", "/page/look.css"):
            assert httpx.get(server.url + path).status_code == 404
        assert httpx.get(server.url + "/v1/machine").status_code == 200


def test_a_model_that_is_not_for_chats_is_served_and_the_log_says_so(tmp_path: Path) -> None:
    with running_server(save_chat_model(tmp_path / "model", template=False)) as server:
        assert (
            "the model has no chat template, so chats are refused: see --chat-template"
            in server.log
        )


def test_a_span_is_shared_out_among_the_parts_of_the_time_that_it_touches() -> None:
    from layerstream.tools.serving.machine_state import stage_shares

    def span(activity: Activity, start: float, stop: float) -> Span:
        return Span(activity, 0, start, stop, 0)

    spans = [
        span(Activity.WORKING, 8.0, 11.5),
        span(Activity.WAITING_IN, 11.5, 12.0),
        span(Activity.WAITING_OUT, 12.25, 12.5),
        span(Activity.HOLDING, 10.0, 14.0),
    ]
    assert stage_shares(spans, start=10.0, stop=14.0, buckets=4) == [
        [1.0, 0.0, 0.0],
        [0.5, 0.5, 0.0],
        [0.0, 0.0, 0.25],
        [0.0, 0.0, 0.0],
    ]


def test_the_wheel_has_all_files_of_the_page(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="builds the wheel")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("pipeline", "stages", "tools"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    result = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"layerstream/tools/serving/page/{name}" for name in FILES} <= names
