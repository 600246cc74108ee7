"""Replaces functions of modules for one thread."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

__all__ = ["for_this_thread"]

# Replacing a function of a module is undone in the reverse order only, so one thread at a time does it with one function.
_LOCK = threading.RLock()


@contextmanager
def for_this_thread(
    owner: Any,
    name: str,
    replacement: Callable[..., Any],
    *,
    lock: AbstractContextManager[object] = _LOCK,
) -> Iterator[Any]:
    """Replace the function ``name`` of a module or class for calls of this thread; yields the original.

    Args:
        owner: The module or class.
        name: Of the function.
        replacement: Called instead.
        lock: Held meanwhile; whoever replaces the same function takes the same one.
    """
    thread = threading.get_ident()
    with lock:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            chosen = replacement if threading.get_ident() == thread else original
            return chosen(*args, **kwargs)

        with patch.object(owner, name, call):
            yield original
