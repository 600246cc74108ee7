"""A model whose greedy text repeats itself: each token has one successor, in a cycle."""

from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["CIRCLE", "recited", "save_reciting_model"]

CIRCLE = 20  # tokens in the cycle
_VOCABULARY = 100


def recited(count: int, *, begin: int = 0) -> torch.Tensor:
    """The tokens that it generates from position ``begin`` of the cycle on: ids in one row."""
    return (torch.arange(begin, begin + count) % CIRCLE)[None]


def save_reciting_model(
    folder: Path, *, seed: int = 0, circle: int = CIRCLE, **settings: Any
) -> Path:
    """Save a llama with random weights in all layers, whose head finds the successor of the last token's embedding.

    Its layers add little to the embedding, so that it generates no other text; but they are computed, and their
    weights read, as in any other model. ``circle`` is the number of tokens in the cycle.
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
        model.lm_head.weight[:circle] = table[:circle].roll(1, dims=0)
    model.save_pretrained(folder)
    return folder
