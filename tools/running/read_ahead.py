"""Reads a model's files ahead while Python imports the code that computes with them."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerstream.stages.readers.readahead import Readahead, fits_page_cache

__all__ = ["reading_ahead"]


@contextmanager
def reading_ahead(args: argparse.Namespace) -> Iterator[None]:
    """Fill the page cache with the model of ``args`` during the block, if its files will be mapped.

    They are on a CPU, without a host budget, if they fit into free memory; otherwise this does nothing.
    """
    files = _weights(Path(args.model)) if _maps(args) else []
    if files and fits_page_cache(sum(path.stat().st_size for path in files)):
        with Readahead(files):
            yield
    else:
        yield


def _maps(args: argparse.Namespace) -> bool:
    on_cpu = args.device == "cpu" or (args.device == "auto" and not Path("/dev/nvidiactl").exists())
    return on_cpu and args.host is None and args.reader in {None, "mmap"}


def _weights(model: Path) -> list[Path]:
    if model.is_dir():
        return sorted(path for path in model.glob("*.safetensors") if path.is_file())
    return [model] if model.suffix == ".safetensors" and model.is_file() else []
