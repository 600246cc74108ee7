"""Cached measurements: found again on the same machine, and validated when they are loaded."""

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from layerstream.pipeline.machine import probe_cache
from layerstream.pipeline.machine.measurement import Rate
from layerstream.pipeline.machine.probe_cache import (
    MeasurementCache,
    machine_identity,
    processor_model,
)

DISK = {**machine_identity(), "of": "disk-direct", "volume": "ext4 /dev/vda on /"}
NAMES = ["disk_bytes_per_second", "direct_read_cpu_seconds_per_byte"]
RATES = {
    "disk_bytes_per_second": Rate(median=2e9, least=1e9, high=3e9, most=3e9, samples=7),
    "direct_read_cpu_seconds_per_byte": Rate(
        median=0.0, least=0.0, high=1e-11, most=1e-11, samples=7
    ),
}


@pytest.fixture
def cache(tmp_path):
    found = MeasurementCache(tmp_path / "not" / "there" / "yet")
    found.store(DISK, RATES)
    return found


def cache_file(cache):
    [path] = cache.folder.iterdir()
    return path


def test_what_was_measured_is_found_again_with_its_age(cache, monkeypatch):
    now = probe_cache.time.time()
    monkeypatch.setattr(probe_cache.time, "time", lambda: now + 3600)
    found = MeasurementCache(cache.folder).load(DISK, names=NAMES)
    assert found.rates == RATES
    assert found.age_seconds == pytest.approx(3600, abs=20)


def test_after_a_week_it_is_measured_again(cache, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="layerstream")
    now = probe_cache.time.time()
    monkeypatch.setattr(probe_cache.time, "time", lambda: now + 7 * 86400 + 60)
    assert cache.load(DISK, names=NAMES) is None
    assert "taken as not measured, since it is 7 d 0 h old" in caplog.text


@pytest.mark.parametrize("differs", ["host", "machine", "processor", "volume", "of"])
def test_what_was_measured_of_another_machine_or_volume_is_not_found(cache, differs):
    assert cache.load({**DISK, differs: "other"}, names=NAMES) is None


def test_a_file_that_was_copied_from_another_machine_is_ignored(cache, caplog):
    elsewhere = {**DISK, "host": "other"}
    cache_file(cache).rename(cache._path(elsewhere))
    assert cache.load(elsewhere, names=NAMES) is None
    assert "it is of another machine, volume or device" in caplog.text


def changed(**changes):
    return lambda document: {**document, **changes}


def with_rate(**changes):
    def change(document):
        disk = {**document["rates"]["disk_bytes_per_second"], **changes}
        return {**document, "rates": {**document["rates"], "disk_bytes_per_second": disk}}

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda _: [], id="no object"),
        pytest.param(changed(measured_at="yesterday"), id="no time"),
        pytest.param(changed(measured_at=4e9), id="from the future"),
        pytest.param(changed(rates={}), id="no rates"),
        pytest.param(changed(rates={"disk_bytes_per_second": 2e9}), id="a bare number"),
        pytest.param(changed(rates={"nonsense": {}}), id="another rate"),
        pytest.param(with_rate(least=-1), id="negative"),
        pytest.param(with_rate(least=0, median=0), id="zero"),
        pytest.param(with_rate(median=float("nan")), id="not a number"),
        pytest.param(with_rate(most=float("inf")), id="infinite"),
        pytest.param(with_rate(median=True), id="a truth value"),
        pytest.param(with_rate(median=5e9), id="outside its spread"),
        pytest.param(with_rate(samples=0), id="of no samples"),
        pytest.param(with_rate(extra=1), id="more than is written"),
    ],
)
def test_a_file_that_was_changed_is_ignored_and_logged(cache, change, caplog):
    path = cache_file(cache)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert cache.load(DISK, names=NAMES) is None
    assert f"{path}: taken as not measured, since the cached file cannot be used: " in caplog.text


def test_a_file_of_another_version_is_nobodys_fault(cache, caplog):
    path = cache_file(cache)
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 0}))
    assert cache.load(DISK, names=NAMES) is None
    assert not caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_corrupt_file_is_ignored_and_logged_and_replaced(cache, content, caplog):
    cache_file(cache).write_bytes(content)
    assert cache.load(DISK, names=NAMES) is None
    assert "taken as not measured" in caplog.text
    cache.store(DISK, RATES)
    assert cache.load(DISK, names=NAMES).rates == RATES


def test_without_a_writable_folder_nothing_is_cached(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="layerstream")
    (tmp_path / "file").write_bytes(b"")
    cache = MeasurementCache(tmp_path / "file" / "folder")
    cache.store(DISK, RATES)
    assert "the measurement is not cached" in caplog.text
    assert cache.load(DISK, names=NAMES) is None


def test_a_write_that_fails_leaves_what_was_there(cache, monkeypatch):
    def full(*_args, **_named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    cache.store(DISK, {name: RATES[name] for name in NAMES[:1]})
    assert cache.load(DISK, names=NAMES).rates == RATES
    assert cache_file(cache)  # and nothing else


def test_many_at_once_never_see_half_a_file(cache, caplog):
    def work(_):
        cache.store(DISK, RATES)
        return cache.load(DISK, names=NAMES).rates

    with ThreadPoolExecutor(8) as pool:
        assert all(rates == RATES for rates in pool.map(work, range(200)))
    assert caplog.text == ""
    assert cache_file(cache)


@pytest.mark.parametrize(
    ("named", "folder"),
    [
        ("/somewhere", Path("/somewhere/layerstream")),
        ("relative", Path("~/.cache/layerstream").expanduser()),
        (None, Path("~/.cache/layerstream").expanduser()),
    ],
)
def test_theuser_cache_folder_follows_the_xdg_standard(named, folder, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    if named is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", named)
    assert MeasurementCache().folder == folder


def test_a_machine_is_identified_by_what_the_system_reports(tmp_path):
    assert processor_model(tmp_path / "none")
    table = tmp_path / "cpuinfo"
    table.write_text("vendor_id\t: x\nmodel name\t: Fast One 9000\n")
    assert processor_model(table) == "Fast One 9000"
    assert machine_identity()["host"] == os.uname().nodename
