"""A model whose greedy text really repeats itself: each token has a successor, and they go round in a circle."""

from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["CIRCLE", "recited", "save_reciting_model"]

CIRCLE = 20  # tokens after which it begins again
_VOCABULARY = 100


def recited(count: int, *, begin: int = 0) -> torch.Tensor:
    """What it says, from one place in the circle on: ids in one row."""
    return (torch.arange(begin, begin + count) % CIRCLE)[None]


def save_reciting_model(folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """A llama with random weights in all layers, whose head looks for the successor of the last token's embedding.

    What its layers add to the embedding is small, so that no text but the recited one comes of it; but they
    are computed, and with them the weights are read, as in any other model.
    """
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "vocab_size": _VOCABULARY,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": _VOCABULARY - 1,
            **settings,
        }
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        table = model.model.embed_tokens.weight.normal_()
        model.lm_head.weight[:CIRCLE] = table[:CIRCLE].roll(1, dims=0)
    model.save_pretrained(folder)
    return folder
