"""The compute probe: what is multiplied, for how long, and in which dtype."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import write_checkpoint
from support.fake_device import FakeDevice

from layerstream.pipeline import Checkpoint
from layerstream.pipeline.machine import probe_compute
from layerstream.pipeline.machine.probe_compute import (
    TOKENS,
    _matrix_views,
    _MatrixProducts,
    _processor_cache_bytes,
    block_shapes,
    compute_bytes,
    main_dtype,
    measure_compute,
)
from layerstream.stages.devices.cpu import CpuDevice

SHAPES = ((256, 512), (512, 256))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(probe_compute, "_MAX_SECONDS", 0.05)
    monkeypatch.setattr(probe_compute, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(probe_compute, "_MAX_BYTES", 8 << 20)


@pytest.mark.parametrize("make_device", [CpuDevice, FakeDevice])
def test_rates_are_measured_for_passes_of_several_sizes(make_device):
    rates = measure_compute(make_device(), shapes=SHAPES, dtype="float32", available_bytes=1 << 30)
    assert rates  # of all sizes, unless this machine is busy
    assert list(rates) == [str(tokens) for tokens in TOKENS[: len(rates)]]
    for rate in rates.values():
        assert 0 < rate.least <= rate.median <= rate.most
        assert rate.samples >= 3


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_every_dtype_of_weights_can_be_measured(dtype):
    assert (
        measure_compute(CpuDevice(), shapes=SHAPES, dtype=dtype, available_bytes=1 << 30)[
            "1"
        ].median
        > 0
    )


def test_where_there_is_less_memory_matrices_take_less_of_it(monkeypatch):
    monkeypatch.setattr(probe_compute, "_MAX_BYTES", 512 << 20)
    monkeypatch.setattr(probe_compute, "_processor_cache_bytes", lambda: 256 << 20)
    less, more = (
        compute_bytes(CpuDevice(), shapes=SHAPES, dtype="float32", available_bytes=available)
        for available in (256 << 20, 4 << 30)
    )
    assert more - less == (512 - 64) << 20


def test_without_matrices_there_is_nothing_to_measure():
    assert measure_compute(CpuDevice(), shapes=(), dtype="float32", available_bytes=1 << 30) == {}


def record_products(monkeypatch, seconds_per_token):
    """Replace the clock by one that each product advances in proportion to its rows; return the products."""
    now = [0.0]
    products = []

    def linear(x, weight):
        products.append((len(x), weight))
        now[0] += seconds_per_token * len(x)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(probe_compute, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return products


def test_a_rate_is_the_bytes_of_the_weights_by_the_seconds(monkeypatch):
    record_products(monkeypatch, 0.001)
    products = _MatrixProducts(CpuDevice(), torch.zeros(1 << 20), SHAPES)
    rate = products.rate(4, seconds=0.1)
    assert rate.median == rate.least == pytest.approx(256 * 512 * 4 / 0.004)


def test_sizes_that_would_take_too_long_are_left_out(monkeypatch):
    products = record_products(monkeypatch, 0.001)
    rates = measure_compute(CpuDevice(), shapes=SHAPES, dtype="float32", available_bytes=1 << 30)
    assert list(rates) == ["1", "4"]
    assert {tokens for tokens, _ in products} == {1, 4}


def test_no_matrix_is_used_again_before_all_others_were(monkeypatch):
    products = record_products(monkeypatch, 0.0001)
    weights = torch.zeros(1 << 20)
    _MatrixProducts(CpuDevice(), weights, SHAPES).rate(1, seconds=0.1)
    addresses = [weight.data_ptr() for _, weight in products]
    count = len(set(addresses))
    assert count == weights.numel() // (256 * 512)
    assert addresses[:count] == addresses[count : 2 * count] == sorted(set(addresses))


def test_a_matrix_too_large_for_the_probe_loses_rows_and_keeps_its_width():
    found = _matrix_views(torch.zeros(1 << 16), [(1 << 20, 1 << 10), (4, 8)])
    assert [tuple(each.shape) for each in found[:2]] == [(16, 1 << 10), (4, 8)]
    assert sum(each.numel() for each in found) <= 1 << 16


def test_the_shapes_are_those_of_a_block_in_the_middle(tmp_path):
    write_checkpoint(tmp_path, blocks=8, rows=40)
    assert block_shapes(Checkpoint.open(tmp_path)) == ((44, 64), (64, 81))


def test_without_blocks_the_shapes_are_those_of_all_layers(tmp_path):
    save_file({"a.weight": torch.zeros(4, 6), "a.bias": torch.zeros(4)}, tmp_path / "m.safetensors")
    assert block_shapes(Checkpoint.open(tmp_path / "m.safetensors")) == ((4, 6),)


@pytest.mark.parametrize(
    ("dtype", "main"),
    [
        (torch.float32, "float32"),
        (torch.float16, "float16"),
        (torch.uint8, "bfloat16"),
        (torch.float8_e4m3fn, "bfloat16"),
    ],
)
def test_the_dtype_is_that_of_most_bytes_or_the_one_that_quantised_weights_become(
    tmp_path, dtype, main
):
    tensors = {"a": torch.zeros(100, 100).to(dtype), "b": torch.zeros(10, dtype=torch.float32)}
    save_file(tensors, tmp_path / "m.safetensors")
    assert main_dtype(Checkpoint.open(tmp_path / "m.safetensors")) == main


def test_the_size_of_the_caches_is_what_the_system_reports(tmp_path):
    for number, size in enumerate(("48K", "2048K", "32768K", "nonsense")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    assert _processor_cache_bytes(tmp_path) == 32 << 20
    assert _processor_cache_bytes(tmp_path / "none") == 0
