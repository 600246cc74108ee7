"""One forward pass at a time over a module tree, and the layer batch that it holds."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from layerstream.pipeline.binding import Bound, put_buffers
from layerstream.pipeline.modules import Use
from layerstream.pipeline.requests import Need
from layerstream.pipeline.stats import Outcome
from layerstream.stages.devices import Device, Event
from layerstream.stages.errors import noting

__all__ = ["Gate", "PassCancelled", "Rider"]


# A protocol, since its one implementation, ``Sweeps``, imports this module.
class Conductor(Protocol):
    """What a rider asks of the sweeps that it rides."""

    device: Device

    def tell(self, what: Callable[..., None], *args: Any) -> None:
        """Have ``what(*args)``, one of the methods below, called on the event loop."""

    def absent_buffers(self, index: int) -> Mapping[Use, torch.Tensor]:
        """What stands in a clone's buffers while layer batch ``index`` is not there."""

    def wanted(
        self,
        rider: "Rider",
        released: Event | None,
        index: int,
        entry: str | None,
        ticket: Future[Bound],
    ) -> None:
        """``rider`` waits for layer batch ``index``; with ``entry``, it is the first of a pass."""

    def released(self, rider: "Rider", released: Event | None) -> None:
        """``rider`` gives no more work that reads the batch it held; ``released`` is the last of it."""

    def gave_up(self, rider: "Rider") -> None:
        """``rider`` neither waits for a batch nor holds one."""

    def left(
        self,
        rider: "Rider",
        released: Event | None,
        entry: str,
        visited: tuple[int, ...] | None,
    ) -> None:
        """``rider`` has ended its pass, having visited these batches if it got to its end."""


# A protocol, since its one implementation, in ``riders``, imports this module.
class Gate(Protocol):
    """What a pass that belongs to no request waits for before it begins."""

    def enter(
        self, rider: "Rider", entry: str, inputs: Sequence[Any], named: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """A pass of ``rider`` is about to begin with these inputs, in the module at ``entry``.

        Returns the keyword arguments to make it with.
        """

    def leave(self, outcome: Outcome) -> None:
        """The pass has ended so."""


class PassCancelled(Exception):  # noqa: N818 - it reports no error
    """Unwinds a forward pass whose caller does not want it any more; never reaches the caller."""


class Rider:
    """A forward pass, or one after the other, of one clone of the module tree. Belongs to one thread at a time.

    It holds at most one layer batch: from the first call of a module in it until it wants another one, or
    the pass ends. It gives back before it waits.
    """

    root: torch.nn.Module  # whose hooks call us

    def __init__(self, sweeps: Conductor, *, gate: Gate | None = None) -> None:
        self._sweeps = sweeps
        self.gate = gate
        self._modules: list[int] = []  # ids of the hooked modules whose calls are under way
        self._held: Bound | None = None
        self._entry = ""
        self._gradients = False
        self._visited: list[int] = []
        self.cancelled = False
        self.passes = 0  # that were begun
        self.tokens: int | None = None  # of the pass under way, where its inputs tell
        self.need: Need | None = None  # of its request, if it belongs to one

    @property
    def demand_bytes(self) -> int | None:
        """What its request takes while this pass is under way; None if nobody has told."""
        if self.need is None:
            return None
        steps = self.passes and self.tokens is not None and self.tokens <= self.need.step_tokens
        return self.need.step_bytes if steps else self.need.nbytes

    def enter(
        self,
        module: torch.nn.Module,
        entry: str,
        inputs: Sequence[Any],
        named: Mapping[str, Any],
    ) -> Mapping[str, Any]:
        """A hooked module is called with these inputs: with the outermost one, a pass begins.

        Returns the keyword arguments to call it with.

        Raises:
            AdmissionError: the pass belongs to no request, and needs more memory than there is for it.
            ClosedError: it belongs to none, and no more are taken.
            PassCancelled: nobody wants the result any more.
        """
        if id(module) in self._modules:
            # No module is inside itself: an interrupt kept the hooks of the last pass from running.
            self.abandon()
        if not self._modules:
            if self.gate is not None:
                named = self.gate.enter(self, entry, inputs, named)
            self._entry = entry
            self.passes += 1
            self.tokens = _tokens(inputs, named)
            # Gradients would be computed from weights that are gone by then.
            self._gradients = torch.is_grad_enabled()
            torch.set_grad_enabled(False)
        self._modules.append(id(module))
        if self.cancelled:
            raise PassCancelled
        return named

    def leave(self, *, completed: bool) -> None:
        """The call is over: with the outermost one, the pass ends."""
        if self._modules:
            self._modules.pop()
            if not self._modules:
                self._end_pass("completed" if completed else "failed")

    def hold(self, index: int) -> None:
        """Return when layer batch ``index`` is bound. The batch that was held is given back first.

        Raises:
            PassCancelled: nobody wants the result any more.
            LayerstreamError: the pipeline failed or was closed.
        """
        if self._held is not None and self._held.index == index:
            return
        released = self._release()
        if self.cancelled:
            self._sweeps.tell(self._sweeps.released, self, released)
            raise PassCancelled
        ticket: Future[Bound] = Future()
        first = not self._visited
        self._sweeps.tell(
            self._sweeps.wanted, self, released, index, self._entry if first else None, ticket
        )
        try:
            self._held = bound = ticket.result()
        except BaseException:  # an interrupt may come after the batch was handed to us
            self._sweeps.tell(self._sweeps.gave_up, self)
            raise
        self._visited.append(index)
        with noting("compute", bound):
            put_buffers(self.root, bound.bind())

    def detached(self, output: Any) -> Any:
        """What a module returns, with copies of what are views of weights; None if nothing is.

        A weight that a module hands on (learned queries, positions) may be computed with when its layer
        batch is gone.
        """
        if self._held is None:
            return None
        memory = self._held.memory

        def is_weight(leaf: Any) -> bool:
            return (
                isinstance(leaf, torch.Tensor)
                and not leaf.is_meta
                and type(leaf) in (torch.Tensor, torch.nn.Parameter)
                and leaf.untyped_storage().data_ptr() in memory
            )

        if not any(is_weight(leaf) for leaf in pytree.tree_leaves(output)):
            return None
        return pytree.tree_map(lambda leaf: leaf.clone() if is_weight(leaf) else leaf, output)

    def abandon(self) -> None:
        """End the pass that an interrupt has left open, if there is one."""
        if self._modules:
            self._end_pass("cancelled")
        elif self.gate is not None:
            self.gate.leave("cancelled")

    def _release(self) -> Event | None:
        """Give the batch at hand back; returns the computation that reads it."""
        if self._held is None:
            return None
        event = self._sweeps.device.record()
        put_buffers(self.root, self._sweeps.absent_buffers(self._held.index))
        self._held = None
        return event

    def _end_pass(self, outcome: Outcome) -> None:
        self._modules.clear()
        torch.set_grad_enabled(self._gradients)
        visited, self._visited = tuple(self._visited), []
        released = None
        try:
            released = self._release()
        finally:  # also on a device that has failed: the others must not wait for us
            self._held = None
            route = visited if outcome == "completed" else None
            self._sweeps.tell(self._sweeps.left, self, released, self._entry, route)
            if self.gate is not None:
                self.gate.leave(outcome)


def _tokens(inputs: Sequence[Any], named: Mapping[str, Any]) -> int | None:
    ids = named.get("input_ids", inputs[0] if inputs else None)
    if isinstance(ids, torch.Tensor) and not ids.is_floating_point():
        return ids.numel()
    embeds = named.get("inputs_embeds")
    return embeds.shape[:-1].numel() if isinstance(embeds, torch.Tensor) else None
