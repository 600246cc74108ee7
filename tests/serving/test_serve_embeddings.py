"""`layerstream serve`: embeddings are the hidden states of the model as transformers runs it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.service import MAX_ANSWERS, PROMPTS, Reference

from layerstream.stages.errors import ModelError

pytest.importorskip("openai", reason="needs layerstream[test]")
pytest.importorskip("httpx2", reason="needs layerstream[test]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")
pytest.importorskip("uvicorn", reason="needs layerstream[serve]")
pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")

from layerstream.tools.serving.embeddings import Pooling, read_pooling


def expected(reference: Reference, prompt: str) -> list[float]:
    ids = reference.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        states = reference.model.model(ids).last_hidden_state[0, -1]
    values: list[float] = torch.nn.functional.normalize(states, dim=0).tolist()
    return values


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}], ids=["base64", "float"])
def test_an_embedding_is_the_last_tokens_hidden_state(
    options: dict[str, Any], client: Any, reference: Reference
) -> None:
    done = client.embeddings.create(model="tiny", input=PROMPTS, **options)
    assert [each.index for each in done.data] == list(range(len(PROMPTS)))
    for each, prompt in zip(done.data, PROMPTS, strict=True):
        assert each.embedding == pytest.approx(expected(reference, prompt), abs=1e-5)
    assert done.usage.prompt_tokens == sum(len(prompt.encode()) for prompt in PROMPTS)
    one = client.embeddings.create(model="tiny", input=list(b"Hello"), **options)
    assert one.data[0].embedding == pytest.approx(expected(reference, "Hello"), abs=1e-5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [1, 999]}, "prompt"),
        ({"input": "a" * 9000}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({}, "input"),
    ],
    ids=str,
)
def test_what_cannot_be_embedded_is_refused_by_name(
    body: dict[str, Any], param: str, http: Any
) -> None:
    answer = http.post("/v1/embeddings", json={"model": "tiny", **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def save_modules(folder: Path, pooling: dict[str, Any], *names: str) -> Path:
    modules = [{"path": f"{i}_{name}", "type": f"st.models.{name}"} for i, name in enumerate(names)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def test_the_pooling_is_what_sentence_transformers_has_saved(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == Pooling(mode="last", normalize=True)
    cls = {"word_embedding_dimension": 8, "pooling_mode_cls_token": True, "include_prompt": True}
    save_modules(tmp_path, cls, "Transformer", "Pooling")
    assert read_pooling(tmp_path) == Pooling(mode="first", normalize=False)
    newer = {"pooling_mode": "mean", "include_prompt": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(newer))
    assert read_pooling(tmp_path) == Pooling(mode="mean", normalize=False)


@pytest.mark.parametrize(
    ("pooling", "names"),
    [
        ({"pooling_mode_max_tokens": True}, ("Transformer", "Pooling")),
        ({"pooling_mode_mean_tokens": True}, ("Transformer", "Pooling", "Dense")),
    ],
)
def test_a_pooling_of_another_kind_is_refused_at_the_start(
    pooling: dict[str, Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="not supported"):
        read_pooling(save_modules(tmp_path, pooling, *names))


def test_more_texts_than_the_service_takes_answers_are_computed_in_turn(client: Any) -> None:
    single = client.embeddings.create(model="tiny", input=["text 19"]).data[0].embedding
    done = client.embeddings.create(model="tiny", input=[f"text {n}" for n in range(20)])
    assert len(done.data) == 20 > MAX_ANSWERS
    assert done.data[19].embedding == single
