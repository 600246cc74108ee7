"""The forward passes of one request: one at a time, over a clone of the module tree, each holding one layer batch."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from layerstream.pipeline.modeling.binding import Bound, put_buffers
from layerstream.pipeline.modeling.call_arguments import count_tokens
from layerstream.pipeline.modeling.call_state import CallState
from layerstream.pipeline.modeling.edits import LoadedWeight
from layerstream.pipeline.modeling.weight_places import WeightPlace
from layerstream.pipeline.scheduling.request_cost import RequestCost
from layerstream.pipeline.scheduling.route_prediction import route_name
from layerstream.pipeline.scheduling.sampling_rng import SamplingGenerator
from layerstream.pipeline.scheduling.stats import Outcome
from layerstream.stages.devices.protocol import Device, Event
from layerstream.stages.errors import annotated

__all__ = ["PassCancelled", "PassRunner", "Scheduler", "Turn"]


class PassCancelled(Exception):  # noqa: N818 - it reports no error
    """Unwinds a forward pass whose request was cancelled; never reaches the caller."""


class Scheduler(Protocol):
    """What passes use of the scheduler; all but the first three members are called through ``call_on_loop``."""

    @property
    def device(self) -> Device:
        """Where computation runs."""

    def call_on_loop(self, what: Callable[..., None], *args: Any) -> None:
        """Have ``what(*args)`` called on the event loop. If the scheduler is closed, Futures in ``args`` fail."""

    def absent_buffers(self, index: int) -> Mapping[WeightPlace, torch.Tensor]:
        """Placeholders for a clone's buffers while layer batch ``index`` is not there."""

    def batch_wanted(
        self,
        runner: "PassRunner",
        released: Event | None,
        index: int,
        entry: str | None,
        future: Future[Bound],
    ) -> None:
        """The pass gives back the batch that it held, and waits for batch ``index``, which ``future`` gets."""

    def batch_released(self, runner: "PassRunner", released: Event | None) -> None:
        """The pass has given back its batch, if any; ``released`` is the event behind its work with it."""

    def wait_given_up(self, runner: "PassRunner") -> None:
        """The pass neither waits for a batch nor holds one, and wants no more in this sweep."""

    def experts_awaited(self, runner: "PassRunner") -> None:
        """The pass keeps its batch, but does not compute: it waits for experts."""

    def experts_arrived(self, runner: "PassRunner") -> None:
        """The pass computes again."""

    def pass_ended(
        self, runner: "PassRunner", released: Event | None, visited: tuple[int, ...] | None
    ) -> None:
        """The pass has ended. ``visited``: its batches, in order; None if it did not complete."""


class Turn(Protocol):
    """What a pass that belongs to no request waits for before it begins."""

    def enter(
        self, runner: "PassRunner", entry: str, inputs: Sequence[Any], named: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Wait until the pass may begin; returns the keyword arguments to make it with."""

    def leave(self, outcome: Outcome) -> None:
        """The pass has ended, if one was under way."""


class PassRunner:
    """Runs forward passes, one after the other, over one clone of the module tree. Used by one thread at a time.

    A pass holds at most one layer batch: from the first call of a module in it until a module in another one is
    called, or the pass ends. It gives that batch back before it waits for the next.

    Args:
        scheduler: Brings the layer batches.
        turn: Waited for before each pass that belongs to no request; None if the passes belong to one.

    Attributes:
        root: The clone whose hooks call this object.
        cancelled: The request was cancelled: its pass is unwound when it next wants a batch.
        passes: Passes begun so far.
        tokens: Tokens in the pass under way; None if its inputs do not show them.
        cost: Memory of its request; None if it belongs to none.
        sampling: What its request samples from between passes; None if it belongs to none.
        state: That of the modules before its request; None if it belongs to none.
    """

    root: torch.nn.Module

    def __init__(self, scheduler: Scheduler, *, turn: Turn | None = None) -> None:
        self._scheduler = scheduler
        self.turn = turn
        # Ids of the hooked modules that are being called, outermost first.
        self._modules: list[int] = []
        self._held: Bound | None = None
        self._undo: list[Callable[[], None]] = []
        self._entry = ""
        self._gradients = False
        self._keeps_casts = True
        self._visited: list[int] = []
        self._wake: Callable[[], None] | None = None
        self.cancelled = False
        self.passes = 0
        self.tokens: int | None = None
        self.cost: RequestCost | None = None
        self.sampling: SamplingGenerator | None = None
        self.state: CallState | None = None

    @property
    def demand_bytes(self) -> int | None:
        """What its request needs during this pass of the memory that layers are in, too; None if unknown."""
        if self.cost is None:
            return None
        is_step = self.passes and self.tokens is not None and self.tokens <= self.cost.step_tokens
        return self.cost.step_bytes if is_step else self.cost.memory.shared_bytes

    def enter(
        self, module: torch.nn.Module, entry: str, inputs: Sequence[Any], named: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Before the call of a hooked module, whose path is ``entry``. The outermost call begins a pass.

        Returns:
            The keyword arguments to call it with.

        Raises:
            AdmissionError: The pass belongs to no request, and needs more memory than there is.
            ClosedError: The pass belongs to no request, and no more are taken.
            PassCancelled: The request was cancelled.
        """
        if id(module) in self._modules:
            # No module calls itself, so an interrupt kept the last pass from leaving it.
            self.abandon()
        if not self._modules:
            if self.turn is not None:
                named = self.turn.enter(self, entry, inputs, named)
            self._entry = route_name(module, entry)
            self.passes += 1
            self.tokens = count_tokens(inputs, named)
            # By the time of a backward pass the weights would be gone.
            self._gradients = torch.is_grad_enabled()
            torch.set_grad_enabled(False)
            # A caller's autocast would keep the casts of all weights until it ends.
            self._keeps_casts = torch.is_autocast_cache_enabled()
            torch.set_autocast_cache_enabled(False)
            if self.sampling is not None:
                self.sampling.pause()
        self._modules.append(id(module))
        self.check_cancelled()
        return named

    def leave(self, *, completed: bool) -> None:
        """After the call of a hooked module. The end of the outermost call ends the pass."""
        if self._modules:
            self._modules.pop()
            if not self._modules:
                self._end_pass("completed" if completed else "failed")

    def is_outermost(self, module: torch.nn.Module) -> bool:
        """Whether the pass under way is a call of ``module``, none of whose modules is being called."""
        return self._modules == [id(module)]

    def start_over(self) -> None:
        """Give back what the pass holds, and leave the sweep: from here on it is made again from its beginning."""
        released, self._visited = self._release(), []
        self._scheduler.call_on_loop(self._scheduler.batch_released, self, released)
        self._scheduler.call_on_loop(self._scheduler.wait_given_up, self)

    def hold(self, index: int) -> None:
        """Give back the batch that is held, and wait until layer batch ``index`` is there and bound.

        Raises:
            PassCancelled: The request was cancelled.
            LayerstreamError: The pipeline failed or was closed.
        """
        if self._held is not None:
            if self._held.index == index:
                return
            self._held.keep_changes()
        released = self._release()
        if self.cancelled:
            self._scheduler.call_on_loop(self._scheduler.batch_released, self, released)
            raise PassCancelled
        future: Future[Bound] = Future()
        entry = None if self._visited else self._entry
        wanted = self._scheduler.batch_wanted
        self._scheduler.call_on_loop(wanted, self, released, index, entry, future)
        try:
            self._held = bound = future.result()
        except BaseException:  # an interrupt may come after the batch was handed out
            self._scheduler.call_on_loop(self._scheduler.wait_given_up, self)
            raise
        self._visited.append(index)
        with annotated("compute", bound):
            put_buffers(self.root, bound.bind())

    def copy_weights_in(self, output: Any) -> Any:
        """The output of a module with views of weights replaced by copies; None if there are none.

        A weight that a module returns (learned queries, positions) may be used after its layer batch is gone.
        """
        if self._held is None:
            return None
        memory = self._held.memory

        def is_weight(leaf: Any) -> bool:
            return (
                type(leaf) in (torch.Tensor, LoadedWeight)
                and not leaf.is_meta
                and leaf.untyped_storage().data_ptr() in memory
            )

        if not any(is_weight(leaf) for leaf in pytree.tree_leaves(output)):
            return None
        return pytree.tree_map(lambda leaf: leaf.clone() if is_weight(leaf) else leaf, output)

    def undo_at_release(self) -> list[Callable[[], None]] | None:
        """What is called when the batch that is held is given back; None if none is held."""
        return None if self._held is None else self._undo

    def check_cancelled(self) -> None:
        """Unwind the pass by ``PassCancelled`` if its request was cancelled."""
        if self.cancelled:
            raise PassCancelled

    def cancel(self) -> None:
        """The request was cancelled. May be called in any thread."""
        self.cancelled = True
        if (wake := self._wake) is not None:
            wake()

    def wait(self, future: Future[Any], at_most_seconds: float | None = None) -> None:
        """Block until ``future`` is done, and so bytes have arrived that this pass needs, or for so many seconds.

        Raises:
            PassCancelled: The request was cancelled first.
        """
        woken = threading.Event()
        future.add_done_callback(lambda _: woken.set())
        self._wake = woken.set  # first, since ``cancel`` sets first what is asked next
        try:
            if not self.cancelled:
                woken.wait(at_most_seconds)
        finally:
            self._wake = None
        if not future.done():
            self.check_cancelled()

    def abandon(self) -> None:
        """End the pass that an interrupt left unfinished, if there is one."""
        if self._modules:
            self._end_pass("cancelled")
        elif self.turn is not None:
            self.turn.leave("cancelled")

    def _release(self) -> Event | None:
        """Release the batch that is held; returns the event behind the work that reads it, for the scheduler."""
        if self._held is None:
            return None
        event = self._scheduler.device.record()
        while self._undo:
            self._undo.pop()()
        put_buffers(self.root, self._scheduler.absent_buffers(self._held.index))
        self._held = None
        return event

    def _end_pass(self, outcome: Outcome) -> None:
        self._modules.clear()
        torch.set_grad_enabled(self._gradients)
        torch.set_autocast_cache_enabled(self._keeps_casts)
        if self.sampling is not None:
            self.sampling.resume()
        visited, self._visited = tuple(self._visited), []
        released = None
        try:
            try:
                if self._held is not None:
                    self._held.keep_changes()
            finally:
                released = self._release()
        finally:  # also on a device that has failed: other passes must not wait for this one
            self._held = None
            route = visited if outcome == "completed" else None
            self._scheduler.call_on_loop(self._scheduler.pass_ended, self, released, route)
            if self.turn is not None:
                self.turn.leave(outcome)
