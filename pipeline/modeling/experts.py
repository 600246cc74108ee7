"""Modules that compute with experts on demand: with those that tokens are routed to, when they have been read.

transformers' expert modules hold all experts of a layer in a few parameters, whose first dimension counts experts, and
compute with them through interchangeable implementations. Here such a module computes with a *bank*: tensors over cells of
the expert store. Results equal those of the whole parameters bit for bit.
"""

import functools
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from layerstream.pipeline.modeling.edits import refuse_replaced
from layerstream.pipeline.modeling.expert_banks import Bank, Banks, StoredBanks
from layerstream.pipeline.modeling.expert_choices import ExpertChoices
from layerstream.pipeline.modeling.expert_sources import EXACT_IMPLEMENTATIONS
from layerstream.pipeline.modeling.packed_banks import PackedBanks
from layerstream.pipeline.modeling.packed_experts import (
    EAGER,
    PackedParameter,
    are_multiplied_packed,
)
from layerstream.pipeline.modeling.packed_tiles import Tiles
from layerstream.stages.errors import ModelError
from layerstream.stages.experts.expert_set import ExpertSet
from layerstream.stages.experts.lease import ExpertGroup, Lease, SharedDemand, WaitFor
from layerstream.stages.experts.store import ExpertStore
from layerstream.stages.experts.usage import ExpertDemand

__all__ = ["expert_store", "stream_experts"]


def stream_experts(
    root: nn.Module,
    sets: Sequence[ExpertSet],
    store: ExpertStore,
    *,
    waiting: Callable[[], AbstractContextManager[WaitFor]],
    packed: Mapping[str, Sequence[PackedParameter]] = MappingProxyType({}),
    tiles: Tiles | None = None,
    fused_tokens: int = 0,
) -> None:
    """Let the modules of ``sets`` compute with the experts in ``store``.

    Args:
        root: The module tree, which may be cloned afterwards.
        sets: Those of the plan, in the store's order.
        store: Open.
        waiting: Entered by the calling thread while it waits for experts, with what it yields.
        packed: Parameters that are packed, by the paths of the modules.
        tiles: What those are unpacked into.
        fused_tokens: Passes of up to so many tokens multiply with those without unpacking.
    """
    for index, experts in enumerate(sets):
        module: Any = root.get_submodule(experts.module)
        banks: Banks = StoredBanks(experts.tensors, is_transposed=module.is_transposed)
        if parameters := packed.get(experts.module):
            assert tiles is not None  # noqa: S101
            fused = are_multiplied_packed(module, parameters, experts.tensors)
            most = fused_tokens if fused else 0
            banks = PackedBanks(experts.tensors, parameters, tiles, fused_tokens=most)
        vars(module)["layerstream_experts"] = _Access(
            store, index, experts, module=module, waiting=waiting, banks=banks
        )
        kind: Any = type(module)
        module.__class__ = _streamed(kind)


def expert_store(root: nn.Module) -> ExpertStore | None:
    """The store that modules of ``root`` compute from; None if none of them reads experts on demand."""
    module = next((each for each in root.modules() if isinstance(each, _StreamedExperts)), None)
    return None if module is None else module.layerstream_experts.store


class _Access:
    """How one module gets at its experts; shared by all clones of the module."""

    def __init__(
        self,
        store: ExpertStore,
        index: int,
        experts: ExpertSet,
        *,
        module: nn.Module,
        waiting: Callable[[], AbstractContextManager[WaitFor]],
        banks: Banks,
    ) -> None:
        self.store = store
        self.index = index
        self.set = experts
        self._waiting = waiting
        self.banks = banks
        names = {view.name.partition(":")[0] for view in experts.tensors}
        self.parameters = {name: getattr(module, name) for name in names}

    def leases(
        self, groups: Sequence[ExpertGroup], *, in_order: bool = False, tokens: int = 0
    ) -> Generator[Lease]:
        """The cells of each group when they are filled, while those of the next one are being filled if there is memory.

        Args:
            groups: All that a pass needs.
            in_order: In this order; otherwise of what is passing, what other passes have read comes first.
            tokens: Of the pass: before the last group the next layer may be read ahead.
        """
        passing = [e for group in groups if group.passing for e in group.experts]
        demand = SharedDemand(self.index, [] if in_order else passing)
        with ExitStack() as held:
            held.callback(self.store.leave, demand)
            leases = self._untaken(groups, demand, in_order=in_order)
            current = next(leases, None)
            while current is not None:
                held.callback(current.release)  # releasing one again does nothing
                if not self.store.take(current, wait_for=None):
                    with self._waiting() as wait_for:  # which raises if the request is cancelled
                        self.store.take(current, wait_for=wait_for)
                upcoming = next(leases, None)
                # Not waited for: two passes that hold cells and wait for the other's would wait for ever.
                if upcoming is not None:
                    held.callback(upcoming.release)
                    self.store.take(upcoming, wait_for=None)
                elif tokens:
                    self.store.read_ahead(self.index + 1, tokens=tokens)
                if current.ready:
                    current.wait()
                else:
                    with self._waiting() as wait_for:
                        current.wait(wait_for)
                yield current
                current.release()
                current = upcoming

    def _untaken(
        self, groups: Sequence[ExpertGroup], demand: SharedDemand, *, in_order: bool
    ) -> Generator[Lease]:
        """Leases of the groups, each of which is taken, or tried to be, before the next one is asked for."""
        for group in groups:
            if in_order or not group.passing:
                yield self.store.lease(group)
        while demand.wanted or demand.held:
            yield self.store.lease(demand.next_group(1), demand)


class _OnDemand:
    """A parameter of a module in its eager implementation, which takes one expert after the other out of it."""

    def __init__(self, name: str, experts: "_InTurn") -> None:
        self._name = name
        self._experts = experts

    def __getitem__(self, expert: Any) -> torch.Tensor:
        return self._experts.tensor(self._name, int(expert))


class _InTurn:
    """The experts of an eager computation: group after group, in ascending order."""

    def __init__(self, access: _Access, experts: Sequence[int]) -> None:
        self._access = access
        self._leases = access.leases(
            access.store.groups(access.index, experts, in_order=True), in_order=True
        )
        self._lease: Lease | None = None
        self._expert = -1
        self._banks: Generator[Bank] | None = None
        self._bank: Bank | None = None

    def tensor(self, name: str, expert: int) -> torch.Tensor:
        """The tensor of ``expert``; the ones before it in the order are gone when its group comes."""
        if self._bank is None or expert != self._expert:
            self._close_bank()
            while self._lease is None or expert not in self._lease.group.experts:
                self._lease = next(self._leases, None)
                if self._lease is None:
                    raise ModelError(
                        f"{self._access.set.module} takes expert {expert} out of order, which cannot be read on demand: "
                        "open the model with experts_implementation='batched_mm'"
                    )
            self._banks = self._access.banks.of_expert(self._lease, expert)
            self._bank, self._expert = next(self._banks), expert
        place = self._bank.places[self._bank.experts.index(expert)]
        return self._bank.tensors[name][place]

    def _close_bank(self) -> None:
        if self._banks is not None:
            self._banks.close()
        self._banks = self._bank = None

    def close(self) -> None:
        """Give all cells back."""
        self._close_bank()
        self._leases.close()


class _StreamedExperts(nn.Module):
    """Goes in front of a class of transformers: computes with experts that are read when they are needed."""

    layerstream_experts: _Access
    layerstream_signature: inspect.Signature

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As the class's own."""
        bound = self.layerstream_signature.bind(self, *inputs, **named)
        _, hidden, index, weights = bound.args
        access = self.layerstream_experts
        choices = ExpertChoices(index)
        experts = choices.experts
        if experts and not (experts[0] >= 0 and experts[-1] < access.set.experts):
            raise ModelError(
                f"{access.set.module} has {access.set.experts} experts, but tokens were routed to expert "
                f"{experts[0] if experts[0] < 0 else experts[-1]}: the router's weights do not fit the experts"
            )
        refuse_replaced(self, access.parameters, access.set.module)
        if not experts:  # no tokens
            return torch.zeros_like(hidden)
        access.store.count(ExpertDemand(access.index, len(index), tuple(experts)))
        name = getattr(self.config, "_experts_implementation", None)
        if name in EAGER:
            return self._one_by_one(experts, hidden, index, weights)
        if name not in EXACT_IMPLEMENTATIONS:
            raise ModelError(
                f"{access.set.module} reads its experts on demand, which gives equal results with the implementations "
                f"grouped_mm and eager, not with {name}; open the model with experts_implementation={name!r}"
            )
        groups = access.store.groups(access.index, experts)
        with closing(access.leases(groups, tokens=len(index))) as leases:
            for lease in leases:
                with closing(access.banks.of(lease, tokens=len(index))) as banks:
                    for bank in banks:
                        choices.compute(self, bank, hidden)
        return choices.summed(weights, hidden.dtype)

    def _one_by_one(self, experts: Sequence[int], hidden: Any, index: Any, weights: Any) -> Any:
        """The class's own loop over experts, which adds to the result in their order."""
        access = self.layerstream_experts
        in_turn = _InTurn(access, experts)
        bank = {name: _OnDemand(name, in_turn) for name in access.parameters}
        own = vars(self)
        parameters = own["_parameters"]  # shared by all clones; from here on, this one has its own
        own["_parameters"] = {**parameters, **bank}
        try:
            return super().forward(hidden, index, weights)
        finally:
            own["_parameters"] = parameters
            in_turn.close()


@functools.cache
def _streamed(kind: type[Any]) -> type[Any]:
    """The class ``kind`` with experts on demand."""
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    names["layerstream_signature"] = inspect.signature(kind.forward)
    return type(kind.__name__, (_StreamedExperts, kind), names)
