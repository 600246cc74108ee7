"""Hardware.probe: what is measured, what is known from before, and that nobody waits for it in vain."""

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
from layerstream.pipeline.machine import probe as probing
from layerstream.pipeline.machine import probe_compute
from layerstream.pipeline.machine.contention import Contention
from layerstream.pipeline.machine.measurement import Origin, Rate
from layerstream.pipeline.machine.probe import _combined, _Subject
from layerstream.pipeline.machine.probe_cache import Measured
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
    monkeypatch.setattr(probe_compute, "_SECONDS", 0.05)
    # Tests share their machine: what they keep must not depend on how quiet it is.
    monkeypatch.setattr(probing, "_DISTURBED", 1e9)
    monkeypatch.setattr(probing, "Contention", partial(Contention, Path("no such file")))


@pytest.fixture
def probe(checkpoint, tmp_path):
    """Probes the large checkpoint, with a cache of this test's own."""
    cache = tmp_path / "cache"
    return lambda **asked: run(
        Hardware.probe(checkpoint, "cpu", **{"cache_folder": cache, **asked})
    )


def rates_known(hardware):
    """How each rate is known; how much memory is free is always asked anew."""
    sizes = {"host_available_bytes", "vram_free_bytes", "cached_bytes"}
    return {name: figure for name, figure in hardware.figures.items() if name not in sizes}


def origins(hardware):
    return {figure.origin for figure in rates_known(hardware).values()}


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


def test_what_is_known_is_not_measured_again_unless_asked_to(probe, monkeypatch):
    probe()
    calls = []
    real = probing._subjects

    def counted(*args):
        return [
            replace(each, measure=partial(measured, each.key["of"], each.measure))
            for each in real(*args)
        ]

    def measured(what, measure):
        calls.append(what)
        return measure()

    monkeypatch.setattr(probing, "_subjects", counted)
    assert origins(probe()) >= {Origin.CACHED}
    assert not {"disk-direct", "copies", "blocks", "compute"} & set(calls)
    assert probe(fresh=True).figures["compute"].origin is Origin.MEASURED
    assert calls[-5:] == ["disk-direct", "disk-mmap", "copies", "blocks", "compute"]


def test_without_measuring_nothing_is_known_of_a_new_machine(probe):
    hardware = probe(measure=False)
    assert rates_known(hardware) == {}
    assert hardware.compute == ()
    assert hardware.disk_bytes_per_second is None
    assert hardware.host_available_bytes > 0


def test_a_small_checkpoint_is_told_what_is_known_and_measures_nothing(probe, tmp_path):
    cache = tmp_path / "cache"
    probe(cache_folder=cache)
    kept = sorted(path.stat().st_mtime_ns for path in cache.iterdir())
    folder = tmp_path / "small"
    folder.mkdir()
    write_checkpoint(folder)
    small = Checkpoint.open(folder)
    for fresh in (False, True):
        hardware = run(Hardware.probe(small, "cpu", cache_folder=cache, fresh=fresh))
        assert origins(hardware) <= {Origin.CACHED}
        assert hardware.compute == ()  # of other shapes
        assert hardware.host_copy_bytes_per_second > 0
    assert sorted(path.stat().st_mtime_ns for path in cache.iterdir()) == kept
    nowhere = run(Hardware.probe(small, "cpu", cache_folder=tmp_path / "none"))
    assert rates_known(nowhere) == {}


def test_a_cache_folder_that_cannot_be_written_to_changes_nothing_else(probe, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert origins(probe(cache_folder=tmp_path / "file" / "folder")) == {Origin.MEASURED}


@pytest.mark.parametrize("content", ["", '{"version": 1}', "null"])
def test_a_corrupt_cache_is_measured_again_and_logged(probe, tmp_path, content, caplog):
    probe()
    for path in (tmp_path / "cache").iterdir():
        path.write_text(content)
    again = probe()
    assert origins(again) == {Origin.MEASURED}
    assert caplog.text.count("taken as not measured") == len(list((tmp_path / "cache").iterdir()))


def test_a_disk_that_fails_is_warned_of_and_all_else_is_measured(probe, monkeypatch, caplog):
    def fail(*_):
        raise ReadError("/model: reading at offset 0 failed: Input/output error (errno 5)")

    monkeypatch.setattr(
        probing, "_READERS", tuple((name, names, fail) for name, names, _ in probing._READERS)
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
    late = []

    async def heartbeat():
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - due)

    async def main():
        beating = asyncio.create_task(heartbeat())
        while len(late) < 200:
            await Hardware.probe(checkpoint, "cpu", fresh=True, cache_folder=tmp_path)
        beating.cancel()

    run(main())
    # Computation is measured with all cores, and then a busy machine lets everybody wait now and again.
    assert sorted(late)[len(late) * 9 // 10] < 0.05


def test_a_probe_that_is_cancelled_ends_what_it_is_at_and_leaves_nothing(
    checkpoint, tmp_path, monkeypatch
):
    begun, go = threading.Event(), threading.Event()
    done = []

    def held(*args):
        begun.set()
        go.wait(20)
        done.append(args)
        return {}

    (_, names, _), *others = probing._READERS
    monkeypatch.setattr(probing, "_READERS", (("direct", names, held), *others))
    monkeypatch.setattr(probing, "measure_copies", lambda _: pytest.fail("it went on"))

    async def main():
        probe = asyncio.create_task(Hardware.probe(checkpoint, "cpu", cache_folder=tmp_path))
        await happens(begun)
        probe.cancel()
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await probe

    with nothing_left_behind():
        run(main())
    assert len(done) == 1


# -- several volumes ------------------------------------------------------------------------------


def part(share, origin, *, disk, cpu, age=0.0):
    subject = _Subject(
        key={"of": "disk-direct"}, names=DISK, of_processors=False, measure=dict, share=share
    )
    rates = {
        name: Rate(median=value, least=value, most=value, samples=4)
        for name, value in (
            ("disk_bytes_per_second", disk),
            ("direct_read_cpu_seconds_per_byte", cpu),
        )
    }
    return subject, Measured(rates=rates, age_seconds=age), origin


def test_a_checkpoint_on_two_volumes_has_the_rate_of_reading_one_after_the_other():
    found = _combined(
        [
            part(0.75, Origin.MEASURED, disk=3e9, cpu=2e-10),
            part(0.25, Origin.CACHED, disk=1e9, cpu=6e-10, age=60.0),
        ]
    )
    assert found.fields["disk_bytes_per_second"] == pytest.approx(2e9)
    assert found.fields["direct_read_cpu_seconds_per_byte"] == pytest.approx(3e-10)
    figure = found.figures["disk_bytes_per_second"]
    assert (figure.origin, figure.samples, figure.age_seconds) == (Origin.CACHED, 8, 60.0)


def test_a_volume_that_is_not_known_leaves_the_rate_unknown_unless_it_holds_next_to_nothing():
    assert _combined([part(0.5, Origin.MEASURED, disk=3e9, cpu=0.0)]).fields == {}
    nearly = _combined([part(0.95, Origin.MEASURED, disk=3e9, cpu=0.0)])
    assert nearly.fields["disk_bytes_per_second"] == pytest.approx(3e9)


def test_samples_that_lie_far_apart_are_used_but_not_kept(probe, monkeypatch, tmp_path):
    def disturbed(*_):
        return {"host_copy_bytes_per_second": Rate(median=1e9, least=1e8, most=2.5e9, samples=5)}

    monkeypatch.setattr(probing, "_DISTURBED", 2.0)
    monkeypatch.setattr(probing, "measure_copies", disturbed)
    assert probe().host_copy_bytes_per_second == 1e9
    assert not list((tmp_path / "cache").glob("copies-*"))
    assert probe(measure=False).host_copy_bytes_per_second is None


def test_passes_that_seem_faster_with_more_tokens_were_disturbed(monkeypatch):
    monkeypatch.setattr(probing, "_DISTURBED", 2.0)

    def compute(*medians):
        rates = [Rate(median=value, least=value, most=value, samples=5) for value in medians]
        return dict(zip(("1", "4", "16"), rates, strict=True))

    assert probing._disturbed(compute(2e9, 27e9, 20e9))
    assert not probing._disturbed(compute(20e9, 27e9, 18e9))


STAT = "cpu  {busy} 0 0 500 90 0 0 {stolen} 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n"


@pytest.mark.parametrize(("busy", "stolen"), [(900, 0), (0, 900)])
def test_processors_that_others_kept_busy_are_counted(tmp_path, busy, stolen):
    stat = tmp_path / "stat"
    stat.write_text(STAT.format(busy=0, stolen=0))
    with Contention(stat) as contention:
        stat.write_text(STAT.format(busy=busy, stolen=stolen))
    assert contention.processors > 0.25
    assert contention.matters


@pytest.mark.parametrize(
    "content", [None, "", "cpu 1 2", "intr 1 2 3", STAT.format(busy=0, stolen=0)]
)
def test_a_quiet_machine_and_one_that_tells_nothing_are_not_contended(tmp_path, content):
    stat = tmp_path / "stat"
    if content is not None:
        stat.write_text(content)
    with Contention(stat) as contention:
        pass
    assert contention.processors == 0
    assert not contention.matters


def test_onednn_is_told_to_keep_little_before_it_is_first_used(probe, monkeypatch):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    said = []

    def compute(*_, **__):
        said.append(os.environ.get(name))
        return {"1": Rate(median=1e9, least=1e9, most=1e9, samples=5)}

    monkeypatch.setattr(probing, "measure_compute", compute)
    probe()
    assert said == [str(KERNELS_KEPT)]


def test_what_is_measured_beside_other_processes_is_told_so_and_soon_forgotten(
    probe, monkeypatch, tmp_path
):
    class Busy(Contention):
        def __exit__(self, *_):
            self.processors = 64 * os.cpu_count()

    def copies(*_):
        return {"host_copy_bytes_per_second": Rate(median=1e9, least=1e8, most=2e9, samples=5)}

    def disk(*_):
        return {
            "disk_bytes_per_second": Rate(median=1e9, least=1e8, most=2e9, samples=5),
            "direct_read_cpu_seconds_per_byte": Rate(median=3.0, least=2.0, most=4.0, samples=5),
        }

    monkeypatch.setattr(probing, "Contention", Busy)
    monkeypatch.setattr(probing, "measure_copies", copies)
    monkeypatch.setattr(probing, "_READERS", (("direct", tuple(disk()), disk),))
    hardware = probe()
    assert hardware.figures["host_copy_bytes_per_second"].origin is Origin.CONTENDED
    assert hardware.host_copy_bytes_per_second == 2e9, "of processors the best sample"
    assert hardware.figures["disk_bytes_per_second"].origin is Origin.MEASURED
    assert hardware.disk_bytes_per_second == 1e9, "of disks the median"
    soon = probe(measure=False)
    assert soon.host_copy_bytes_per_second == 2e9
    assert soon.figures["host_copy_bytes_per_second"].origin is Origin.CONTENDED
    for file in (tmp_path / "cache").glob("*.json"):
        written = json.loads(file.read_text())
        file.write_text(json.dumps({**written, "measured_at": time.time() - 3600}))
    later = probe(measure=False)
    assert later.host_copy_bytes_per_second is None
    assert later.disk_bytes_per_second == 1e9
