"""The fault matrix of devices: each call of a device or a computation that can fail, at each moment in the life of a model.

The caller has the error itself, in time. After a fault that passes, the same model, reopened where its pipeline has failed, generates
what it generated before; in any case closing it leaves nothing behind.
"""

import gc

import pytest
import torch
from support.gpus import StandIn
from support.leaks import nothing_left_behind, our_tasks
from support.loop import run, turns
from support.models import inputs_for, save_model
from support.selection import covering
from transformers.models.llama.modeling_llama import LlamaMLP

from layerstream.pipeline import Budget, ClosedError, DeviceError, StreamedModel, Workload

LAYERS = 6
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS}
GREEDY = {"do_sample": False, "max_new_tokens": 3}
IDS = inputs_for("llama")["input_ids"]

METHODS = {
    "page-locking": "host_memory",
    "device memory": "device_memory",
    "copy": "copy",
    "event": "record",
    "wait": "wait",
    "time of an event": "passed_at",
    "trim": "trim",
    "drain": "drain",
    "compute": "compute",
}
ALWAYS = 10_000
FAULTS = {
    f"{name} {'once' if times == 1 else 'always'}": (method, times)
    for name, method in METHODS.items()
    for times in (1, ALWAYS)
}
# Before which call of the MLP of a layer the fault begins, counted from the start of a generation; the others by name.
MOMENTS = {
    "opening": "opening",
    "first batch": 0,
    "middle": LAYERS // 2,
    "wrap-around": 2 * LAYERS - 1,
    "idle": "idle",
    "replanning": "replanning",
    "closing": "closing",
}


class Fault:
    """Lets a device, or the computation of a layer, fail at the next calls once it has struck."""

    def __init__(self, device, method, times, monkeypatch):
        self.left, self.times, self.raised = 0, times, 0
        self.at = None  # which call of an MLP
        self.calls = 0
        mlp = LlamaMLP.forward

        def compute(module, x):
            if self.calls == self.at:
                self.strike()
            self.calls += 1
            if method == "compute":
                self.fail()
            return mlp(module, x)

        monkeypatch.setattr(LlamaMLP, "forward", compute)
        if method != "compute":
            works = getattr(device, method)

            def call(*args, **named):
                self.fail()
                return works(*args, **named)

            monkeypatch.setattr(device, method, call)

    def strike(self):
        self.left = self.times

    def end(self):
        self.left, self.at = 0, None

    def check(self, error):
        """Raise what is none of its errors."""
        if not self.raised or "the device has failed" not in str(error):
            raise error

    def fail(self):
        if self.left:
            self.left -= 1
            self.raised += 1
            raise DeviceError("the device has failed")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A llama, the budget with which two of its layers are resident, and what it generates."""
    folder = save_model(tmp_path_factory.mktemp("devices") / "model", "llama", **SIZE)
    with pytest.MonkeyPatch.context() as patch:
        StandIn(patch)

        async def look():
            for _ in range(2):
                async with opened(folder, None) as model:
                    plan, tokens = model.plan, await model.generate(IDS, **GREEDY)
            largest = max(batch.device_bytes for batch in plan.batches)
            host = plan.host_memory.reserved_bytes + 4 * max(b.host_bytes for b in plan.batches)
            vram = plan.device_memory.reserved_bytes + 5 * largest
            return Budget(vram=vram, host=host), tokens

        budget, tokens = run(look())
    return folder, budget, tokens


def opened(folder, budget):
    return StreamedModel.open(
        folder,
        device="cuda:0",
        layer_batch_size=1,
        slots=2,
        workload=Workload(prompt_tokens=8, new_tokens=8),
        measure=False,
        budget=budget,
    )


async def generated(model, fault, expected):
    """Generate; whether it succeeded, and then with equal tokens."""
    fault.calls = 0
    try:
        assert torch.equal(await model.generate(IDS, **GREEDY), expected)
    except (DeviceError, ClosedError) as error:  # ClosedError: it has failed before
        fault.check(error)
        return False
    return True


async def use(model, fault, moment, expected):
    """Open ``model``, and use it, with the fault at ``moment``."""
    if moment == "opening":
        fault.strike()
    async with model:
        if isinstance(moment, int):
            fault.at = moment
        assert await generated(model, fault, expected) or fault.raised
        await turns()
        if moment == "idle":
            fault.strike()
            await generated(model, fault, expected)
        elif moment == "replanning":
            fault.strike()
            larger = model.plan.device_memory.budget_bytes + (1 << 20)
            try:
                await model.replan(budget=Budget(vram=larger, host=model.plan.budget.host))
            except (DeviceError, ClosedError) as error:
                fault.check(error)
        lasts = fault.times == ALWAYS
        if not lasts:
            fault.end()
        if model.failure is not None:
            try:
                await model.reopen()
            except DeviceError:
                assert lasts
        assert await generated(model, fault, expected) or lasts
        if moment == "closing":
            fault.strike()


@covering(fault=FAULTS, moment=MOMENTS)
@pytest.mark.filterwarnings("ignore:module forward hook")  # torch warns of the second error
def test_the_caller_has_the_error_and_after_a_fault_that_passes_the_model_goes_on(
    made, monkeypatch, fault, moment
):
    folder, budget, expected = made
    device = StandIn(monkeypatch).opened
    free = device.free_bytes()

    async def main():
        struck = Fault(device, *fault, monkeypatch)
        model = opened(folder, budget)
        try:
            await use(model, struck, moment, expected)
        except DeviceError as error:  # of opening, or of closing, which has freed everything
            struck.check(error)
            if moment not in {"opening", "closing"} and fault[1] != ALWAYS:
                raise
        await model.aclose()
        assert our_tasks() == []

    with nothing_left_behind():
        run(main(), seconds=60)
    assert device.host_memories == 0
    gc.collect()  # of an error in closing, whose frames have the memory
    assert device.free_bytes() == free
