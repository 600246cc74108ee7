"""Weights that the user has replaced: they stay where they were put, and their memory counts.

What streams lies in the parameter tables of modules only for a while: a placeholder, then the weight, then the
placeholder again. All of these say that they stream. Anything else that is found in their place was put there by the
user, and is left alone.
"""

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, Self

import torch
from torch import nn

from layerstream.pipeline.modeling.clone import ModuleFunction, all_modules
from layerstream.stages.errors import ModelError, PlanError
from layerstream.stages.text import format_bytes

__all__ = [
    "Edits",
    "LoadedWeight",
    "Streams",
    "guard_conversions",
    "refuse_copy",
    "refuse_replaced",
    "streams",
]

Place = tuple[dict[str, Any], str]
"""A module's table of parameters, which all clones share, and the name there."""


class Streams:
    """Mixed into parameters that stand for a weight in a file, so that assigning to their ``data`` replaces the weight."""

    layerstream_replace: Callable[[torch.Tensor], None] | None = None

    @property
    def data(self) -> Any:
        """As torch's; assigning to it makes the weight resident."""
        return self.detach()  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Any) -> None:
        if value is self:
            return
        if self.layerstream_replace is None:
            raise ModelError(
                f"{self!r} cannot be replaced: its parts are read when they are used; load the model with transformers' "
                "from_pretrained to change them"
            )
        self.layerstream_replace(value)

    def __deepcopy__(self, _: Any) -> Any:
        """Refuse, also for the module that it is in."""
        refuse_copy()

    def __reduce_ex__(self, _: Any) -> Any:
        """Refuse, also for the module that it is in."""
        refuse_copy()


def refuse_copy() -> NoReturn:
    """Refuse to copy or pickle a weight that streams, a module that it is in, or the state of one."""
    raise ModelError(
        "a weight that streams cannot be copied or pickled, nor can the module that it is in: it stays in its file; "
        "copy what transformers' from_pretrained loads instead"
    )


def streams(parameter: Any) -> bool:
    """Whether ``parameter`` lies in its place only while its layer batch is, or is not, loaded."""
    return isinstance(parameter, Streams)


class LoadedWeight(Streams, nn.Parameter):
    """A parameter whose layer batch is loaded."""


def refuse_replaced(module: nn.Module, kept: Mapping[str, Any], path: str) -> None:
    """Refuse to compute with ``module`` if not all its parameters in ``kept`` are there, whose parts are read on demand.

    Raises:
        ModelError: The user has replaced one.
    """
    for name, parameter in kept.items():
        if getattr(module, name) is not parameter:
            raise ModelError(
                f"{path}.{name} was replaced, but its parts are read when they are used; load the model with transformers' "
                "from_pretrained to change them"
            )


class Edits:
    """The weights of one model that the user has replaced or added."""

    def __init__(self) -> None:
        self._places: defaultdict[str, list[Place]] = defaultdict(list)
        self._found: dict[tuple[int, str], torch.Tensor] = {}
        self._lock = threading.Lock()
        self._counted = 0
        self._own_modules: frozenset[int] = frozenset()
        self._added: list[weakref.ref[torch.Tensor]] = []
        self.available_bytes: int | None = None
        """What the budget leaves for requests and replaced weights together; None if it is not known."""
        self.on_change: Callable[[], None] | None = None
        """Called when ``nbytes`` has changed, in any thread."""

    def register(self, name: str, places: list[Place], parameter: Streams) -> None:
        """``parameter`` stands for the weight ``name`` in ``places``, beside others that stand for it elsewhere."""
        self._places[name] += places
        parameter.layerstream_replace = lambda value: self._replace(name, value)

    def know(self, root: nn.Module) -> None:
        """All modules of ``root`` are the model's own: what is added to it later is the user's."""
        self._own_modules = frozenset(map(id, all_modules(root)))

    def count_added(self, root: nn.Module) -> None:
        """Count the parameters of modules that the user has added, such as adapters that PEFT injects."""
        added = (each for each in all_modules(root) if id(each) not in self._own_modules)
        tables = (list(each._parameters.values()) for each in added)  # noqa: SLF001
        self._added = [
            weakref.ref(each)
            for table in tables
            for each in table
            if each is not None and not streams(each)
        ]
        self._count()

    @property
    def nbytes(self) -> int:
        """What all replaced weights, and those that were added, take; one memory counts once."""
        storages = {}
        added = [found for each in self._added if (found := each()) is not None]
        for parameter in [*self._found.values(), *added]:
            if not parameter.is_meta:
                storage = parameter.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def found(self, place: Place) -> None:
        """Something that does not stream lies in ``place``."""
        table, name = place
        parameter = table[name]
        key = id(table), name
        with self._lock:
            if parameter is None or self._found.get(key) is parameter:
                return
            self._found[key] = parameter
        self._count()

    def _replace(self, name: str, value: torch.Tensor) -> None:
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"data of {name} must be a tensor, not {type(value).__name__}")
        nbytes = value.untyped_storage().nbytes()
        if self.available_bytes is not None and self.nbytes + nbytes > self.available_bytes:
            raise PlanError(
                f"{name} cannot be replaced by a tensor of {format_bytes(nbytes)}, which would be resident: the budget "
                f"leaves {format_bytes(self.available_bytes)} for requests and replaced weights; raise the budget"
            )
        places = [(table, leaf) for table, leaf in self._places[name] if streams(table.get(leaf))]
        with torch.inference_mode(mode=False):
            needs_gradient = any(table[leaf].requires_grad for table, leaf in places)
            parameter = nn.Parameter(value.detach(), requires_grad=needs_gradient)
        for table, leaf in places:  # one parameter for all of them: they are tied
            table[leaf] = parameter
            self.found((table, leaf))

    def _count(self) -> None:
        counted = self.nbytes
        if counted != self._counted and self.on_change is not None:
            self.on_change()
        self._counted = counted


UndoList = list[Callable[[], None]]


def guard_conversions(root: nn.Module, undo_in_pass: Callable[[], UndoList | None]) -> None:
    """Let ``half()``, ``to(dtype)``, ``cuda()`` and the like of modules with streamed weights say that they cannot.

    They go through all modules, and would leave some converted before one refuses. A model's own code may convert its
    modules while it computes: what it converts then is a copy, for as long as the layer batch is loaded.

    Args:
        root: The module tree.
        undo_in_pass: What the calling thread's pass calls when it gives back its layer batch; None if it holds none.
    """
    for module in root.modules():
        if any(True for _ in _streamed(module)):
            vars(module)["_apply"] = _GuardedApply(weakref.ref(module), undo_in_pass)


def _streamed(module: nn.Module) -> Iterator[torch.Tensor]:
    for part in module.modules():
        for table in (part._parameters, part._buffers):  # noqa: SLF001
            yield from (each for each in table.values() if each is not None and streams(each))


class _GuardedApply(ModuleFunction):
    """A module's ``_apply``."""

    def __init__(
        self, module: weakref.ref[nn.Module], undo_in_pass: Callable[[], UndoList | None]
    ) -> None:
        super().__init__(module)
        self._undo_in_pass = undo_in_pass

    def of(self, module: nn.Module) -> Self:
        return type(self)(weakref.ref(module), self._undo_in_pass)

    def __call__(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module:
        """Apply a function to the module, if that changes no streamed weight, or copies of those that are loaded."""
        module = self.module()
        streamed = list(_streamed(module))
        if _would_change(streamed, fn):
            undo = self._undo_in_pass()
            if undo is None or not all(type(each) is LoadedWeight for each in streamed):
                raise ModelError(
                    f"the weights of {type(module).__name__} stream, so their precision and device cannot be changed; "
                    "open the model with dtype= and device= instead"
                )
            _convert_copies(module, fn, undo)
        kind: Any = type(module)
        applied: nn.Module = kind._apply(module, fn, recurse)  # noqa: SLF001
        return applied


def _would_change(
    streamed: Sequence[torch.Tensor], fn: Callable[[torch.Tensor], torch.Tensor]
) -> bool:
    for dtype, device, dims in {(each.dtype, each.device, each.dim()) for each in streamed}:
        probe = torch.zeros((1,) * dims, dtype=dtype, device=device)
        changed = fn(probe) is not probe
        if changed or (device.type == "cpu" and probe.is_shared()):  # type: ignore[no-untyped-call]
            return True
    return False


def _convert_copies(
    module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], undo: UndoList
) -> None:
    """Give ``module`` tables of its own, with what ``fn`` makes of its streamed weights, until ``undo`` is called."""
    for part in module.modules():
        table = part._parameters  # noqa: SLF001 - shared by all clones
        converted = {
            name: nn.Parameter(fn(each.detach()), requires_grad=each.requires_grad)
            for name, each in table.items()
            if each is not None and streams(each)
        }
        if converted:
            vars(part)["_parameters"] = {**table, **converted}
            undo.append(partial(vars(part).__setitem__, "_parameters", table))
