"""Models whose embedding tables are gathered compute what they compute with tables in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling import gathered_table
from layerstream.pipeline.modeling.gathered_table import GatheredTable
from layerstream.pipeline.modeling.table_source import TableSource
from layerstream.stages.batch import Extent
from layerstream.stages.errors import ModelError

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "pad_token_id": 3,
}
MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)),
    "gemma3, scaled": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **TINY, head_dim=8, num_key_value_heads=2, tie_word_embeddings=False
        )
    ),
    "opt, positions too": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **TINY, ffn_dim=64, word_embed_proj_dim=32, tie_word_embeddings=False
        )
    ),
    "bert, three tables": lambda: transformers.BertModel(transformers.BertConfig(**TINY)),
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_compute_the_same_with_gathered_tables(
    tmp_path: Path, build: Callable[[], transformers.PreTrainedModel], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    build().to(dtype).save_pretrained(tmp_path)
    model: Any = type(build()).from_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    inputs = torch.tensor([[5, 9, 3, 3, 99, 0]])
    with torch.no_grad():
        expected = model(input_ids=inputs)[0]
    with TableSource(dict(enumerate(checkpoint.files))) as source:
        tables = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Embedding)
        ]
        for name, module in tables:
            info = checkpoint.tensors[f"{name}.weight"]
            module.weight = GatheredTable(
                source,
                extents=[Extent(file=info.file, offset=info.offset, nbytes=info.nbytes)],
                shape=info.shape,
                dtype=dtype,
                device=model.device,
            )
        with torch.no_grad():
            assert torch.equal(model(input_ids=inputs)[0], expected)


def test_a_large_tied_head_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_table, "SMALL_WEIGHT_BYTES", 0)
    model: Any = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TINY, tie_word_embeddings=True)
    )
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    info = checkpoint.tensors["model.embed_tokens.weight"]
    with TableSource(dict(enumerate(checkpoint.files))) as source:
        weight = GatheredTable(
            source,
            extents=[Extent(file=info.file, offset=info.offset, nbytes=info.nbytes)],
            shape=info.shape,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        model.model.embed_tokens.weight = model.lm_head.weight = weight
        with pytest.raises(ModelError, match="takes the whole table"):
            model(input_ids=torch.tensor([[1, 2]]))
