"""Commands on a GGUF file: its own config, tokenizer and chat template, and nothing beside it."""

import json
from pathlib import Path

import pytest
import torch
from support.gguf_models import byte_tokens, save_gguf_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerstream.pipeline import ModelError, StreamedModel
from layerstream.tools.cli import main
from layerstream.tools.console.token_text import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("gguf")
    changes = {"vocab_size": 260}
    save_gguf_model(folder / "mini.gguf", "llama", changes=changes, tokens=byte_tokens)
    return folder / "mini.gguf"


@pytest.mark.parametrize("opened", ["file", "folder"])
def test_the_tokenizer_is_that_of_the_file(model, opened):
    tokenizer = load_tokenizer(model if opened == "file" else model.parent)
    expected = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    for text in ("Hi, <s>about you</s>!", "na\u00efve \U0001f600", "   "):
        assert tokenizer(text) == expected(text)
    assert tokenizer.special_tokens_map == expected.special_tokens_map
    assert tokenizer.eos_token == "</s>"  # noqa: S105
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>Hi"


def test_a_file_without_a_tokenizer_has_none(tmp_path):
    assert load_tokenizer(save_gguf_model(tmp_path / "m.gguf", "llama")) is None


def test_a_tokenizer_that_transformers_does_not_know_is_refused_in_one_line(tmp_path, capsys):
    path = tmp_path / "m.gguf"
    save_gguf_model(path, "llama", tokens=lambda writer: writer.add_tokenizer_model("odd"))
    assert main(["generate", str(path), "--prompt", "Hi"]) == 1
    said = capsys.readouterr().err
    assert f"The tokenizer in {path} cannot be loaded" in said


@pytest.mark.parametrize("opened", ["file", "folder"])
def test_plan_reads_the_header(model, capsys, opened):
    assert main(["plan", str(model if opened == "file" else model.parent), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["workload"]


def test_generate_says_what_transformers_says(model, capsys):
    command = ["generate", str(model), "--prompt", "Hi", "--max-new-tokens", "5", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    expected = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name)
    ids = torch.tensor([list(b"Hi")])
    with torch.no_grad():
        tokens = expected.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, 2:].tolist()
    assert found["token_ids"] == tokens


def test_profile_computes_with_the_model_and_tells_how_long_it_unpacks(model, tmp_path, capsys):
    trace = tmp_path / "trace.json"
    options = ("--sweeps", "3", "--kernels", "exact", "--trace", str(trace))
    assert main(["profile", str(model), *options, "--json"]) == 0
    profile = json.loads(capsys.readouterr().out)
    assert profile["prompt_tokens"]
    unpacking, compute = profile["unpacking"], profile["stages"][2]
    assert unpacking["items"] > 0
    assert unpacking["bytes"] > 0
    assert 0 < unpacking["busy_seconds"] <= compute["busy_seconds"]
    assert '"unpack 1"' in trace.read_text()
    assert main(["profile", str(model), "--sweeps", "2", "--kernels", "exact"]) == 0
    assert "\n  unpack  " in capsys.readouterr().out


OPENING = {
    "generate": ("--prompt-ids", "1,2"),
    "chat": (),
    "serve": ("--bind", "127.0.0.1", "--port", "0"),
    "batch": ("requests.jsonl", "answers.jsonl"),
    "profile": (),
}
REQUEST = {
    "custom_id": "1",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
}


@pytest.mark.parametrize("command", OPENING)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_commands_open_the_model_in_the_dtype_that_is_asked_for(
    model, tmp_path, monkeypatch, command, dtype
):
    monkeypatch.chdir(tmp_path)
    Path("requests.jsonl").write_text(json.dumps(REQUEST), encoding="utf-8")
    found = []

    def refuse(*_, dtype="as by default", **__):
        found.append(dtype)
        raise ModelError("enough was seen")

    monkeypatch.setattr(StreamedModel, "open", refuse)
    chosen = ["--dtype", dtype] if dtype else []
    assert main([command, str(model), *OPENING[command], *chosen]) == 1
    assert found == [dtype or "auto"]


def test_profile_without_computation_refuses_a_dtype(model, capsys):
    with pytest.raises(SystemExit):
        main(["profile", str(model), "--no-compute", "--dtype", "bfloat16"])
    assert "not allowed with argument --no-compute" in capsys.readouterr().err


def test_generate_computes_in_bfloat16(model, capsys):
    command = ["generate", str(model), "--prompt", "Hi", "--max-new-tokens", "5", "--json"]
    assert main([*command, "--dtype", "bfloat16", "--kernels", "exact"]) == 0
    found = json.loads(capsys.readouterr().out)
    options = {"gguf_file": model.name, "dtype": torch.bfloat16}
    expected = AutoModelForCausalLM.from_pretrained(model.parent, **options)
    ids = torch.tensor([list(b"Hi")])
    with torch.no_grad():
        tokens = expected.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, 2:].tolist()
    assert found["token_ids"] == tokens
