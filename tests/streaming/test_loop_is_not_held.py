"""What takes long while a model is opened or streams is done in threads, not on the event loop."""

import logging
import threading

from support.checkpoints import GPU, arranged, plan_for, write_checkpoint
from support.fake_device import FakeDevice
from support.loop import run
from support.models import inputs_for, save_model
from support.streaming import SMALL

from layerstream.pipeline import Pipeline, Plan, StreamedModel, replanning, starting, verifying
from layerstream.pipeline.modeling.assembly import Assembly
from layerstream.pipeline.modeling.binding import Binding
from layerstream.stages.memory import Image
from layerstream.stages.readers.readahead import Readahead
from layerstream.tools.cli import main


class Calls:
    """In which threads functions are called."""

    def __init__(self, monkeypatch):
        self._patch = monkeypatch
        self.threads = {}

    def watch(self, owner, name):
        works = getattr(owner, name)

        def call(*args, **named):
            self.threads.setdefault(name, set()).add(threading.get_ident())
            return works(*args, **named)

        self._patch.setattr(owner, name, call)

    def on_this_thread(self):
        return [name for name, idents in self.threads.items() if threading.get_ident() in idents]


def test_opening_and_closing_a_model_compute_in_threads(tmp_path, monkeypatch, caplog):
    folder = save_model(
        tmp_path / "model", "t5"
    )  # whose table is resident, and bound while it is opened
    assert main(["verify", str(folder), "--record"]) == 0
    calls = Calls(monkeypatch)
    caplog.set_level(logging.WARNING)
    watched = [(starting, "move_buffers"), (Assembly, "gather"), (Binding, "bind")]
    watched += [(Readahead, "stop"), (Plan, "describe"), (verifying, "_in_order")]
    watched += [(replanning, "learn")]
    for owner, name in watched:
        calls.watch(owner, name)

    async def use():
        options = {"device": "cpu", "workload": SMALL, "measure": False, "verify": True}
        async with StreamedModel.open(folder, **options) as model:
            await model.forward(**inputs_for("t5"))
            await model.verified()
            await model.replan()
        assert calls.on_this_thread() == []

    run(use())
    assert calls.threads.keys() == {"move_buffers", "gather", "bind", "stop", "_in_order", "learn"}


def test_copies_are_listed_in_a_thread(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, blocks=2)
    plan = arranged(plan_for(tmp_path, GPU), slots=2)
    calls = Calls(monkeypatch)
    calls.watch(Image, "bytes")

    async def main():
        async with Pipeline(plan, device=FakeDevice()) as pipeline:
            async for _ in pipeline.sweep():
                pass
        assert calls.on_this_thread() == []

    run(main())
    assert calls.threads.keys() == {"bytes"}
