"""Hardware: free memory is the smallest limit of the system and each cgroup, and values are validated."""

import asyncio
from dataclasses import replace

import psutil
import pytest
from support.checkpoints import GPU, write_checkpoint

from layerstream.pipeline import Checkpoint, DeviceError, Hardware, PlanError
from layerstream.pipeline.machine.hardware import ComputeRate
from layerstream.stages.process.headroom import host_available_bytes

MIB = 1 << 20


@pytest.fixture
def process(tmp_path):
    """A folder like /proc/self, and a function that writes files of a cgroup."""
    root = tmp_path / "cgroup"
    (tmp_path / "proc").mkdir()

    def group(path, **files):
        folder = root / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(f"{content}\n")

    def in_group(path, *, kind="cgroup2", controllers=""):
        (tmp_path / "proc" / "cgroup").write_text(f"0:{controllers}:/{path}\n")
        options = f"rw,{controllers}" if controllers else "rw"
        (tmp_path / "proc" / "mounts").write_text(
            f"proc /proc proc rw 0 0\n{kind} {root} {kind} {options} 0 0\n"
        )
        return tmp_path / "proc"

    return group, in_group


def test_without_cgroups_it_is_what_the_system_has(tmp_path):
    available = psutil.virtual_memory().available
    assert 0.5 * available < host_available_bytes(tmp_path) < 2 * available


def test_a_cgroups_page_cache_counts_as_free(process):
    group, in_group = process
    group(
        "a",
        memory__max=100 * MIB,
        memory__high="max",
        memory__current=60 * MIB,
        memory__stat=f"anon {10 * MIB}\ninactive_file {30 * MIB}\nactive_file {10 * MIB}\nslab_reclaimable {5 * MIB}",
    )
    assert host_available_bytes(in_group("a")) == 85 * MIB


def test_the_soft_limit_counts_where_it_is_lower(process):
    group, in_group = process
    group(
        "a",
        memory__max=100 * MIB,
        memory__high=70 * MIB,
        memory__current=60 * MIB,
        memory__stat="anon 1",
    )
    assert host_available_bytes(in_group("a")) == 10 * MIB


def test_a_limit_further_up_counts_for_all_below_it(process):
    group, in_group = process
    group("a", memory__max=50 * MIB, memory__current=45 * MIB, memory__stat="anon 1")
    group("a/b", memory__max="max", memory__current=1 * MIB, memory__stat="anon 1")
    group("a/b/c", memory__max=40 * MIB, memory__current=1 * MIB, memory__stat="anon 1")
    assert host_available_bytes(in_group("a/b/c")) == 5 * MIB


def test_a_cgroup_of_the_first_version_counts_too(process):
    group, in_group = process
    group(
        "a",
        memory__limit_in_bytes=100 * MIB,
        memory__usage_in_bytes=90 * MIB,
        memory__stat=f"total_inactive_file {15 * MIB}\ntotal_active_file {5 * MIB}",
    )
    assert host_available_bytes(in_group("a", kind="cgroup", controllers="memory")) == 30 * MIB


def test_in_a_container_that_shows_the_hosts_path_the_mounts_root_is_our_group(process):
    group, in_group = process
    group("", memory__max=20 * MIB, memory__current=5 * MIB, memory__stat="anon 1")
    assert host_available_bytes(in_group("docker/0123abcd")) == 15 * MIB


def test_a_cgroup_that_is_over_its_limit_leaves_zero_bytes(process):
    group, in_group = process
    group("a", memory__max=10 * MIB, memory__current=15 * MIB, memory__stat="anon 1")
    assert host_available_bytes(in_group("a")) == 0


@pytest.mark.parametrize("broken", ["memory__max", "memory__current", "memory__stat"])
def test_malformed_files_of_a_cgroup_are_ignored(process, broken):
    group, in_group = process
    files = {"memory__max": 10 * MIB, "memory__current": 5 * MIB, "memory__stat": "anon 1"}
    group("a", **{**files, broken: "nonsense"})
    assert host_available_bytes(in_group("a")) > 100 * MIB


def test_this_machine_is_probed(tmp_path):
    write_checkpoint(tmp_path, blocks=1)
    checkpoint = Checkpoint.open(tmp_path)
    hardware = asyncio.run(Hardware.probe(checkpoint, device="cpu"))
    assert hardware.device == "cpu"
    assert hardware.vram_free_bytes is None
    assert hardware.cores >= 1
    assert hardware.host_available_bytes > 0
    with pytest.raises(DeviceError, match="'toaster' is not a device"):
        asyncio.run(Hardware.probe(checkpoint, device="toaster"))


# -- what is given by hand ------------------------------------------------------------------------


def test_rates_given_by_hand_are_taken_as_they_are():
    what_if = replace(GPU, disk_bytes_per_second=7e9, h2d_bytes_per_second=25e9)
    assert what_if.disk_bytes_per_second == 7e9
    assert what_if.figures == {}
    assert hash(what_if) == hash(replace(what_if))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "7GB/s", True])
@pytest.mark.parametrize(
    "name",
    ["disk_bytes_per_second", "mmap_bytes_per_second", "h2d_bytes_per_second", "compute"],
)
def test_an_impossible_rate_is_refused_with_its_name(name, value):
    given = (ComputeRate(tokens=1, bytes_per_second=value),) if name == "compute" else value
    with pytest.raises(PlanError, match=f"hardware: {name} .*; give a number above zero"):
        replace(GPU, **{name: given})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host_available_bytes", -1),
        ("vram_free_bytes", -1),
        ("cached_bytes", -1),
        ("cores", 0),
        ("cores", None),
        ("host_available_bytes", "4GiB"),
        ("direct_read_cpu_seconds_per_byte", -1e-9),
        ("overhead_seconds_per_batch", float("nan")),
    ],
)
def test_an_impossible_machine_is_refused_with_the_name_of_the_field(name, value):
    with pytest.raises(PlanError, match=f"hardware: {name} is {value!r}; give "):
        replace(GPU, **{name: value})


@pytest.mark.parametrize("sizes", [(4, 1), (1, 1), (0, 1)])
def test_compute_rates_must_be_in_ascending_order_of_tokens(sizes):
    rates = tuple(ComputeRate(tokens=size, bytes_per_second=1e9) for size in sizes)
    with pytest.raises(PlanError, match="in ascending order, from 1"):
        replace(GPU, compute=rates)
