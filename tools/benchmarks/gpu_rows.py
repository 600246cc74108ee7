"""The rows of the GPU benchmark, the most wanted first: each a ratio, beside what it is a ratio to."""

from layerstream.tools.benchmarks.gpu_bench import GpuRow
from layerstream.tools.benchmarks.gpu_models import against, decode
from layerstream.tools.benchmarks.gpu_streaming import (
    bandwidth,
    from_disk,
    from_ram,
    overlap,
    page_locking,
    vram,
)

__all__ = ["ROWS"]

ROWS = (
    GpuRow(name="H2D copies, pinned to pageable", target="-", measure=bandwidth),
    GpuRow(name="page-locking, registered to torch's", target="-", measure=page_locking),
    GpuRow(name="streaming from RAM to pinned copies", target=">= 0.95", measure=from_ram),
    GpuRow(name="overlap: longer of the two to both", target="-", measure=overlap),
    GpuRow(name="streaming from disk to raw read", target=">= 0.92", measure=from_disk),
    *(
        # By hand it is also there where accelerate is not, and stands in for it.
        GpuRow(
            name=f"against {name}",
            target=">= 0.9 x pinned/pageable, >= 2",
            measure=against(name, on_host=True),
        )
        for name in ("accelerate cpu_offload", "pageable offload by hand")
    ),
    *(
        GpuRow(
            name=f"decode, {share:.0%} of the layers in VRAM",
            target="0.85 to 1.15 of predicted",
            measure=decode(share),
        )
        for share in (0.0, 0.5, 0.9)
    ),
    GpuRow(name="peak VRAM to budget", target="<= 1", measure=vram),
    GpuRow(name="against AirLLM", target=">= 5", measure=against("AirLLM", on_host=False)),
    *(
        GpuRow(name=f"against {name}", target="-", measure=against(name, on_host=on_host))
        for name, on_host in (
            ("per-module offload by hand", True),
            ("diffusers group offloading", True),
            ("accelerate disk_offload", False),
        )
    ),
)
