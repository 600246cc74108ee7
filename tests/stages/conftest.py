"""Fixtures that several test files of the stages share. Needs pytest and what the library needs, nothing else."""

import pytest
from support.fake_device import ScriptedClock
from support.gpus import ALL_GPUS


@pytest.fixture
def clock(monkeypatch):
    """The host's clock, scripted: time passes only in devices and where a test says so."""
    return ScriptedClock().install(monkeypatch)


@pytest.fixture(params=ALL_GPUS)
def gpu(request, monkeypatch):
    return request.param(monkeypatch)
