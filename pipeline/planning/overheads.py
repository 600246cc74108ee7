"""Host memory that computing on a CPU takes besides tensors, estimated from a model's config. Pure."""

from dataclasses import dataclass

from layerstream.pipeline.planning.workload_memory import Config, widths_of
from layerstream.stages.process.libraries import KERNELS_KEPT

__all__ = ["Overheads", "overheads"]

# Of a kernel that oneDNN has compiled for a shape of bfloat16 matrices: 0.27 to 0.29 MB were measured, for matrices
# of 64 x 256 and of 4096 x 14336 alike.
_KERNEL_BYTES = 290_000
# Scratch that it keeps for each thread that calls it: 0.2 to 0.9 MB, whatever the number of helper threads.
_SCRATCH_BYTES = 900_000
_HALF = 2  # bytes of an element for which kernels are compiled
# MKL packs float32 matrices for products of more than two rows: this many rows of one and columns of the other, in panels
# of this depth, two of each whatever the number of threads. From its own statistics, with 1 to 4 threads.
_SINGLE = 4
_PANEL_DEPTH = 192
_PANEL_ROWS = 720
_PANEL_COLUMNS = 6432
_FEWEST_ROWS = 3
# Of a request's clone of the module tree, per module: 2140 bytes were measured, with 111 and with 319 modules.
_MODULE_BYTES = 2200


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Bytes besides tensors."""

    shared_bytes: int = 0
    """That math libraries keep for the whole process."""
    # Of a request, until it has ended: what libraries keep for its thread, and its module tree.
    per_request_bytes: int = 0

    def of(self, requests: int) -> int:
        """The sum while that many requests run."""
        return self.shared_bytes + requests * self.per_request_bytes


def overheads(config: Config | None, *, modules: int, rows: int, logits: int = 1) -> Overheads:
    """Memory besides tensors of requests to the model that ``config`` (a config.json) describes.

    Args:
        config: Without one, or without sizes in it, libraries are assumed to keep nothing.
        modules: Their number in the model.
        rows: Tokens that a block computes at once.
        logits: How many of them have logits computed.
    """
    tree = modules * _MODULE_BYTES
    widths = widths_of(config)
    if widths is not None and widths.item_bytes == _HALF:
        return Overheads(
            shared_bytes=KERNELS_KEPT * _KERNEL_BYTES, per_request_bytes=tree + _SCRATCH_BYTES
        )
    if widths is None or widths.item_bytes != _SINGLE or rows < _FEWEST_ROWS:
        return Overheads(per_request_bytes=tree)
    columns = max(widths.widest, widths.vocabulary if logits >= _FEWEST_ROWS else 0)
    packed = min(columns, _PANEL_COLUMNS) + min(rows, _PANEL_ROWS)
    return Overheads(per_request_bytes=tree + 2 * _PANEL_DEPTH * _SINGLE * packed)
