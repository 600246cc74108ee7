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
from layerstream.pipeline.planning.overheads import kernels_bytes
from layerstream.pipeline.planning.tiles import tile_bytes, tile_rows
from layerstream.stages.process.headroom import host_available_bytes

__all__ = ["exact_tokens"]

logger = logging.getLogger(__name__)

# Numbers of tokens that are tried: those of decoding, and of prompts.
_FEW, _MANY = (1, 2, 3, 5, 8), (12, 16, 33, 200)
# A larger matrix is tried with fewer rows: how kernels divide large ones does not depend on how large they are.
_TRIED_BYTES, _TRIED_SHARE_OF_FREE = 64 << 20, 8
_TRIED_ROWS = 64
_HALF_BYTES = 2
# Of variables by which users choose kernels.
_LIBRARIES = ("ATEN_", "DNNL_", "GOMP_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "TORCH_")


def exact_tokens(rows: PackedRows) -> int | None:
    """Up to how many tokens products by tiles have the bits of the whole product here; None: always.

    Tried are a few numbers of tokens. Terms cancel one another, so that results consist of what rounding has left over: sums in
    another order differ in nearly every element, where those of random numbers do so in one of many thousands.
    """
    is_scattered = rows.order is not None
    step = rows.tile_rows
    if step == rows.rows and not is_scattered:
        return None
    threads = torch.get_num_threads()  # among which kernels divide rows
    try:
        return _known_or_tried(rows.rows, rows.columns, rows.dtype, is_scattered, threads)
    except MemoryError:
        return 0


@functools.cache
def _known_or_tried(
    rows: int, columns: int, dtype: torch.dtype, is_scattered: bool, threads: int
) -> int | None:
    """What ``exact_tokens`` says. Scattered rows are multiplied in another order.

    Raises:
        MemoryError: The trial would take more than there is.
    """
    step = tile_rows(rows, columns, dtype.itemsize)
    most_bytes = min(_TRIED_BYTES, host_available_bytes() // _TRIED_SHARE_OF_FREE)
    height = min(rows, max(2 * step + rows % step, most_bytes // columns // dtype.itemsize))
    height -= (height - rows) % step  # the last tile is as ragged as that of the whole matrix
    shape = f"{height} x {columns} by {step}, {dtype}, {threads} threads, {'scattered' if is_scattered else 'in order'}"
    kept = _Kept(_environment())
    found = kept.trials()
    if shape not in found:
        nbytes = rows * columns * dtype.itemsize
        least = 3 * tile_bytes(rows, nbytes)
        least += kernels_bytes(columns) * (dtype.itemsize == _HALF_BYTES)
        if step < rows and least > host_available_bytes():
            raise MemoryError
        tried = _tried(height, step, columns, dtype, scattered=is_scattered)
        found = {**kept.trials(), shape: tried}
        kept.keep(found)
    return found[shape]


def _tried(
    height: int, step: int, columns: int, dtype: torch.dtype, *, scattered: bool
) -> int | None:
    """Multiply by tiles of ``step`` of ``height`` rows, and at once, and compare."""
    weight, inputs = _cancelling(height, columns, dtype)
    order = torch.arange(height)
    if scattered:
        order = torch.randperm(height, generator=torch.Generator().manual_seed(0))

    def is_exact(count: int) -> bool:
        some = inputs[:, :count]
        # One at a time: scattered ones are copies, and there may be little memory.
        parts = (
            (weight[each] for each in torch.split(order, step))
            if scattered
            else torch.split(weight, step)
        )
        tiles = [nn.functional.linear(some, part) for part in parts]
        whole = nn.functional.linear(some, weight)
        return torch.equal(whole[..., order], torch.cat(tiles, dim=-1))

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
