"""GGUF files for tests, written by the gguf package."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

BLOCK_TYPES = tuple(
    kind for kind in gguf.GGMLQuantizationType
    if gguf.GGML_QUANT_SIZES[kind][0] > 1 and kind.name not in {"Q8_1", "Q8_K", "NVFP4", "Q1_0"}
)  # fmt: skip


def write_gguf(
    path: Path,
    tensors: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]],
    *,
    architecture: str = "llama",
    describe: Callable[[gguf.GGUFWriter], Any] = lambda _writer: None,
    **options: Any,
) -> Path:
    """Write ``tensors``, each an array of numbers (or of the bytes of blocks) and the type to store it as; ``describe`` adds metadata."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    describe(writer)
    for name, (values, kind) in tensors.items():
        packed = values if values.dtype == np.uint8 else gguf.quants.quantize(values, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(
    kind: gguf.GGMLQuantizationType, rows: int, columns: int, *, seed: int = 0
) -> np.ndarray:
    """Rows of arbitrary bytes, which are valid blocks of any type."""
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(seed).integers(
        0, 256, (rows, columns // values * nbytes), dtype=np.uint8
    )
