"""Compares what is read of safetensors files with what safetensors itself reads."""

from pathlib import Path

import torch
from safetensors import safe_open

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint

__all__ = ["assert_safetensors_agrees"]


def assert_safetensors_agrees(path: Path) -> None:
    """Compare names, dtypes, shapes and bytes of an accepted file with what safetensors reads."""
    checkpoint = Checkpoint.open(path)
    content = path.read_bytes()
    with safe_open(path, "pt") as reference:
        assert set(reference.keys()) == set(checkpoint.tensors)
        for name, info in checkpoint.tensors.items():
            tensor = reference.get_tensor(name)
            assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{info.dtype}", info.shape)
            there = tensor.reshape(-1).view(torch.uint8) if info.nbytes else torch.empty(0)
            assert there.numpy().tobytes() == content[info.offset : info.offset + info.nbytes]
