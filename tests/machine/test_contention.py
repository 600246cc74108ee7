"""How busy other processes keep the processors, read from files like /proc/stat."""

import pytest

from layerstream.pipeline.machine.contention import Contention

STAT = "cpu  {busy} 0 0 500 90 0 0 {stolen} 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n"


@pytest.mark.parametrize(("busy", "stolen"), [(900, 0), (0, 900)])
def test_processors_that_other_processes_keep_busy_are_counted(tmp_path, busy, stolen):
    stat = tmp_path / "stat"
    stat.write_text(STAT.format(busy=0, stolen=0))
    with Contention(stat) as contention:
        stat.write_text(STAT.format(busy=busy, stolen=stolen))
    assert contention.processors > 0.25
    assert contention.matters


@pytest.mark.parametrize(
    "content", [None, "", "cpu 1 2", "intr 1 2 3", STAT.format(busy=0, stolen=0)]
)
def test_a_quiet_machine_and_one_without_statistics_are_not_contended(tmp_path, content):
    stat = tmp_path / "stat"
    if content is not None:
        stat.write_text(content)
    with Contention(stat) as contention:
        pass
    assert contention.processors == 0
    assert not contention.matters
