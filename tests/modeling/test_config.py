"""Configs that describe no model of transformers are refused."""

from pathlib import Path

import pytest
import transformers

from layerstream.pipeline.modeling.config import load_config, resolve_model_class
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


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"], ["LlamaConfig"]])
def test_an_architecture_that_transformers_lacks_is_refused(
    architectures: list[str] | None,
) -> None:
    with pytest.raises(ModelError, match=r"model_class=|model class"):
        resolve_model_class(transformers.LlamaConfig(architectures=architectures))
