"""Compiled kernels are kept from run to run, in a folder that git ignores."""

from pathlib import Path

import pytest

from layerstream.stages.unpack import compiling


@pytest.fixture(scope="session", autouse=True)
def kernel_folder():
    folder = Path(__file__).parents[3] / "build" / "kernels"
    compiling.set_cache_folder(folder)
    yield folder
    compiling.set_cache_folder(None)


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    """Unpack once with compiled kernels, and once as a process without numba does."""
    if request.param == "torch":
        monkeypatch.setattr(compiling, "why_not_compiled", lambda: "The test says so.")
    elif (reason := compiling.why_not_compiled()) is not None:
        pytest.skip(reason)
    return request.param
