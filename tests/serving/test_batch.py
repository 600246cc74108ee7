"""`layerstream batch`: the same answers as the model's, in order, whenever it was killed in between."""

import errno
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from support.forked import COMMAND, ForkedProcess
from support.leaks import our_threads
from support.server import wait_until
from support.service import HOST, MESSAGES, PROMPTS, Reference

from layerstream.tools.cli import main

pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")

NEW = 6


def save_requests(path: Path, bodies: list[dict[str, Any]], url: str = "/v1/completions") -> Path:
    lines = [
        {"custom_id": f"request {number}", "method": "POST", "url": url, "body": body}
        for number, body in enumerate(bodies)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def completions(count: int) -> list[dict[str, Any]]:
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(count)]
    more = {"model": "any", "max_tokens": NEW, "temperature": 0}
    return [{"prompt": prompt, **more} for prompt in prompts]


def answers_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answered(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def arguments(folder: Path, source: Path, target: Path, *more: str) -> list[str]:
    reader = () if "--throttle" in more else ("--reader", "direct")
    options = ("--device", "cpu", "--host", HOST, *reader, *more)
    return ["batch", str(folder), str(source), str(target), *options]


def test_each_request_has_its_answer_in_its_place(
    folder: Path, tmp_path: Path, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_requests(tmp_path / "in.jsonl", completions(12))
    assert main(arguments(folder, source, tmp_path / "out.jsonl")) == 0
    answers = answers_in(tmp_path / "out.jsonl")
    assert [each["custom_id"] for each in answers] == [f"request {n}" for n in range(12)]
    for each, body in zip(answers, completions(12), strict=True):
        assert each["response"]["status_code"] == 200
        text = each["response"]["body"]["choices"][0]["text"]
        assert text == reference.text(body["prompt"], NEW)
    summary = capsys.readouterr().err.splitlines()[-1]
    assert "12 answers with" in summary
    # Requests share sweeps.
    assert int(summary.split()[-2]) < 12 * NEW / 2
    assert our_threads() == []


def test_a_killed_run_is_taken_up_and_the_file_is_the_same(folder: Path, tmp_path: Path) -> None:
    source = save_requests(tmp_path / "in.jsonl", completions(16))
    whole, target = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert main(arguments(folder, source, whole)) == 0
    # Slow enough to be killed in the middle.
    slow = arguments(folder, source, target, "--at-once", "2", "--throttle", "32MiB")
    for lines in (2, 6):
        process = ForkedProcess(COMMAND, slow, stdin=0, stdout=1, stderr=2)
        try:
            wait_until(lambda: answered(target) >= lines)  # noqa: B023
        finally:
            process.kill()
            process.wait()
    with target.open("ab") as file:
        file.write(b'{"id": "half of a li')
    assert 6 <= answered(target) < 16
    assert main(arguments(folder, source, target)) == 0
    assert target.read_bytes() == whole.read_bytes()
    # There is nothing left to do.
    assert main(arguments(folder, source, target)) == 0
    assert target.read_bytes() == whole.read_bytes()


def test_requests_that_are_refused_have_their_error_in_their_place(
    folder: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies: list[dict[str, Any]] = [
        {"messages": MESSAGES, "max_tokens": NEW},
        {"messages": MESSAGES, "response_format": {"type": "json_object"}},
        {"messages": MESSAGES[::-1], "max_tokens": NEW},
        {"messages": MESSAGES, "max_tokens": 10**9},
        {"messages": MESSAGES, "max_tokens": NEW, "stream": True},
    ]
    save_requests(source, bodies, "/v1/chat/completions")
    with source.open("a") as file:
        file.write(json.dumps({"custom_id": "x", "url": "/v1/images", "body": {}}) + "\n")
    assert main(arguments(folder, source, target, "--at-once", "2")) == 0
    answers = [each["response"] for each in answers_in(target)]
    assert [each["status_code"] for each in answers] == [200, 400, 400, 400, 200, 404]
    assert answers[1]["body"]["error"]["param"] == "response_format"
    assert answers[0]["body"]["choices"][0]["message"]["role"] == "assistant"


def test_files_that_do_not_belong_together_are_refused_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    save_requests(source, completions(2))
    target.write_text('{"id": "batch_req_another"}\n')
    assert main(arguments(folder, source, target)) == 1
    assert "answers to other requests" in capsys.readouterr().err
    assert target.read_text() == '{"id": "batch_req_another"}\n'
    source.write_text('{"custom_id": "a"}\n')
    assert main(arguments(folder, source, tmp_path / "new.jsonl")) == 1
    assert "line 1, is no request" in capsys.readouterr().err


def test_a_file_that_cannot_grow_is_reported_with_its_name_and_continued_later(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_requests(tmp_path / "in.jsonl", completions(8))
    target, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1000, hard)
    )  # as a disk that is full, but for the number
    try:
        assert main(arguments(folder, source, target)) == 1
        assert f"{os.strerror(errno.EFBIG)}: '{target}'" in capsys.readouterr().err
        assert main(["plan", str(folder), "--device", "cpu", "--html", str(page)]) == 1
        assert f"{os.strerror(errno.EFBIG)}: '{page}'" in capsys.readouterr().err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 0 < answered(target) < len(completions(8))
    assert main(arguments(folder, source, target)) == 0
    assert answered(target) == len(completions(8))
