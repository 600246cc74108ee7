"""A failed pipeline: each caller gets an error of its own, and no error keeps memory."""

import gc
import traceback
import weakref

from support.checkpoints import CPU, arranged, plan_for, write_checkpoint
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import inputs_for, save_model
from support.streaming import open_streaming

from layerstream.pipeline import LayerstreamError, Pipeline, ReadError


class Local:
    """Something that a caller has in a local variable."""


def truncate(folder, nbytes):
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.truncate(min(nbytes, path.stat().st_size))


def test_each_sweep_of_a_failed_pipeline_raises_an_error_of_its_own_with_what_is_known(tmp_path):
    write_checkpoint(tmp_path)
    plan = arranged(plan_for(tmp_path, CPU), slots=2)

    async def sweep(pipeline):
        local = Local()
        try:
            async for _ in pipeline.sweep():
                pass
        except ReadError as error:
            return error, weakref.ref(local)

    async def main():
        async with Pipeline(plan) as pipeline:
            truncate(tmp_path, 8192)
            found = [await sweep(pipeline) for _ in range(4)]
        errors = [error for error, _ in found]
        assert len({id(error) for error in errors}) == 4
        assert len({str(error) for error in errors}) == 1
        assert all("in the read stage" in error.__notes__[0] for error in errors)
        lengths = [len(traceback.extract_tb(error.__traceback__)) for error in errors[1:]]
        assert len(set(lengths)) == 1
        locals_ = [local for _, local in found]
        found.clear()
        errors.clear()
        assert [local() for local in locals_] == [None] * 4

    run(main())


def test_after_a_read_error_closing_frees_the_memory_without_the_garbage_collector(tmp_path):
    folder = save_model(tmp_path / "model", "llama", num_hidden_layers=6)
    inputs = inputs_for("llama")

    async def main():
        async with await open_streaming(folder, reader="direct") as model:
            await model.forward(**inputs)
            truncate(folder, 20_000)
            failed = 0
            for _ in range(6):  # what was read ahead may still serve the first ones
                try:
                    await model.forward(**inputs)
                except LayerstreamError:
                    failed += 1
            assert failed > 2

    run(main())
    gc.collect()
    folder = save_model(tmp_path / "model", "llama", num_hidden_layers=6)
    gc.disable()
    try:
        with nothing_left_behind(collect=False):
            run(main())
    finally:
        gc.enable()
