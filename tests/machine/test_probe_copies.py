"""The probe of copies: which kinds are measured, and that their memory is freed."""

from support.fake_device import FakeDevice

from layerstream.pipeline.machine.probe_copies import measure_copies
from layerstream.stages.devices.cpu import CpuDevice


def test_on_a_cpu_only_copies_from_host_to_host_are_measured():
    [(name, rate)] = measure_copies(CpuDevice()).items()
    assert name == "host_copy_bytes_per_second"
    assert 0 < rate.least <= rate.median <= rate.most


def test_copies_to_a_device_are_measured_from_either_kind_of_memory(caplog):
    caplog.set_level("INFO", logger="layerstream")
    device = FakeDevice()
    rates = measure_copies(device)
    assert rates.keys() == {
        "host_copy_bytes_per_second",
        "h2d_bytes_per_second",
        "pageable_h2d_bytes_per_second",
    }
    assert all(rate.median > 0 for rate in rates.values())
    assert device.host_memories == 0
    assert "/s in blocks of 1 MiB" in caplog.text
    assert "/s in blocks of 64 MiB" in caplog.text
