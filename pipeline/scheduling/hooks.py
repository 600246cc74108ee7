"""Hooks on the modules of a streamed model: where a pass begins and ends, and which layer batch it needs."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import nn

from layerstream.pipeline.modeling.edits import refuse_copy
from layerstream.pipeline.scheduling.thread_passes import ThreadPasses
from layerstream.stages.errors import ModelError

__all__ = ["hook_modules", "modules_around", "refuse_compiled"]


def hook_modules(root: nn.Module, batches: Mapping[str, int], passes: ThreadPasses) -> None:
    """Add hooks to the modules of ``root`` that need a layer batch, and to those around them.

    Args:
        root: The module tree.
        batches: The index of the layer batch that each module needs, by the module's path.
        passes: The pass runners of the threads that call modules.
    """
    for path in (modules_around(batches) | batches.keys()) - {""} | {""}:
        index = batches.get(path)
        exits = index is not None and (not path or batches.get(path.rpartition(".")[0]) != index)
        _hook(passes, root.get_submodule(path), path, index, exits=exits)


def modules_around(paths: Iterable[str]) -> set[str]:
    """The paths of all modules that contain one of those at ``paths``; "" is the tree itself."""
    around = {""}
    for path in paths:
        while path:
            path = path.rpartition(".")[0]  # noqa: PLW2901 - walks up from each
            around.add(path)
    return around


def refuse_compiled(kind: str) -> None:
    """Refuse to be compiled.

    Raises:
        ModelError: Always.
    """
    raise ModelError(
        f"a streamed {kind} cannot be compiled: its weights come and go between layers, which compiled code does not "
        "know; call it as it is."
    )


# What torch.compiler.disable sets, too; that one imports a compiler that is not needed otherwise.
vars(refuse_compiled)["_torchdynamo_disable"] = True


def _hook(
    passes: ThreadPasses, module: nn.Module, path: str, index: int | None, *, exits: bool
) -> None:
    before = _Before(passes, type(module).__name__, path, index)
    module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    module.register_forward_hook(_After(passes, exits=exits), always_call=True)


class _Hook:
    """An object, not a function: pickling it with its module ends in a sentence."""

    def __deepcopy__(self, _: Any) -> Self:
        """As of a function: a module whose weights are all the user's may be copied."""
        return self

    def __reduce_ex__(self, _: Any) -> Any:
        """Refuse, also for the module that it is on."""
        refuse_copy()


class _Before(_Hook):
    """Before the call of a module.

    Args:
        passes: The pass runners of the threads that call modules.
        kind: The name of the module's class.
        path: Where it is.
        index: The index of the layer batch that it needs, if any.
    """

    def __init__(self, passes: ThreadPasses, kind: str, path: str, index: int | None) -> None:
        self._passes = passes
        self._kind = kind
        self._path = path
        self._index = index

    def __call__(self, module: nn.Module, inputs: Any, named: Any) -> Any:
        if torch.compiler.is_compiling():
            refuse_compiled(self._kind)
        runner = self._passes.runner()
        replaced = runner.enter(module, self._path, inputs, named)
        if self._index is not None:
            runner.hold(self._index)
        return None if replaced is named else (inputs, replaced)


class _After(_Hook):
    """After the call of a module. ``exits``: What it returns leaves the modules of its layer batch."""

    def __init__(self, passes: ThreadPasses, *, exits: bool) -> None:
        self._passes = passes
        self._exits = exits

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():  # which was refused before the call
            return None
        # With always_call, this is called after an exception too, without an output; even after one that kept the
        # thread from getting a pass runner.
        runner = self._passes.current()
        if runner is None:
            return None
        copied = runner.copy_weights_in(output) if self._exits and output is not None else None
        runner.leave(completed=output is not None)
        return copied
