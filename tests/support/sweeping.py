"""Pipelines under test: their reader, and what their sweeps give."""

import torch

from support.faults import RecordingReader

__all__ = ["recording", "visited", "wrong_tensors"]


def recording(plan):
    return RecordingReader([file.path for file in plan.files])


async def visited(sweep):
    return [batch.index async for batch in sweep]


def wrong_tensors(batch, expected):
    """Names of those tensors of ``batch`` that are not what the checkpoint holds."""
    return [
        name
        for name, tensor in batch.tensors.items()
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name])
    ]
