"""Workers that are forked while a drop-in is open: they end, and say why its model is not theirs."""

from pathlib import Path

import pytest
from support.forked import run_forked
from support.models import save_model

BEFORE = """
import multiprocessing, os, sys, torch, warnings
from concurrent.futures import ProcessPoolExecutor
from layerstream.pipeline import load_streamed

IDS = torch.tensor([[3, 4]])
warnings.simplefilter("ignore")

def use():
    for call in (lambda: model(input_ids=IDS), lambda: model.generate(input_ids=IDS, max_new_tokens=2)):
        try:
            call()
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    model.close()

context = multiprocessing.get_context("fork")
with load_streamed(sys.argv[1], device="cpu", measure=False) as model:
    first = model.generate(input_ids=IDS, max_new_tokens=2)
"""
AFTER = """
    assert torch.equal(first, model.generate(input_ids=IDS, max_new_tokens=2))
print("done")
"""
WORKERS = {
    "a process": """
    worker = context.Process(target=abs, args=(1,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
""",
    "a pool": """
    with context.Pool(2) as pool:
        assert pool.map(abs, [1, -2]) == [1, 2]
        pool.close()
        pool.join()
""",
    "an executor": """
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        assert list(executor.map(abs, [1, -2])) == [1, 2]
""",
}
USERS = {
    "a process": """
    worker = context.Process(target=use)
    worker.start()
    worker.join()
    assert worker.exitcode == 0
""",
    "a fork": """
    if not (child := os.fork()):
        use()
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
""",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return save_model(tmp_path_factory.mktemp("fork") / "model")


def outcome(program: str, model: Path) -> list[str]:
    """Run ``program`` in a process of its own, and return its lines; all its processes are killed if it hangs."""
    result = run_forked(model, program=BEFORE + program + AFTER, seconds=60)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


@pytest.mark.parametrize("worker", WORKERS.values(), ids=WORKERS)
def test_a_forked_worker_ends(worker: str, model: Path) -> None:
    assert outcome(worker, model) == ["done"]


@pytest.mark.parametrize("user", USERS.values(), ids=USERS)
def test_the_parents_model_is_refused_in_a_forked_process(user: str, model: Path) -> None:
    *refusals, last = outcome(user, model)
    assert last == "done"
    assert len(refusals) == 2
    for refusal in refusals:
        assert refusal.startswith("ClosedError the model was opened in process ")
        assert "'spawn'" in refusal
