"""Quiet for the tests: no progress bars and tables of transformers, which are not ours; and no cache of the user's."""

import gc
import os

# Before torch is loaded, here and in processes that tests start: threads of OpenMP sleep while they wait. Those of a dozen
# requests at once would spin instead, which takes three times the processor time on two cores, five where others work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import transformers
from support.service import client, folder, http, reference, server  # noqa: F401 - one for all files that ask it

try:
    import hypothesis
except ModuleNotFoundError:  # the tests that tools/gpu_check.sh runs need pytest alone
    hypothesis = None
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_users(tmp_path_factory):
    """What is known of this machine makes no difference to a test, and no test writes in anybody's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_addoption(parser):
    parser.addoption(
        "--extended",
        action="store_true",
        help="run all combinations of parameters, of which the default run takes a selection, and more random examples",
    )
    parser.addoption("--mutations", type=int, help="how many mutated files each fuzz test reads")


def pytest_configure(config):
    config.addinivalue_line("markers", "extended: runs with --extended only")
    if hypothesis is not None:
        examples = 200 if config.getoption("--extended") else 40
        # The first example pays for imports, and the machine is shared; what hangs is ended by the timeout of every test.
        hypothesis.settings.register_profile("layerstream", deadline=None, max_examples=examples)
        hypothesis.settings.load_profile("layerstream")


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # torch and transformers stay; to look through them again and again would take the collector much time


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--extended"):
        config.hook.pytest_deselected(items=[each for each in items if _is_extended(each)])
        items[:] = [each for each in items if not _is_extended(each)]


def _is_extended(item):
    return item.get_closest_marker("extended") is not None


@pytest.fixture
def extended(request):
    """Whether all combinations and more random examples are wanted."""
    return request.config.getoption("--extended")


@pytest.fixture
def mutations(request, extended):
    """How many mutated files a fuzz test reads."""
    return request.config.getoption("--mutations") or (2000 if extended else 300)
