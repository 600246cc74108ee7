"""How the probe combines the rates of several volumes, and recognises disturbed measurements."""

import pytest

from layerstream.pipeline.machine import probe as probe_module
from layerstream.pipeline.machine.combined_rates import FoundRates, combined
from layerstream.pipeline.machine.measurement import Origin, Rate
from layerstream.pipeline.machine.probe_cache import MeasuredRates, MeasurementCache
from layerstream.pipeline.machine.probes import Probe


def measured_volume(share, origin, *, disk, cpu, age=0.0):
    rates = {
        name: Rate(median=value, least=value, high=value, most=value, samples=4)
        for name, value in (
            ("disk_bytes_per_second", disk),
            ("direct_read_cpu_seconds_per_byte", cpu),
        )
    }
    measured = MeasuredRates(rates=rates, age_seconds=age)
    return FoundRates(of="disk-direct", share=share, measured=measured, origin=origin)


def test_a_checkpoint_on_two_volumes_has_the_rate_of_reading_one_after_the_other():
    found = combined(
        [
            measured_volume(0.75, Origin.MEASURED, disk=3e9, cpu=2e-10),
            measured_volume(0.25, Origin.CACHED, disk=1e9, cpu=6e-10, age=60.0),
        ]
    )
    assert found.fields["disk_bytes_per_second"] == pytest.approx(2e9)
    assert found.fields["direct_read_cpu_seconds_per_byte"] == pytest.approx(3e-10)
    figure = found.figures["disk_bytes_per_second"]
    assert (figure.origin, figure.samples, figure.age_seconds) == (Origin.CACHED, 8, 60.0)


def test_a_volume_without_a_rate_leaves_the_rate_unknown_unless_it_holds_next_to_nothing():
    assert combined([measured_volume(0.5, Origin.MEASURED, disk=3e9, cpu=0.0)]).fields == {}
    nearly = combined([measured_volume(0.95, Origin.MEASURED, disk=3e9, cpu=0.0)])
    assert nearly.fields["disk_bytes_per_second"] == pytest.approx(3e9)


def test_passes_that_seem_faster_with_more_tokens_were_disturbed(monkeypatch):
    monkeypatch.setattr(probe_module, "_DISTURBED_RATIO", 2.0)

    def compute(*medians):
        rates = [
            Rate(median=value, least=value, high=value, most=value, samples=5) for value in medians
        ]
        return dict(zip(("1", "4", "16"), rates, strict=True))

    assert probe_module._was_disturbed(compute(2e9, 27e9, 20e9))
    assert not probe_module._was_disturbed(compute(20e9, 27e9, 18e9))


def test_what_was_measured_within_a_limit_is_kept_for_such_limits_only(tmp_path):
    cache, made = MeasurementCache(tmp_path), []

    def rate(limit):
        def measure():
            made.append(limit)
            return {"1": Rate.from_samples([limit or 100.0])}

        probe = Probe(
            key={"of": "compute"},
            names=["1"],
            affected_by_contention=False,
            measure=measure,
            takes_bytes=0,
            limited_to_bytes=limit,
        )
        found = probe_module._load_or_measure(
            probe, cache, fresh=False, measure=True, most_bytes=limit
        )
        return found[0].rates["1"].median

    assert [rate(8), rate(8), rate(16), rate(None), rate(8)] == [8, 8, 16, 100, 100]
    assert made == [8, 16, None]  # once measured as it should be, smaller samples tell nothing
