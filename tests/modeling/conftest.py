"""Fixtures of the tests in this folder."""

from functools import partial
from pathlib import Path

import pytest
from support.models import save_model
from support.traced import Save


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Save a tiny random model as transformers does."""
    return partial(save_model, tmp_path / "model")
