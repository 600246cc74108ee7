"""A device that is out of memory while a model runs: fewer layers stay in its memory, and the forward pass is made once more.

The estimate of a pass may be too low, and other processes may have taken memory. A pass is made again only where that gives
the same bits: if its KV cache can be put back as it was, and it has left nothing on modules. What it has drawn from torch's default
generators it draws again, if no other request may have drawn from them, too: with others, their order is never the same. A stage of the pipeline that fails
for want of memory has ended it: it is opened anew with a smaller plan, and the passes that wait for a layer batch go on.
"""

import asyncio
import functools
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch.utils import _pytree as pytree

from layerstream.pipeline.modeling.cache_rollback import CacheMark
from layerstream.pipeline.modeling.call_arguments import CACHE_NAMES, by_name, given_cache
from layerstream.pipeline.modeling.call_state import CallState
from layerstream.pipeline.planning.plan import Plan
from layerstream.pipeline.scheduling.pass_state import fail_future
from layerstream.pipeline.scheduling.passes import PassRunner, Scheduler
from layerstream.pipeline.scheduling.thread_passes import ThreadPasses
from layerstream.stages.devices.protocol import Device
from layerstream.stages.errors import ClosedError, DeviceError
from layerstream.stages.text import format_bytes

__all__ = ["MakeRoom", "OutOfMemory", "first_line"]

logger = logging.getLogger(__name__)

MakeRoom = Callable[[int], Awaitable[str] | None]
"""Switches to a plan that takes so many bytes less of the device's memory, or as little as possible, and says what that changes.

Raises DeviceError or PlanError if no plan takes less. None: the model is gone.
"""


class _NoMemoryError(DeviceError, torch.OutOfMemoryError):
    """Both ours and torch's: there is code that halves its batches at the latter."""


class OutOfMemory:
    """What is done when a device is out of memory.

    Args:
        device: The device.
        plan: Returns the running plan.

    Attributes:
        make_room: Makes it a smaller one. Called on the event loop, by one task at a time.
    """

    def __init__(self, device: Device, plan: Callable[[], Plan]) -> None:
        self._device = device
        self._plan = plan
        self.make_room: MakeRoom = lambda _: None
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def relieve(self, what: str, nbytes: int = 0) -> str:
        """Have so many bytes less taken by layers, since ``what`` torch says; returns what was done.

        Raises:
            DeviceError: No plan takes less, or it cannot be switched to: it has the figures.
        """
        async with self._turn:
            room = self.make_room(nbytes)
            if room is None:
                raise ClosedError("the model is not open any more")
            try:
                done = await room
            except ClosedError:
                raise
            except Exception as refusal:
                raise self.error(what, f"no smaller plan can be run ({refusal})") from refusal
        logger.warning("%s is out of memory (%s): %s", self._device.torch_device, what, done)
        return done

    def error(self, what: str, why: str) -> DeviceError:
        """What to raise if there is no memory for good, with the figures of the plan and the present ones."""
        plan = self._plan()
        memory, free = plan.device_memory or plan.host_memory, self._device.free_bytes()
        now = "" if free is None else f", and {format_bytes(free)} are free now"
        return _NoMemoryError(
            f"{plan.device} is out of memory ({what}), and {why}; the plan has a budget of "
            f"{format_bytes(memory.budget_bytes)} there, {format_bytes(memory.taken_bytes)} for layers and "
            f"{format_bytes(memory.reserved_bytes)} for its workload{now}: free memory on the device, or open the model "
            "with a smaller VRAM budget or a larger workload"
        )

    def forward_of(
        self,
        kind: type[Any],
        passes: ThreadPasses,
        scheduler: Scheduler,
        alone: Callable[[], int | None],
    ) -> Callable[..., Any]:
        """``forward`` of a class of modules, for the threads of ``passes``: a pass that had no memory is made again once.

        Args:
            kind: The class.
            passes: The pass runners of the threads that call it.
            scheduler: Calls what runs on the event loop.
            alone: See ``Requests.alone``.
        """

        @functools.wraps(kind.forward)
        def forward(self_: Any, *inputs: Any, **named: Any) -> Any:
            runner = passes.current()
            if runner is None or not runner.is_outermost(self_):
                return kind.forward(self_, *inputs, **named)
            random = _RandomNumbers(self._device.torch_device, alone)
            before = _Before(runner, self_, by_name(kind.forward, (self_, *inputs), named), random)
            call = functools.partial(kind.forward, self_, *inputs, **named)
            result, what = _attempt(call)
            if what is None:
                return result
            runner.start_over()
            if why := before.restore():
                raise self.error(what, f"the pass cannot be made again: {why}")
            done: Future[str] = Future()
            needed = 0 if runner.cost is None else runner.cost.memory.shared_bytes
            scheduler.call_on_loop(self._begin, what, needed, done)
            runner.wait(done)
            change = done.result()
            result, what = _attempt(call)
            if what is not None:
                raise self.error(what, f"was so before it was tried again, when {change}")
            return result

        return forward

    def _begin(self, what: str, nbytes: int, done: "Future[str]") -> None:
        async def relieve() -> None:
            try:
                done.set_result(await self.relieve(what, nbytes))
            except BaseException as error:  # noqa: BLE001 - whoever waits gets it
                fail_future(done, error)

        task = asyncio.create_task(relieve(), name="layerstream-relief")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Wait for what was begun, which fails when the scheduler is closed."""
        if self._tasks:
            await asyncio.wait(self._tasks)


def _attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result of a pass, or what torch says if there is no memory for it."""
    try:
        return call(), None
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(
            error.__traceback__
        )  # they have what the pass has computed until now
        return None, first_line(error)


def first_line(error: BaseException) -> str:
    """What torch says first; after that it explains its allocator."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")


class _Before:
    """What there was before a pass.

    Args:
        runner: Runs it.
        root: The module that is called.
        named: Its arguments.
        random: The random numbers of which it may draw.
    """

    def __init__(
        self,
        runner: PassRunner,
        root: torch.nn.Module,
        named: Mapping[str, Any],
        random: "_RandomNumbers",
    ) -> None:
        self._training = root.training
        self._random = random
        self._cache = CacheMark(given_cache(named))
        # A request's is that of its beginning: if nothing has changed since then, it is that of each of its passes.
        self._state = runner.state or CallState(root, None)
        rest = [value for name, value in named.items() if name not in CACHE_NAMES]
        self._inputs = [
            (leaf, leaf._version)  # noqa: SLF001 - autograd's own
            for leaf in pytree.tree_leaves(rest)
            if isinstance(leaf, torch.Tensor) and not leaf.is_inference()
        ]

    def restore(self) -> str | None:
        """Have everything as it was; returns why not if that cannot be done."""
        if self._training and not self._random.are_its_own():
            return "it has drawn random numbers, of a model in training mode, beside other requests"
        if any(leaf._version != version for leaf, version in self._inputs):  # noqa: SLF001
            return "it has written to its inputs"
        if self._state.has_changed():
            return "the model keeps a part of its state on modules"
        if not self._cache.restore():
            return "its KV cache, which is partly written, cannot be put back as it was"
        if self._random.are_its_own():
            self._random.restore()
        return None


class _RandomNumbers:
    """The default generators of torch before a pass, which all requests share.

    Args:
        device: Where it computes.
        alone: See ``Requests.alone``.
    """

    def __init__(self, device: torch.device, alone: Callable[[], int | None]) -> None:
        gpu: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._device, self._gpu = device, gpu if gpu is not None and gpu.is_initialized() else None
        self._alone, self._before = alone, alone()
        self._host_state = torch.get_rng_state()
        self._gpu_state = None if self._gpu is None else self._gpu.get_rng_state(device)

    def are_its_own(self) -> bool:
        """Whether nobody else has drawn since then, of the requests."""
        return self._before is not None and self._alone() == self._before

    def restore(self) -> None:
        """Have the numbers come again that came since then."""
        torch.set_rng_state(self._host_state)
        if self._gpu is not None:
            self._gpu.set_rng_state(self._gpu_state, self._device)
