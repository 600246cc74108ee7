"""Files of torch.save, and what a checkpoint has to read of them."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint

__all__ = ["assert_same", "write_archive"]


def write_archive(
    path: Path, entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED
) -> None:
    """Write an archive with valid checksums."""
    with zipfile.ZipFile(path, "w", compression) as target:
        for name, content in entries.items():
            target.writestr(name, content)


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of a checkpoint, as its description says."""
    info = checkpoint.tensors[name]
    if not info.nbytes:
        return torch.empty(info.shape, dtype=getattr(torch, info.dtype))
    content = np.fromfile(
        checkpoint.files[info.file].path, np.uint8, count=info.nbytes, offset=info.offset
    )
    flat = torch.from_numpy(content).view(getattr(torch, info.dtype))
    return flat.as_strided(*info.strided) if info.strided else flat.view(info.shape)


def assert_same(checkpoint: Checkpoint, expected: Mapping[str, torch.Tensor]) -> None:
    """That a checkpoint holds the tensors that torch has loaded, in their order."""
    assert list(checkpoint.tensors) == list(expected)
    for name, tensor in expected.items():
        found = read_tensor(checkpoint, name)
        assert checkpoint.tensors[name].logical_shape == tuple(tensor.shape)
        assert found.dtype == tensor.dtype
        assert found.stride() == tensor.stride() or found.numel() <= max(found.shape, default=1)
        assert (
            found.contiguous()
            .view(-1)
            .view(torch.uint8)
            .equal(tensor.contiguous().view(-1).view(torch.uint8))
        )
