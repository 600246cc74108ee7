"""The rows of the GPU benchmark, the most important first; each measures a ratio."""

from layerstream.tools.benchmarks.gpu_bench import GpuRow
from layerstream.tools.benchmarks.gpu_experts import compare_mixture_with, measure_mixture
from layerstream.tools.benchmarks.gpu_models import compare_with, measure_decoding
from layerstream.tools.benchmarks.gpu_streaming import (
    compare_page_locking,
    measure_bandwidth,
    measure_overlap,
    report_peak_vram,
    stream_from_disk,
    stream_from_ram,
)

__all__ = ["ROWS"]

ROWS = (
    GpuRow(name="H2D copies, pinned to pageable", target="-", measure=measure_bandwidth),
    GpuRow(name="page-locking, registered to torch's", target="-", measure=compare_page_locking),
    GpuRow(name="streaming from RAM to pinned copies", target=">= 0.95", measure=stream_from_ram),
    GpuRow(name="overlap: longer of the two to both", target="-", measure=measure_overlap),
    GpuRow(name="streaming from disk to raw read", target=">= 0.92", measure=stream_from_disk),
    *(
        # The one by hand stands in where accelerate is not installed.
        GpuRow(
            name=f"against {name}",
            target=">= 0.9 x pinned/pageable, >= 2",
            measure=compare_with(name, on_host=True),
        )
        for name in ("accelerate cpu_offload", "pageable offload by hand")
    ),
    *(
        GpuRow(
            name=f"decode, {share:.0%} of the layers in VRAM",
            target="0.85 to 1.15 of predicted",
            measure=measure_decoding(share),
        )
        for share in (0.0, 0.5, 0.9)
    ),
    GpuRow(name="peak VRAM to budget", target="<= 1", measure=report_peak_vram),
    GpuRow(
        name="mixture, experts in pinned RAM",
        target="<= 1.15 of resident + copies",
        measure=measure_mixture(1.0, 0.25),
    ),
    GpuRow(
        name="mixture, experts from disk",
        target="-",
        measure=measure_mixture(0.25, 0.1),
    ),
    *(
        GpuRow(name=f"mixture against {name}", target=target, measure=compare_mixture_with(name))
        for name, target in (
            ("whole layers", ">= 8"),
            ("accelerate disk_offload", ">= 10"),
        )
    ),
    GpuRow(name="against AirLLM", target=">= 5", measure=compare_with("AirLLM", on_host=False)),
    *(
        GpuRow(name=f"against {name}", target="-", measure=compare_with(name, on_host=on_host))
        for name, on_host in (
            ("per-module offload by hand", True),
            ("diffusers group offloading", True),
            ("accelerate disk_offload", False),
        )
    ),
)
