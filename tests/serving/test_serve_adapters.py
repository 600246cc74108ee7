"""Several adapters over one base in one `layerstream serve`: clients choose by the model's name, and share sweeps."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="adapters need PEFT")
httpx = pytest.importorskip("httpx2", reason="needs layerstream[test]")
openai = pytest.importorskip("openai", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")

from support.adapters import load_with_peft, lora, save_adapter  # noqa: E402
from support.forked import run_forked  # noqa: E402
from support.loop import run  # noqa: E402
from support.server import Server, running_server, save_chat_model  # noqa: E402
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: E402

NAMES = ("french", "law.v2", "org/poems")
MEMORY = ("--concurrent", "4", "--prompt-tokens", "64", "--new-tokens", "32", "--reader", "direct")
PROMPT, TOKENS = "Once upon a time", 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def adapters(folder: Path) -> dict[str, Path]:
    return {
        name: save_adapter(
            folder,
            folder.parent / f"adapter{number}",
            lora(r=4 + number),
            model_class=LlamaForCausalLM,
            seed=number,
        )
        for number, name in enumerate(NAMES)
    }


@pytest.fixture(scope="module")
def expected(folder: Path, adapters: dict[str, Path]) -> dict[str, str]:
    """The greedy text of each model alone, with transformers and PEFT."""
    models = {"model": LlamaForCausalLM.from_pretrained(folder).eval()}
    models |= {
        name: load_with_peft(folder, path, model_class=LlamaForCausalLM)
        for name, path in adapters.items()
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    texts = {}
    for name, model in models.items():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
        )
        texts[name] = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(set(texts.values())) == len(texts)
    return texts


@pytest.fixture(scope="module")
def server(folder: Path, adapters: dict[str, Path]) -> Iterator[Server]:
    options = [f"--adapter={name}={path}" for name, path in adapters.items()]
    with running_server(folder, *MEMORY, *options) as server:
        yield server


def test_clients_choose_adapters_by_name_and_share_sweeps(
    server: Server, expected: dict[str, str]
) -> None:
    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:

            async def text_of(name: str) -> str:
                done = await client.completions.create(
                    model=name, prompt=PROMPT, max_tokens=TOKENS, temperature=0
                )
                assert done.model == name
                return str(done.choices[0].text)

            texts = await asyncio.gather(*map(text_of, expected))
            assert dict(zip(expected, texts, strict=True)) == expected
            chat = await client.chat.completions.create(
                model="law.v2",
                messages=[{"role": "user", "content": "Hello"}],
                max_tokens=3,
                temperature=0,
            )
            assert chat.model == "law.v2"
            listed = {model.id: model.model_dump() for model in (await client.models.list()).data}
            assert set(listed) == {"model", *NAMES}
            assert listed["french"]["parent"] == "model"
            assert "parent" not in listed["model"]
            with pytest.raises(openai.NotFoundError, match=r"has 'model', 'french', 'law\.v2'"):
                await text_of("german")

    run(scenario(), seconds=100)
    metrics = _metrics(server)
    assert metrics['layerstream_answer_tokens_total{model="french"}'] > 1
    assert metrics["layerstream_tokens_per_sweep"] > 1
    assert metrics["layerstream_passes_total"] > metrics["layerstream_sweeps_total"]


def _metrics(server: Server) -> dict[str, float]:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_lines_of_a_batch_choose_adapters_by_name(
    folder: Path, adapters: dict[str, Path], expected: dict[str, str], tmp_path: Path
) -> None:
    lines = [
        {
            "custom_id": name,
            "url": "/v1/completions",
            "body": {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
            | ({} if name == "model" else {"model": name}),
        }
        for name in (*expected, "german")
    ]
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = [f"--adapter={name}={path}" for name, path in adapters.items()]
    _run("batch", folder, requests, answers, "--at-once", "4", *options)
    made = {
        each["custom_id"]: each["response"]
        for each in map(json.loads, answers.read_text("utf-8").splitlines())
    }
    assert made.pop("german")["status_code"] == 404
    assert {name: each["body"]["choices"][0]["text"] for name, each in made.items()} == expected


def test_generate_and_plan_take_an_adapter(
    folder: Path, adapters: dict[str, Path], expected: dict[str, str]
) -> None:
    arguments = ("--prompt", PROMPT, "--max-new-tokens", str(TOKENS), "--json")
    for options in ((folder, "--adapter", adapters["french"]), (adapters["french"],)):
        made = json.loads(_run("generate", *options, *arguments))
        assert made["text"] == expected["french"]
    planned = json.loads(_run("plan", adapters["french"], "--json"))
    assert planned["summary"]["adapter_bytes"] > 0
    assert planned["summary"]["checkpoint"] == str(folder)


def _run(command: str, *arguments: Any) -> str:
    done = run_forked(command, *arguments, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return done.stdout
