"""Configs that describe no model of transformers are refused; those with several parts are understood."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from layerstream.pipeline import load_streamed
from layerstream.pipeline.modeling.config import load_config, resolve_model_class, text_config_of
from layerstream.stages.errors import ModelError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"has no config\.json"),
        ("{", r"config\.json is not readable as JSON"),
        ("[]", r"model of type None"),
        (
            '{"model_type": "no-such-model"}',
            r"'no-such-model', which transformers .* does not know",
        ),
        ('{"model_type": "llama", "num_attention_heads": "x"}', r"does not describe a llama model"),
    ],
    ids=["missing", "cut off", "no object", "unknown type", "nonsense"],
)
def test_an_unusable_config_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "written",
    [
        {"_attn_implementation": "org/kernel"},
        {"attn_implementation": "org/kernel@main:function"},
        {"text_config": {"attn_implementation": {"text_config": "org/kernel"}}},
        {"parts": [{"_experts_implementation": "org/kernel"}]},
    ],
)
def test_code_of_the_hub_is_not_run_because_a_config_names_it(
    tmp_path: Path, written: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **written}))
    with pytest.raises(ModelError, match=r"'org/kernel.*code of the hub"):
        load_config(tmp_path)


def test_attention_that_is_named_by_the_caller_is_taken_instead(tmp_path: Path) -> None:
    written = {"model_type": "llama", "_attn_implementation": "org/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(written))
    config, _ = load_config(tmp_path, settings={"attn_implementation": "eager"})
    assert config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["flash_attention_2", "paged|flash_attention_3"])
def test_flash_attention_that_is_not_installed_is_not_taken_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    written = {"model_type": "llama", "_attn_implementation": name}
    (tmp_path / "config.json").write_text(json.dumps(written))
    monkeypatch.setattr(transformers.utils, "is_kernels_available", lambda: True)
    with pytest.raises(ModelError, match=r"code of the hub.*or pass attn_implementation="):
        load_config(tmp_path)


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"], ["LlamaConfig"]])
def test_an_architecture_that_transformers_lacks_is_refused(
    architectures: list[str] | None,
) -> None:
    with pytest.raises(ModelError, match=r"model_class=|model class"):
        resolve_model_class(transformers.LlamaConfig(architectures=architectures))


def test_the_text_config_of_every_model_type_is_found() -> None:
    ambiguous, found = [], 0
    for kind in transformers.CONFIG_MAPPING.values():
        try:
            config = kind()
        except Exception:  # noqa: BLE001, S112 - it has no defaults
            continue
        try:
            config.get_text_config()
        except ValueError:
            ambiguous.append(config.model_type)
        assert isinstance(text_config_of(config), transformers.PreTrainedConfig)
        found += 1
    assert found > 300
    assert "musicgen" in ambiguous or not hasattr(transformers, "MusicgenConfig")


def test_a_model_with_two_text_configs_generates_what_transformers_does(tmp_path: Path) -> None:
    text = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    text |= {"model_type": "t5", "vocab_size": 100}
    audio = {"hidden_size": 16, "num_filters": 4, "upsampling_ratios": [4, 2], "codebook_size": 16}
    audio |= {"model_type": "encodec", "num_lstm_layers": 1}
    decoder = {"vocab_size": 16, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    decoder |= {
        "num_attention_heads": 4,
        "num_codebooks": 2,
        "pad_token_id": 15,
        "bos_token_id": 15,
    }
    config = transformers.MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder)
    torch.manual_seed(0)  # others may generate the padding, which transformers then cuts out
    transformers.MusicgenForConditionalGeneration(config).save_pretrained(tmp_path)
    reference = transformers.MusicgenForConditionalGeneration.from_pretrained(tmp_path)
    call = {"input_ids": torch.arange(3, 9)[None], "max_new_tokens": 6, "do_sample": False}
    options: dict[str, Any] = {"device": "cpu", "measure": False, "budget": "64MiB"}
    with load_streamed(tmp_path, **options) as model:
        assert torch.equal(model.generate(**call), reference.generate(**call))
