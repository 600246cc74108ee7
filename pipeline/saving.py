"""``save_pretrained`` of a streamed model: its weights go from file to file, with little memory, and as a whole or not at all."""

import functools
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.formats.safetensors_writing import SafetensorsLayout, write_at
from layerstream.pipeline.checkpoint.source_reader import SourceReader
from layerstream.pipeline.modeling.clone import clone_modules
from layerstream.pipeline.modeling.saving import SavedFile, record_save
from layerstream.pipeline.opening import Opening
from layerstream.pipeline.scheduling.engine import Engine
from layerstream.stages.errors import ModelError

__all__ = ["saving_method"]

_OF_SHARDS = re.compile(r"(.+)-\d{5}-of-\d{5}(\.safetensors)")


def saving_method(kind: type[Any], opening: Opening, engine: Engine) -> Callable[..., None]:
    """``save_pretrained`` of ``kind``, transformers' class, for the model that ``engine`` runs."""
    traced, checkpoint, plan = opening.assembly.traced, opening.checkpoint, opening.plan

    signature = inspect.signature(kind.save_pretrained)

    @functools.wraps(kind.save_pretrained)
    def save_pretrained(self: Any, *inputs: Any, **named: Any) -> None:
        given = signature.bind(self, *inputs, **named).arguments
        options = {**given, **given.get("kwargs", {})}
        folder = Path(options.pop("save_directory"))
        state = options.pop("state_dict", None)
        for name in ("self", "kwargs"):
            options.pop(name, None)
        if options.pop("push_to_hub", False):
            raise ModelError(
                "push_to_hub=True does not work on a streamed model: call its method push_to_hub instead."
            )
        _refuse_own_folder(folder, checkpoint)
        engine.passes.refuse_on_loop()
        engine.requests.check_open()
        with _complete_or_nothing(folder) as temporary:
            clone = clone_modules(self)
            clone.__class__ = kind
            files = record_save(
                clone,
                traced,
                lambda state: kind.save_pretrained(clone, temporary, state_dict=state, **options),
                state=state,
            )
            needs = [each.needed_bytes(checkpoint) for file in files for each in file.tensors]
            # On a GPU, that is none of the memory of requests.
            borrowed = max(needs, default=0) if plan.device_memory is None else 0
            with engine.requests.borrowed("save_pretrained", borrowed):
                _write(files, SourceReader(checkpoint, guard=engine.requests.guard))

    return save_pretrained


def _refuse_own_folder(folder: Path, checkpoint: Checkpoint) -> None:
    if folder.is_file():
        raise ModelError(f"{folder} is a file; give a folder to save the model in.")
    if any(file.path.resolve().parent == folder.resolve() for file in checkpoint.files):
        raise ModelError(
            f"{folder} holds the files that the model streams from, which are not overwritten; save it in another folder."
        )


@contextmanager
def _complete_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder for files that go to ``folder`` when the block ends without an error; else nothing of them is left.

    Files are renamed one after another at the end: if that fails in a folder that was there, those before it have gone there.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            yield Path(temporary)
            _move(Path(temporary), folder)
    except BaseException:
        if folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        for each in made[1:]:
            with suppress(OSError):  # others may have put something there meanwhile
                each.rmdir()
        raise


def _move(source: Path, folder: Path) -> None:
    """Move all files, and remove the shards of an earlier save, as transformers does."""
    names = {path.name for path in source.iterdir()}
    weights = {_OF_SHARDS.sub(r"\1\2", name) for name in names if name.endswith(".safetensors")}
    for path in sorted(source.iterdir(), key=lambda path: path.suffix == ".json"):
        path.replace(folder / path.name)
    for path in folder.iterdir():
        shard = _OF_SHARDS.fullmatch(path.name)
        if shard and shard[1] + shard[2] in weights and path.name not in names:
            path.unlink()


def _write(files: Sequence[SavedFile], source: SourceReader) -> None:
    with closing(source) as reader:
        for file in files:
            _write_file(file, reader)


def _write_file(file: SavedFile, reader: SourceReader) -> None:
    layout = SafetensorsLayout.of((each.stored for each in file.tensors), file.metadata)
    descriptor = os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_at(descriptor, memoryview(layout.header), 0)
        for each in file.tensors:
            offset = layout.places[each.stored.name].offset
            for block in each.blocks(reader):
                write_at(descriptor, block, offset)
                offset += len(block)
    finally:
        os.close(descriptor)
