"""Forward passes on the meta device: what they compute has no values, and must not stay in the process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["on_meta"]

# Two at once would put back each other's replacements, for good.
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def on_meta() -> Iterator[None]:
    """What this thread makes in the block is on the meta device, and transformers remembers none of it.

    Models have functions that remember their results for the whole process (tables of relative positions), not always by
    device. A meta tensor that is remembered gives wrong numbers in the passes that follow, and no error; those of a
    model that somebody else has loaded, too.
    """
    from transformers import pytorch_utils

    names: Any = pytorch_utils
    thread = threading.get_ident()
    with _ONE_AT_A_TIME, torch.device("meta"):
        original = names.is_torchdynamo_compiling

        def forgets() -> bool:
            return threading.get_ident() == thread or bool(original())

        # What transformers asks before it remembers anything.
        names.is_torchdynamo_compiling = forgets
        try:
            yield
        finally:
            names.is_torchdynamo_compiling = original
