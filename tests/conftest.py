"""Quiet for the tests: no progress bars and tables of transformers, which are not ours; and no cache of the user's."""

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
    pass
else:
    # The first example pays for imports, and the machine is shared; what hangs is ended by the timeout of every test.
    hypothesis.settings.register_profile("layerstream", deadline=None)
    hypothesis.settings.load_profile("layerstream")
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
        "--mutations", type=int, default=1000, help="how many mutated files each fuzz test reads"
    )


@pytest.fixture
def mutations(request):
    """How many mutated files a fuzz test reads."""
    return request.config.getoption("--mutations")
