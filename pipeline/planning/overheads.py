"""Host memory that computing on this machine's CPU takes besides tensors, estimated from a model's shape."""

from dataclasses import dataclass

from layerstream.pipeline.planning.model_shape import Config, shape_of
from layerstream.stages.process.libraries import KERNELS_KEPT, has_tile_products

__all__ = ["KERNEL_BYTES", "Overheads", "code_bytes", "kernels_bytes", "overheads", "packing_bytes"]

# A kernel that oneDNN has compiled for a shape of bfloat16 matrices: 0.27 to 0.29 MB were measured for matrices of 64 x 256
# and of 4096 x 14336 alike, but on a processor with AMX 0.4 MB for 64 x 256, 0.9 for 1024 x 4096, 2.5 for 8192 x 2048 and
# 4.5 for 4096 x 4096.
KERNEL_BYTES, _KERNEL_BYTES_PER_COLUMN = 340_000, 1050
# Without AMX. The sum of 24 kernels, 8 MB, was not enough for 87 requests of 63 lengths (107 % of a budget of 100 MiB); this is.
_SMALL_KERNELS_BYTES = 64 * 290_000
# Scratch that oneDNN keeps for each thread that calls it: 0.2 to 0.9 MB, whatever the number of helper threads.
_SCRATCH_BYTES = 900_000
# Of an element: oneDNN compiles kernels for two bytes, MKL packs four.
_HALF_BYTES, _SINGLE_BYTES = 2, 4
# MKL packs float32 matrices for products of more than two rows: this many rows of one and columns of the other, in
# panels of this depth, two of each whatever the number of threads. From MKL's own statistics, with 1 to 4 threads.
_PANEL_DEPTH = 192
_PANEL_ROWS = 720
_PANEL_COLUMNS = 6432
_FEWEST_ROWS = 3
# transformers' code for a model, loaded by the first one of a process, and its module tree: 117 MiB were measured with 147
# tensors, 129 with 3,147, 156 with 9,435, and 318 with 46,000.
_CODE_BYTES, _CODE_BYTES_PER_TENSOR = 116 << 20, 4600
# A request's clone of the module tree, per module: 2140 bytes were measured, with 111 and with 319 modules.
_MODULE_BYTES = 2200


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Bytes besides tensors."""

    shared_bytes: int = 0
    """Kept by math libraries for the whole process."""
    per_request_bytes: int = 0
    """Until the request has ended: kept by libraries for its thread, and its module tree."""

    def of(self, requests: int) -> int:
        """The sum while that many requests run."""
        return self.shared_bytes + requests * self.per_request_bytes


def kernels_bytes(columns: int) -> int:
    """What compiled kernels take at most that multiply 16-bit matrices of so many columns on this machine's CPU."""
    if not has_tile_products():
        return _SMALL_KERNELS_BYTES
    return KERNELS_KEPT * (KERNEL_BYTES + _KERNEL_BYTES_PER_COLUMN * columns)


def packing_bytes(columns: int, rows: int) -> int:
    """What MKL packs of float32 matrices, and keeps for the thread, in a product of so many rows that makes so many columns."""
    packed = min(columns, _PANEL_COLUMNS) + min(rows, _PANEL_ROWS)
    return 2 * _PANEL_DEPTH * _SINGLE_BYTES * packed


def code_bytes(tensors: int) -> int:
    """Host memory that a process takes for code and module tree when it opens its first model, of so many tensors."""
    return _CODE_BYTES + tensors * _CODE_BYTES_PER_TENSOR


def overheads(config: Config | None, *, modules: int, rows: int, logits: int = 1) -> Overheads:
    """Memory besides tensors of requests to the model that ``config`` (a config.json) describes.

    Args:
        config: Without one, or without sizes in it, libraries are assumed to keep nothing.
        modules: The number of modules in the model.
        rows: Tokens that a block computes at once.
        logits: Tokens of these for which logits are computed.
    """
    tree_bytes = modules * _MODULE_BYTES
    shape = shape_of(config)
    if shape is not None and shape.item_bytes == _HALF_BYTES:
        return Overheads(
            shared_bytes=kernels_bytes(shape.hidden),
            per_request_bytes=tree_bytes + _SCRATCH_BYTES,
        )
    if shape is None or shape.item_bytes != _SINGLE_BYTES or rows < _FEWEST_ROWS:
        return Overheads(per_request_bytes=tree_bytes)
    columns = max(shape.widest, shape.vocabulary if logits >= _FEWEST_ROWS else 0)
    return Overheads(per_request_bytes=tree_bytes + packing_bytes(columns, rows))
