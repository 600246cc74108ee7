"""A service whose disk failed for a while works again by itself, and says meanwhile that it does not."""

import asyncio
import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.leaks import nothing_left_behind
from support.loop import run, turns
from support.models import inputs_for, save_model
from support.streaming import open_streaming

from layerstream.stages.readers import guard as guard_module

pytest.importorskip("prometheus_client", reason="needs layerstream[serve]")
pytest.importorskip("fastapi", reason="needs layerstream[serve]")

GREEDY = {"max_new_tokens": 8, "do_sample": False}


class Health:
    """What the answers of a service are told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def streaming_failed(self, error: BaseException | None) -> None:
        self.told.append("works" if error is None else f"failed: {error}")


def test_a_model_is_reopened_with_growing_pauses_until_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerstream.tools.serving import recovery

    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")
    broken = False
    preadv = os.preadv

    def read(descriptor: int, *given: Any) -> int:
        if broken and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, *given)

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(guard_module, "_PAUSES_SECONDS", (0.001,))
    monkeypatch.setattr(recovery, "_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(recovery, "_FIRST_PAUSE_SECONDS", 0.01)

    async def main() -> None:
        nonlocal broken
        options = {"reader": "direct", "reopened_within_seconds": 60.0}
        health: Any = Health()
        async with (
            await open_streaming(folder, **options) as model,
            recovery.Recovery(model, health) as recovering,
        ):
            expected = await model.generate(**inputs, **GREEDY)
            assert health.told == []
            broken = True
            request = asyncio.create_task(model.generate(**inputs, **GREEDY))
            while model.stats().reopened < 3:
                await turns(1)
            broken = False
            assert torch.equal(await request, expected)
            assert recovering._pause_seconds >= 0.08
            assert "Input/output error" in health.told[0]
            assert health.told[-1] == "works"
            assert model.failure is None

    with nothing_left_behind():
        run(main())
