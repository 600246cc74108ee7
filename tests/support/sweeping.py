"""Helpers for pipelines under test: a recording reader, and the contents of sweeps."""

import torch

from support.faults import RecordingReader

__all__ = ["recording_reader", "visited", "wrong_tensors"]


def recording_reader(plan):
    """A reader of the plan's files that records its reads."""
    return RecordingReader([file.path for file in plan.files])


async def visited(sweep):
    """Indices of the batches of ``sweep``, which this runs to its end."""
    return [batch.index async for batch in sweep]


def wrong_tensors(batch, expected):
    """Names of the tensors of ``batch`` that differ from those in the checkpoint."""
    return [
        name
        for name, tensor in batch.tensors.items()
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name])
    ]
