"""Hardware.probe: what is measured, what is cached, and that it does not block the event loop."""

import asyncio
import json
import logging
import os
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import write_checkpoint
from support.leaks import nothing_left_behind
from support.loop import happens, run

from layerstream.pipeline import Checkpoint, Hardware
from layerstream.pipeline.machine import probe as probe_module
from layerstream.pipeline.machine import probe_compute, probes
from layerstream.pipeline.machine.contention import Contention
from layerstream.pipeline.machine.measurement import Origin, Rate
from layerstream.stages.errors import ReadError
from layerstream.stages.process.libraries import KERNELS_KEPT

DISK = {"disk_bytes_per_second", "direct_read_cpu_seconds_per_byte"}
MMAP = {"mmap_bytes_per_second", "mmap_read_cpu_seconds_per_byte"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """70 MiB in two blocks, on the disk."""
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    weights = torch.rand(2, 35 << 10, 512).to(torch.bfloat16)
    save_file({f"layers.{i}.weight": weights[i].clone() for i in range(2)}, path)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return Checkpoint.open(path)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(probe_compute, "_MAX_SECONDS", 0.05)
    # Tests share their machine: what is cached must not depend on how quiet it is.
    monkeypatch.setattr(probe_module, "_DISTURBED_RATIO", 1e9)
    monkeypatch.setattr(probe_module, "Contention", partial(Contention, Path("no such file")))


@pytest.fixture
def probe(checkpoint, tmp_path):
    """A function that probes the large checkpoint, with a cache of this test's own."""
    cache = tmp_path / "cache"
    return lambda **options: run(
        Hardware.probe(checkpoint, "cpu", **{"cache_folder": cache, **options})
    )


def rate_figures(hardware):
    """The figure of each rate; sizes of free memory are queried every time, so they are left out."""
    sizes = {"host_available_bytes", "vram_free_bytes", "cached_bytes"}
    return {name: figure for name, figure in hardware.figures.items() if name not in sizes}


def origins(hardware):
    return {figure.origin for figure in rate_figures(hardware).values()}


def test_a_new_machine_is_measured_and_then_known(probe):
    new = probe()
    assert {*DISK, "host_copy_bytes_per_second", "compute"} <= new.figures.keys()
    assert origins(new) == {Origin.MEASURED}
    assert new.h2d_bytes_per_second is None
    assert new.compute[0].tokens == 1
    figure = new.figures["disk_bytes_per_second"]
    assert figure.least <= new.disk_bytes_per_second <= figure.most
    assert (figure.samples >= 1, figure.age_seconds) == (True, 0)
    known = probe(measure=False)
    assert origins(known) == {Origin.CACHED}
    assert (known.disk_bytes_per_second, known.compute) == (
        new.disk_bytes_per_second,
        new.compute,
    )
    assert known.figures["disk_bytes_per_second"].age_seconds >= 0


def test_cached_rates_are_not_measured_again_unless_fresh_ones_are_requested(probe, monkeypatch):
    probe()
    calls = []
    real = probe_module.probes_of

    def with_recorded_calls(*args, **named):
        return [
            replace(each, measure=partial(recorded, each.key["of"], each.measure))
            for each in real(*args, **named)
        ]

    def recorded(what, measure):
        calls.append(what)
        return measure()

    monkeypatch.setattr(probe_module, "probes_of", with_recorded_calls)
    assert origins(probe()) >= {Origin.CACHED}
    assert not {"disk-direct", "copies", "blocks", "compute"} & set(calls)
    assert probe(fresh=True).figures["compute"].origin is Origin.MEASURED
    assert calls[-5:] == ["disk-direct", "disk-mmap", "copies", "blocks", "compute"]


def test_measuring_takes_no_more_memory_than_it_is_given(probe, caplog):
    caplog.set_level(logging.INFO)
    assert rate_figures(probe(most_bytes=1 << 20)).keys() == MMAP  # pages of the page cache
    some = probe(most_bytes=40 << 20)
    assert {*DISK, "attention_flops_per_second"} <= some.figures.keys()
    assert some.host_copy_bytes_per_second is None
    assert some.compute == ()
    assert "copies: not measured, since that takes 128 MiB of memory" in caplog.text
    assert {"host_copy_bytes_per_second", "compute"} <= probe(most_bytes=1 << 30).figures.keys()


def test_without_measuring_the_rates_of_a_new_machine_are_unknown(probe):
    hardware = probe(measure=False)
    assert rate_figures(hardware) == {}
    assert hardware.compute == ()
    assert hardware.disk_bytes_per_second is None
    assert hardware.host_available_bytes > 0


def test_a_small_checkpoint_gets_cached_rates_and_measures_nothing(probe, tmp_path):
    cache = tmp_path / "cache"
    probe(cache_folder=cache)
    cached_at = sorted(path.stat().st_mtime_ns for path in cache.iterdir())
    folder = tmp_path / "small"
    folder.mkdir()
    write_checkpoint(folder)
    small = Checkpoint.open(folder)
    for fresh in (False, True):
        hardware = run(Hardware.probe(small, "cpu", cache_folder=cache, fresh=fresh))
        assert origins(hardware) <= {Origin.CACHED}
        assert hardware.compute == ()  # of other shapes
        assert hardware.host_copy_bytes_per_second > 0
    assert sorted(path.stat().st_mtime_ns for path in cache.iterdir()) == cached_at
    uncached = run(Hardware.probe(small, "cpu", cache_folder=tmp_path / "none"))
    assert rate_figures(uncached) == {}


def test_a_cache_folder_that_cannot_be_written_to_changes_nothing_else(probe, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert origins(probe(cache_folder=tmp_path / "file" / "folder")) == {Origin.MEASURED}


@pytest.mark.parametrize("content", ["", '{"version": 2}', "null"])
def test_a_corrupt_cache_is_measured_again_and_logged(probe, tmp_path, content, caplog):
    probe()
    for path in (tmp_path / "cache").iterdir():
        path.write_text(content)
    again = probe()
    assert origins(again) == {Origin.MEASURED}
    assert caplog.text.count("taken as not measured") == len(list((tmp_path / "cache").iterdir()))


def test_a_disk_that_fails_is_logged_as_a_warning_and_all_else_is_measured(
    probe, monkeypatch, caplog
):
    def fail(*_):
        raise ReadError("/model: reading at offset 0 failed: Input/output error (errno 5)")

    monkeypatch.setattr(
        probes,
        "_DISK_READERS",
        tuple((*each[:2], fail, 0) for each in probes._DISK_READERS),
    )
    hardware = probe()
    assert hardware.disk_bytes_per_second is None
    assert hardware.figures.keys() == {
        "host_available_bytes",
        "cached_bytes",
        "host_copy_bytes_per_second",
        "attention_flops_per_second",
        "step_attention_flops_per_second",
        "kv_growth_bytes_per_second",
        "blocks_per_second",
        "compute",
    }
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in warnings] == [
        f"measuring {what} failed, the rate is not known: /model: reading at offset 0 failed: "
        "Input/output error (errno 5)"
        for what in ("disk-direct", "disk-mmap")
    ]


def test_a_sparse_checkpoint_has_no_disk_rate(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="layerstream")
    path = tmp_path / "model.safetensors"
    save_file({"layers.0.weight": torch.zeros(64 << 10, 512)}, path)
    header = path.read_bytes()[: path.stat().st_size - (128 << 20)]
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + (128 << 20))
        os.fsync(stream.fileno())
    if path.stat().st_blocks * 512 > 64 << 20:
        pytest.skip("this filesystem has no sparse files")
    hardware = run(Hardware.probe(Checkpoint.open(path), "cpu", cache_folder=tmp_path / "cache"))
    assert not (DISK | MMAP) & hardware.figures.keys()
    assert hardware.disk_bytes_per_second is None
    assert "its files are sparse" in caplog.text
    assert hardware.compute != ()


def test_while_a_machine_is_measured_the_event_loop_is_not_held(checkpoint, tmp_path):
    delays = []

    async def heartbeat():
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            delays.append(time.perf_counter() - due)

    async def main():
        beating = asyncio.create_task(heartbeat())
        while len(delays) < 200:
            await Hardware.probe(checkpoint, "cpu", fresh=True, cache_folder=tmp_path)
        beating.cancel()

    run(main())
    # Computation is measured with all cores, so on a busy machine the loop may have to wait for a processor.
    assert sorted(delays)[len(delays) * 9 // 10] < 0.05


def test_a_probe_that_is_cancelled_finishes_its_measurement_and_leaves_nothing_behind(
    checkpoint, tmp_path, monkeypatch
):
    begun, release = threading.Event(), threading.Event()
    done = []

    def measure_until_released(*args):
        begun.set()
        release.wait(20)
        done.append(args)
        return {}

    (_, names, *_), *others = probes._DISK_READERS
    monkeypatch.setattr(
        probes, "_DISK_READERS", (("direct", names, measure_until_released, 0), *others)
    )
    monkeypatch.setattr(probes, "measure_copies", lambda _: pytest.fail("the probe went on"))

    async def main():
        probe = asyncio.create_task(Hardware.probe(checkpoint, "cpu", cache_folder=tmp_path))
        await happens(begun)
        probe.cancel()
        await asyncio.sleep(0)
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await probe

    with nothing_left_behind():
        run(main())
    assert len(done) == 1


def test_rates_of_computing_are_those_of_the_dtype_that_is_computed_in(probe, monkeypatch):
    """Not those of the dtype that weights are stored in: GGUF's blocks may be unpacked to any."""
    asked = []

    def measured(*_, dtype, **__):
        asked.append(dtype)
        return {}

    for name in ("measure_blocks", "measure_compute"):
        monkeypatch.setattr(probes, name, measured)
    probe(dtype="float16")
    probe()
    assert asked == ["float16"] * 2 + ["bfloat16"] * 2


def test_samples_that_lie_far_apart_are_used_but_not_cached(probe, monkeypatch, tmp_path):
    def disturbed(*_):
        return {
            "host_copy_bytes_per_second": Rate(
                median=1e9, least=1e8, high=2.5e9, most=2.5e9, samples=5
            )
        }

    monkeypatch.setattr(probe_module, "_DISTURBED_RATIO", 2.0)
    monkeypatch.setattr(probes, "measure_copies", disturbed)
    assert probe().host_copy_bytes_per_second == 1e9
    assert not list((tmp_path / "cache").glob("copies-*"))
    assert probe(measure=False).host_copy_bytes_per_second is None


def test_onednn_is_limited_to_a_small_cache_before_its_first_use(probe, monkeypatch):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    capacities = []

    def compute(*_, **__):
        capacities.append(os.environ.get(name))
        return {"1": Rate(median=1e9, least=1e9, high=1e9, most=1e9, samples=5)}

    monkeypatch.setattr(probes, "measure_compute", compute)
    probe()
    assert capacities == [str(KERNELS_KEPT)]


def test_a_measurement_next_to_busy_processes_is_marked_and_soon_expires(
    probe, monkeypatch, tmp_path
):
    class Busy(Contention):
        def __exit__(self, *_):
            self.processors = 64 * os.cpu_count()

    def copies(*_):
        rate = Rate(median=1e9, least=1e8, high=2e9, most=3e9, samples=50)
        return {"host_copy_bytes_per_second": rate}

    def disk(*_):
        return {
            "disk_bytes_per_second": Rate(median=1e9, least=1e8, high=2e9, most=2e9, samples=5),
            "direct_read_cpu_seconds_per_byte": Rate(
                median=3.0, least=2.0, high=4.0, most=4.0, samples=5
            ),
        }

    monkeypatch.setattr(probe_module, "Contention", Busy)
    monkeypatch.setattr(probes, "measure_copies", copies)
    monkeypatch.setattr(probes, "_DISK_READERS", (("direct", tuple(disk()), disk, 0),))
    hardware = probe()
    assert hardware.figures["host_copy_bytes_per_second"].origin is Origin.CONTENDED
    assert hardware.host_copy_bytes_per_second == 2e9, "a good sample, not the best"
    assert hardware.figures["disk_bytes_per_second"].origin is Origin.MEASURED
    assert hardware.disk_bytes_per_second == 1e9, "the median"
    reloaded = probe(measure=False)
    assert reloaded.host_copy_bytes_per_second == 2e9
    assert reloaded.figures["host_copy_bytes_per_second"].origin is Origin.CONTENDED
    for file in (tmp_path / "cache").glob("*.json"):
        written = json.loads(file.read_text())
        file.write_text(json.dumps({**written, "measured_at": time.time() - 3600}))
    expired = probe(measure=False)
    assert expired.host_copy_bytes_per_second is None
    assert expired.disk_bytes_per_second == 1e9
