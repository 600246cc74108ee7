"""Up to how many tokens products by tiles of rows have the bits of the whole product on this machine: tried once, and kept.

In which order a kernel adds up depends on shapes, dtype, the number of threads, the processor and the library, not on the
numbers. So what was tried holds for every process in which all of these are the same, and is kept in the user's cache folder.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from layerstream.pipeline.machine.probe_cache import (
    processor_features,
    replace_file,
    user_cache_folder,
)
from layerstream.pipeline.modeling.packed_rows import PackedRows
from layerstream.pipeline.planning.overheads import kernels_bytes, packing_bytes
from layerstream.pipeline.planning.tiles import tile_rows
from layerstream.stages.process.headroom import host_available_bytes
from layerstream.stages.process.libraries import LibraryMemory
from layerstream.stages.text import format_bytes

__all__ = ["exact_tokens"]

logger = logging.getLogger(__name__)

# Numbers of tokens that are tried: those of decoding, and of prompts.
_FEW, _MANY = (1, 2, 3, 5, 8), (12, 16, 33, 200)
# A larger matrix is tried with fewer rows: how kernels divide large ones does not depend on how large they are.
_TRIED_BYTES, _TRIED_SHARE_OF_FREE = 64 << 20, 8
_TRIED_ROWS = 64
_HALF_BYTES, _SINGLE_BYTES = 2, 4
# Of variables by which users choose kernels.
_LIBRARIES = ("ATEN_", "DNNL_", "GOMP_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "TORCH_")


def exact_tokens(rows: PackedRows, *, most_bytes: int | None = None) -> int | None:
    """Up to how many tokens products by tiles have the bits of the whole product here; None: always.

    Tried are a few numbers of tokens. Terms cancel one another, so that results consist of what rounding has left over: sums in
    another order differ in nearly every element, where those of random numbers do so in one of many thousands.

    Args:
        rows: The matrix.
        most_bytes: Host memory that trying may take, if that is less than what is free. If it takes more, the answer is 0.
    """
    is_scattered = rows.order is not None
    step = rows.tile_rows
    if step == rows.rows and not is_scattered:
        return None
    threads = torch.get_num_threads()  # among which kernels divide rows
    try:
        return _known_or_tried(
            rows.rows, rows.columns, rows.dtype, is_scattered, threads, most_bytes=most_bytes
        )
    except MemoryError as error:
        logger.warning("packed weights are unpacked whole, which takes more memory: %s", error)
        return 0


@functools.cache
def _known_or_tried(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    is_scattered: bool,
    threads: int,
    *,
    most_bytes: int | None,
) -> int | None:
    """What ``exact_tokens`` says. Scattered rows are multiplied in another order.

    Raises:
        MemoryError: The trial would take more than there is.
    """
    step = tile_rows(rows, columns, dtype.itemsize)
    free_bytes = host_available_bytes()
    free_bytes = free_bytes if most_bytes is None else min(free_bytes, most_bytes)
    heights = [
        _tried_rows(rows, step, nbytes // columns // dtype.itemsize)
        for nbytes in (_TRIED_BYTES, min(_TRIED_BYTES, free_bytes // _TRIED_SHARE_OF_FREE))
    ]
    rest = f"{columns} by {step}, {dtype}, {threads} threads, {'scattered' if is_scattered else 'in order'}"
    shapes = [f"{height} x {rest}" for height in heights]
    kept = _Kept(_environment())
    found = kept.trials()
    for shape in shapes:  # what was tried where there was more memory holds here, too
        if shape in found:
            return found[shape]
    takes_bytes = _trial_bytes(heights[-1], step, columns, dtype.itemsize, scattered=is_scattered)
    if step < rows and takes_bytes > free_bytes:
        raise MemoryError(
            f"trying whether products by tiles have the same bits takes {format_bytes(takes_bytes)}, "
            f"and there are {format_bytes(free_bytes)}; with more memory it is tried once, and kept"
        )
    tried = _tried(heights[-1], step, columns, dtype, scattered=is_scattered)
    LibraryMemory().release()  # what they keep for this thread
    kept.keep({**kept.trials(), shapes[-1]: tried})
    return tried


def _tried_rows(rows: int, step: int, most: int) -> int:
    """Rows to try instead of ``rows``: two tiles at least, and the last one as ragged as that of the whole matrix."""
    height = min(rows, max(2 * step + rows % step, most))
    return height - (height - rows) % step


def _trial_bytes(height: int, step: int, columns: int, item_bytes: int, *, scattered: bool) -> int:
    """Host memory that ``_tried`` takes at most, and what libraries keep of it."""
    made = (_TRIED_ROWS + max(_MANY)) * columns * 2 * (_SINGLE_BYTES + item_bytes)
    weight = (height + (step if scattered else 0)) * columns * item_bytes
    results = max(_MANY) * (height + 2 * step) * item_bytes
    kept = (
        kernels_bytes(columns) if item_bytes == _HALF_BYTES else packing_bytes(height, max(_MANY))
    )
    return made + weight + results + kept


def _tried(
    height: int, step: int, columns: int, dtype: torch.dtype, *, scattered: bool
) -> int | None:
    """Multiply by tiles of ``step`` of ``height`` rows, and at once, and compare."""
    weight, inputs = _cancelling(height, columns, dtype)
    order = torch.randperm(height, generator=torch.Generator().manual_seed(0))
    parts = [slice(first, first + step) for first in range(0, height, step)]

    def is_exact(count: int) -> bool:
        some = inputs[:, :count]
        whole = nn.functional.linear(some, weight)
        # One at a time: scattered ones are copies, and there may be little memory.
        places = torch.split(order, step) if scattered else parts
        return all(
            torch.equal(whole[..., each], nn.functional.linear(some, weight[each]))
            for each in places
        )

    # In this order, since numbers that are likely to differ end the trial.
    if all(map(is_exact, reversed(_FEW + _MANY))):
        return None
    return max(itertools.takewhile(is_exact, _FEW), default=0)


def _cancelling(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and inputs whose products are zero but for rounding."""
    generator = torch.Generator().manual_seed(0)
    half, odd = divmod(columns, 2)
    order = torch.randperm(half, generator=generator)
    made = torch.randn((_TRIED_ROWS + max(_MANY), half), generator=generator)
    weight, inputs = made[:_TRIED_ROWS], made[_TRIED_ROWS:]
    both = torch.cat([weight, -weight[:, order], torch.zeros(len(weight), odd)], dim=1).to(dtype)
    twice = torch.cat([inputs, inputs[:, order], torch.zeros(len(inputs), odd)], dim=1).to(dtype)
    return both.repeat(-(-rows // _TRIED_ROWS), 1)[:rows], twice[None]


def _environment() -> Mapping[str, object]:
    """What decides, besides shape, dtype and threads, in which order products are added up, and how it is tried."""
    return {
        "trial": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "processor": processor_features(),
        "torch": f"{torch.__version__} {torch.__config__.show()}",
        "mkldnn": torch.backends.mkldnn.enabled,
        # Not torch.get_float32_matmul_precision, which raises if one of these has been set.
        "precision": [
            getattr(torch.backends, "fp32_precision", None),
            getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None),
        ],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_LIBRARIES) or name == "GLIBC_TUNABLES"
        },
    }


class _Kept:
    """What was tried in an environment, in a file of its own."""

    def __init__(self, environment: Mapping[str, object]) -> None:
        digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()
        self._path = user_cache_folder() / f"tiles-{digest[:32]}.json"

    def trials(self) -> dict[str, int | None]:
        """Numbers of tokens by what was tried; nothing if the file is missing or damaged."""
        try:
            found = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        possible = {repr(each) for each in (None, 0, *_FEW)}
        if not isinstance(found, dict) or not {*map(repr, found.values())} <= possible:
            logger.warning("%s: tried again, since the file is damaged", self._path)
            return {}
        return found

    def keep(self, trials: Mapping[str, int | None]) -> None:
        """Keep ``trials``; that they cannot be written is only logged."""
        try:
            replace_file(self._path, json.dumps(trials, indent=1))
        except OSError as error:
            logger.info("%s: what was tried is not kept: %s", self._path, error)
