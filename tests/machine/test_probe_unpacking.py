"""The probe measures how fast the encodings of a checkpoint are unpacked."""

import asyncio
from pathlib import Path

import pytest
import torch
from support.models import save_model
from support.quantized import save_quantised

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.machine import probe as probe_module
from layerstream.pipeline.machine import probe_unpacking
from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.machine.measurement import Origin
from layerstream.pipeline.machine.probe_compute import block_shapes


@pytest.mark.parametrize(
    ("case", "quantiser", "encodings"),
    [
        ("llama", "fp8-blocks", ("fp8",)),
        ("llama", "int4-groups", ("int4",)),
        ("llama", "int8-plain", ("int8",)),
        ("gpt-oss", "mxfp4", ("mxfp4",)),
    ],
)
def test_encodings_show_in_names_and_dtypes(
    tmp_path: Path, case: str, quantiser: str, encodings: tuple[str, ...]
) -> None:
    checkpoint = Checkpoint.open(save_quantised(tmp_path / "model", case, quantiser))
    assert probe_unpacking.encodings_of(checkpoint) == encodings


@pytest.mark.parametrize("encoding", ["fp8", "mxfp4", "int4", "int8", "Q4_K", "Q8_0"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_encoding_with_a_kernel_is_measured(
    monkeypatch: pytest.MonkeyPatch, encoding: str, dtype: str
) -> None:
    monkeypatch.setattr(probe_unpacking, "_PACKED_BYTES", 1 << 20)
    monkeypatch.setattr(probe_unpacking, "_SECONDS", 0.0)
    rate = probe_unpacking.measure_unpacking([encoding], dtype=dtype, available_bytes=1 << 30)[
        encoding
    ]
    assert rate.samples >= 3
    assert 0 < rate.least <= rate.median <= rate.most


def test_what_has_no_kernel_is_not_measured() -> None:
    assert (
        probe_unpacking.measure_unpacking(["IQ1_S"], dtype="float32", available_bytes=1 << 30) == {}
    )


def test_hardware_has_the_rate_with_its_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_unpacking, "_PACKED_BYTES", 1 << 20)
    monkeypatch.setattr(probe_module, "MIN_BYTES", 0)
    folder = save_quantised(tmp_path / "model", "llama", "fp8-blocks")
    checkpoint = Checkpoint.open(folder)
    hardware = asyncio.run(Hardware.probe(checkpoint, "cpu", cache_folder=tmp_path / "cache"))
    (rate,) = hardware.unpacking
    assert rate.encoding == "fp8"
    assert torch.isfinite(torch.tensor(rate.bytes_per_second))
    assert hardware.figures["unpacking fp8"].origin in {Origin.MEASURED, Origin.CONTENDED}


def test_products_are_measured_in_the_shapes_of_unpacked_weights(tmp_path: Path) -> None:
    plain = Checkpoint.open(save_model(tmp_path / "plain", "llama", torch.bfloat16))
    for quantiser in ("int4-groups", "fp8-blocks"):
        packed = Checkpoint.open(save_quantised(tmp_path / quantiser, "llama", quantiser))
        assert sorted(block_shapes(packed)) == sorted(block_shapes(plain))
