"""A checkpoint of a few large fp8 matrices, for plans."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint

__all__ = ["COLUMNS", "LAYERS", "ROWS", "fp8_layers"]

ROWS, COLUMNS, LAYERS = 2048, 1024, 4
_CONFIG = {
    "hidden_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "vocab_size": 100,
    "quantization_config": {"quant_method": "fp8"},
}


def fp8_layers(folder: Path) -> Checkpoint:
    """Layers of one matrix each, with a scale for each block of 128 x 128."""
    tensors = {}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}.mlp.up_proj.weight"
        tensors[stem] = torch.zeros(ROWS, COLUMNS, dtype=torch.float8_e4m3fn)
        tensors[f"{stem}_scale_inv"] = torch.zeros(ROWS // 128, COLUMNS // 128)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    return Checkpoint.open(folder)
