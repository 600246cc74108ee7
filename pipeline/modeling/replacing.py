"""Replaces functions of modules for one thread."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

__all__ = ["for_this_thread"]

# Replacing a function of a module is undone in the reverse order only, so one thread at a time does it.
_LOCK = threading.RLock()


@contextmanager
def for_this_thread(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[Any]:
    """Replace the function ``name`` of a module or class for calls of this thread; yields the original."""
    original = getattr(owner, name)
    thread = threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        chosen = replacement if threading.get_ident() == thread else original
        return chosen(*args, **kwargs)

    with _LOCK, patch.object(owner, name, call):
        yield original
