"""Reads a model's files ahead while Python imports torch and transformers."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerstream.stages.readers.readahead import Readahead, fits_page_cache

__all__ = ["reading_ahead"]


@contextmanager
def reading_ahead(args: argparse.Namespace) -> Iterator[None]:
    """Read the model's files into the page cache while the block runs, if they will be memory-mapped.

    They are mapped on a CPU if they fit into free memory; otherwise this does nothing.
    """
    files = _weight_files(Path(args.model)) if _will_map(args) else []
    if files and fits_page_cache(sum(path.stat().st_size for path in files)):
        with Readahead(files):
            yield
    else:
        yield


def _will_map(args: argparse.Namespace) -> bool:
    on_cpu = args.device == "cpu" or (args.device == "auto" and not Path("/dev/nvidiactl").exists())
    return on_cpu and args.reader in {None, "mmap"}


def _weight_files(model: Path) -> list[Path]:
    if not model.is_dir():
        known = model.suffix in {".safetensors", ".gguf"}
        return [model] if known and model.is_file() else []
    found = [path for path in model.glob("*.safetensors") if path.is_file()]
    if not found:  # a folder may hold several GGUF models, of which none is meant
        found = list(model.glob("*.gguf"))
        found = found if len(found) == 1 else []
    return sorted(found)
