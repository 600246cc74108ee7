"""Fixtures that several test files of the stages share. The files with CUDA tests need pytest alone."""

import pytest
from support.fake_device import ScriptedClock


@pytest.fixture
def clock(monkeypatch):
    """The host's clock, scripted: time passes only in devices and where a test says so."""
    return ScriptedClock().install(monkeypatch)
