"""The probe of blocks: it computes a whole block, and its rates have the right unit."""

import pytest
import torch
from support.fake_device import FakeDevice
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from layerstream.pipeline.machine import probe_blocks
from layerstream.pipeline.machine.probe_blocks import _Block, _measure, measure_blocks
from layerstream.stages.devices.cpu import CpuDevice


class ConcatenatedBytes(TorchDispatchMode):
    """Counts the bytes that concatenations write."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.nbytes += made.nbytes
        return made


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(probe_blocks, "_PROMPT_TOKENS", 64)
    monkeypatch.setattr(probe_blocks, "_BLOCKS_PER_SAMPLE", 2)
    monkeypatch.setattr(probe_blocks, "_MIN_SECONDS", 0.0)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("make_device", [CpuDevice, FakeDevice])
def test_blocks_and_attention_are_measured_in_every_dtype_of_weights(make_device, dtype):
    rates = measure_blocks(make_device(), dtype=dtype)
    assert rates.keys() == {
        "blocks_per_second",
        "attention_flops_per_second",
        "step_attention_flops_per_second",
        "kv_growth_bytes_per_second",
    }
    for rate in rates.values():
        assert 0 < rate.least <= rate.median <= rate.most
        assert rate.samples >= 5


def test_rates_are_amounts_per_second_without_the_first_time(monkeypatch):
    now, took = [0.0], iter([100.0, *[0.5] * 5])
    monkeypatch.setattr(probe_blocks.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += next(took)

    rate = _measure(CpuDevice(), work, 10)
    assert (rate.least, rate.median, rate.most) == (20.0, 20.0, 20.0)


@pytest.mark.parametrize("name", ["attention_flops_per_second", "step_attention_flops_per_second"])
def test_operations_of_attention_are_counted_as_torch_counts_them(monkeypatch, name):
    monkeypatch.setattr(probe_blocks, "_measure", lambda _device, work, amount: (work, amount))
    attend, counted = measure_blocks(CpuDevice(), dtype="float32")[name]
    # Other kernels are not counted, or leave out pairs that the causal mask excludes.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        attend()
    assert flops.get_total_flops() == counted


def test_a_cache_is_counted_once_each_time_it_grows(monkeypatch):
    monkeypatch.setattr(probe_blocks, "_measure", lambda _device, work, amount: (work, amount))
    grow, counted = measure_blocks(CpuDevice(), dtype="float32")["kv_growth_bytes_per_second"]
    with ConcatenatedBytes() as copied:
        grow()
    assert counted <= copied.nbytes < 1.1 * counted


def test_the_block_is_one_that_computes_every_matrix_it_has():
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        found = _Block()(torch.ones(1, 1, 64), torch.ones(1, 1, 16), torch.ones(1, 2, 64, 16))
    assert found.shape == (1, 1, 64)
    weights = sum(each.numel() for each in _Block().parameters() if each.dim() == 2)
    matrices = sum(
        count for name, count in flops.get_flop_counts()["Global"].items() if "mm" in str(name)
    )
    assert matrices == 2 * weights
