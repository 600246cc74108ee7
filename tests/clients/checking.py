"""What the scripts that try a client share. It needs nothing but Python: they run in the environments of their clients."""

import asyncio
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["CASE", "check", "run_checks"]

CASE: dict[str, Any] = json.loads(Path(os.environ["CLIENT_CASE"]).read_text("utf-8"))
"""Where the server is, what it is asked, and what it has to answer; see ``expectations.py``."""

_CHECKS: list[Callable[[], Any]] = []


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    """Register a check, a function or a coroutine function that asserts something of the client's answers."""
    _CHECKS.append(function)
    return function


def run_checks() -> None:
    """Run all checks, and write what became of each to the file that the harness has named."""
    outcomes: dict[str, str | None] = {}
    for function in _CHECKS:
        try:
            result = function()
            if inspect.isawaitable(result):
                asyncio.run(_awaited(result))
        except Exception as error:  # noqa: BLE001 - a client may raise anything
            traceback.print_exc(file=sys.stderr)
            outcomes[function.__name__] = repr(error)
        else:
            outcomes[function.__name__] = None
    Path(os.environ["CLIENT_OUTCOMES"]).write_text(json.dumps(outcomes), "utf-8")


async def _awaited(result: Any) -> None:
    await result
