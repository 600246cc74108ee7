"""`--speculate` in `serve` and `generate`: the same tokens in fewer sweeps, told in the answer's usage."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from support.loop import run
from support.reciting import CIRCLE, recited, save_reciting_model
from support.server import running_server
from support.service import COMPLETIONS, gauge

from layerstream.tools.cli import main
from layerstream.tools.synthetic.byte_tokenizer import tokenizer_files

httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
pytest.importorskip("openai", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")

NEW = 48
PROMPT: list[int] = recited(2 * CIRCLE)[0].tolist()
TEXT = bytes(recited(NEW)[0].tolist()).decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_reciting_model(tmp_path_factory.mktemp("speculation") / "model")
    for name, content in tokenizer_files().items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speculation") / "assistant"
    return save_reciting_model(folder, seed=1, hidden_size=48, num_hidden_layers=1)


@pytest.mark.parametrize("kind", ["lookup", "assistant"])
def test_an_answer_tells_how_many_of_its_tokens_were_guessed(
    kind: str, model: Path, assistant: Path
) -> None:
    how = kind if kind == "lookup" else str(assistant)
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
    with (
        running_server(model, "--speculate", how, "--served-model-name", "tiny") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):

        def complete(**more: Any) -> tuple[str, int | None, float]:
            before = gauge(http, "layerstream_sweeps_total")
            done = http.post(COMPLETIONS, json={"model": "tiny", **body, **more}).json()
            details = done["usage"].get("completion_tokens_details", {})
            sweeps = gauge(http, "layerstream_sweeps_total") - before
            return done["choices"][0]["text"], details.get("accepted_prediction_tokens"), sweeps

        text, guessed, sweeps = complete()
        assert text == TEXT
        assert guessed == NEW - sweeps > NEW / 2
        # Without, or where the tokens' own draws or probabilities are asked for.
        for more in ({"speculate": False}, {"logprobs": 0}, {"seed": 1}):
            assert complete(**more) == (TEXT, None, NEW)
        # A stop string in the middle of what one sweep has brought.
        assert complete(stop=TEXT[4:7])[0] == TEXT[:4]

        async def several() -> list[str]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                request = {"model": "tiny", **body}
                answers = [client.post(COMPLETIONS, json=request) for _ in range(3)]
                return [
                    each.json()["choices"][0]["text"] for each in await asyncio.gather(*answers)
                ]

        assert run(several(), seconds=60) == [TEXT] * 3


@pytest.mark.parametrize("kind", ["lookup", "assistant"])
def test_generate_makes_the_same_tokens_in_fewer_sweeps(
    kind: str, model: Path, assistant: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = kind if kind == "lookup" else str(assistant)
    ids = ",".join(map(str, PROMPT))
    arguments = ["generate", str(model), "--prompt-ids", ids, "--max-new-tokens", str(NEW)]
    assert main([*arguments, "--device", "cpu", "--json", "--speculate", how]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["token_ids"] == recited(NEW)[0].tolist()
    assert report["sweeps"] < NEW / 2


def test_an_assistant_of_another_vocabulary_is_refused_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_reciting_model(tmp_path / "other", vocab_size=120)
    for how, message in ((str(other), "vocabulary of 120"), (str(tmp_path), "cannot be loaded")):
        arguments = ["generate", str(model), "--prompt-ids", "1,2", "--device", "cpu"]
        assert main([*arguments, "--speculate", how]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("layerstream: error: ") == 1
