"""Experts on demand: which modules of a model can compute with experts that come when tokens are routed to them, and how.

transformers' expert modules hold all experts of a layer in a few parameters, whose first dimension counts experts, and
compute with them through interchangeable implementations. Here such a module computes with a *bank*: tensors over cells of
the expert store, with the experts renumbered. Results equal those of the whole parameters bit for bit.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.model_layers import Use
from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.tracing import TracedModel
from layerstream.pipeline.planning.expert_source import ExpertSource, ExpertTensor
from layerstream.stages.batch import Extent
from layerstream.stages.errors import ModelError
from layerstream.stages.experts.cells import CellRegion
from layerstream.stages.experts.expert_set import ExpertSet
from layerstream.stages.experts.store import ExpertGroup, ExpertStore, Lease

__all__ = ["expert_sources", "stream_experts"]

# What transformers' decorator for expert modules sets on each of them, and what all of them have.
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
# Kernels are chosen by the addresses of matrices modulo this, so experts have to lie as in the whole parameter.
_ALIGNMENT = 64
_EAGER = {None, "eager"}


# -- which ------------------------------------------------------------------------------------------


def expert_sources(
    traced: TracedModel, checkpoint: Checkpoint, uses: Mapping[str, Sequence[Use]]
) -> dict[str, ExpertSource]:
    """The modules whose experts can be read one by one, by their paths.

    They are those of transformers' registry of implementations, with parameters that loading only puts together from runs of
    the files' bytes. Others are streamed whole: who multiplies with all experts at once, and whose parameters take
    computation (transposing, unpacking).
    """
    found = {}
    for path, module in traced.module.named_modules():
        if not all(hasattr(module, mark) for mark in _MARKS):
            continue
        if not hasattr(type(module).forward, "__wrapped__"):  # not decorated
            continue
        names = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        single = all(len(uses.get(name, ())) == 1 for name in names)
        if not names or not single:
            continue
        tensors = [
            _tensor_of(traced.recipes[name], module.num_experts, checkpoint) for name in names
        ]
        if all(tensor is not None for tensor in tensors):
            found[path] = ExpertSource(
                module=path,
                experts=module.num_experts,
                per_token=_per_token(module),
                tensors=tuple(tensor for tensor in tensors if tensor is not None),
            )
    return found


def _per_token(module: Any) -> int:
    config = module.config
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return 0


def _tensor_of(recipe: Recipe, experts: int, checkpoint: Checkpoint) -> ExpertTensor | None:
    """The tensor of ``recipe`` cut into experts; None if that cannot be done with equal bits."""
    if recipe.pieces is None or not recipe.shape or recipe.shape[0] != experts:
        return None
    whole = sum(piece.nbytes for piece in recipe.pieces)
    nbytes = whole // experts
    if not nbytes or (len(recipe.shape) > 2 and nbytes % _ALIGNMENT):  # noqa: PLR2004
        return None
    extents: list[list[Extent]] = [[] for _ in range(experts)]
    for piece in recipe.pieces:
        info = checkpoint.tensors[piece.source]
        at, stop = piece.offset, piece.offset + piece.nbytes
        while at < stop:
            expert = at // nbytes
            end = min(stop, (expert + 1) * nbytes)
            offset = info.offset + piece.source_offset + at - piece.offset
            extents[expert].append(Extent(file=info.file, offset=offset, nbytes=end - at))
            at = end
    sizes = {tuple(extent.nbytes for extent in each) for each in extents}
    if len(sizes) != 1:
        return None
    # 0: transformers computes with it where it lies in the mapped file; anything else has memory of its own.
    shift = extents[0][0].offset % _ALIGNMENT if recipe.scratch_bytes == 0 else 0
    return ExpertTensor(
        name=recipe.name.rpartition(".")[2],
        dtype=recipe.dtype,
        shape=recipe.shape[1:],
        nbytes=nbytes,
        extents=tuple(map(tuple, extents)),
        shift=shift,
    )


# -- how --------------------------------------------------------------------------------------------


def stream_experts(
    root: nn.Module,
    sets: Sequence[ExpertSet],
    store: ExpertStore,
    *,
    waiting: Callable[[], AbstractContextManager[None]],
) -> None:
    """Let the modules of ``sets`` compute with the experts in ``store``.

    Args:
        root: The module tree, which may be cloned afterwards.
        sets: Those of the plan, in the store's order.
        store: Open.
        waiting: Entered by the calling thread while it waits for experts.
    """
    for index, experts in enumerate(sets):
        module = root.get_submodule(experts.module)
        vars(module)["layerstream_experts"] = _Access(store, index, experts, waiting)
        module.__class__ = _streamed(type(module))


class _Access:
    """How one module gets at its experts; shared by all clones of the module."""

    def __init__(
        self,
        store: ExpertStore,
        index: int,
        experts: ExpertSet,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.store = store
        self.index = index
        self.set = experts
        self._waiting = waiting
        self._banks: dict[int, dict[str, nn.Parameter]] = {}

    def groups(self, experts: Sequence[int], *, in_order: bool) -> list[ExpertGroup]:
        """What to compute with together; ``in_order``: only ascending experts from group to group."""
        if not in_order:
            return self.store.groups(self.index, experts)
        size = max(self.set.cells, 1)
        return [
            ExpertGroup(
                set_index=self.index, experts=tuple(experts[at : at + size]), streamed=False
            )
            for at in range(0, len(experts), size)
        ]

    def leases(self, groups: Sequence[ExpertGroup]) -> Iterator[Lease]:
        """The cells of each group when they are filled, while those of the next one are being filled if there is memory."""
        upcoming: Lease | None = None
        try:
            for group, later in zip(groups, [*groups[1:], None], strict=True):
                current, upcoming = upcoming, None
                if current is None:
                    with self._waiting():
                        current = self.store.take(group)
                assert current is not None  # noqa: S101
                try:
                    # Not waited for: two passes that hold cells and wait for the other's would wait for ever.
                    upcoming = self.store.take(later, wait=False) if later is not None else None
                    if not current.ready:
                        with self._waiting():
                            current.wait()
                    else:
                        current.wait()
                    yield current
                finally:
                    current.release()
        finally:
            if upcoming is not None:
                upcoming.release()

    def bank(self, region: CellRegion) -> Mapping[str, nn.Parameter]:
        """The module's parameters over the cells of ``region``, in place of its experts."""
        if id(region) not in self._banks:
            with torch.inference_mode(mode=False):
                self._banks[id(region)] = {
                    view.name: nn.Parameter(region.strided(view), requires_grad=False)
                    for view in self.set.tensors
                }
        return self._banks[id(region)]


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
        self._leases = access.leases(access.groups(experts, in_order=True))
        self._cells: dict[int, int] = {}
        self._bank: Mapping[str, nn.Parameter] = {}

    def tensor(self, name: str, expert: int) -> torch.Tensor:
        """The tensor of ``expert``; the ones before it in the order are gone when its group comes."""
        while expert not in self._cells:
            lease = next(self._leases)
            self._cells = dict(zip(lease.group.experts, lease.cells, strict=True))
            self._bank = self._access.bank(lease.region)
        return self._bank[name][self._cells[expert]]

    def close(self) -> None:
        """Give all cells back."""
        self._leases.close()  # type: ignore[attr-defined]


class _StreamedExperts(nn.Module):
    """Goes in front of a class of transformers: computes with experts that are read when they are needed."""

    layerstream_experts: _Access
    layerstream_signature: inspect.Signature

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As the class's own."""
        bound = self.layerstream_signature.bind(self, *inputs, **named)
        _, hidden, index, weights = bound.args
        access = self.layerstream_experts
        experts = torch.unique(index).tolist()
        if experts and not (experts[0] >= 0 and experts[-1] < access.set.experts):
            raise ModelError(
                f"{access.set.module} has {access.set.experts} experts, but tokens were routed to expert "
                f"{experts[0] if experts[0] < 0 else experts[-1]}: the router's weights do not fit the experts"
            )
        if getattr(self.config, "_experts_implementation", None) in _EAGER:
            return self._one_by_one(experts, hidden, index, weights)
        groups = access.groups(experts, in_order=False)
        if len(groups) == 1:
            for lease in access.leases(groups):
                return self._together(lease, hidden, index, weights)
        return self._in_groups(groups, hidden, index, weights)

    @contextmanager
    def _computing_with(self, bank: Mapping[str, Any], experts: int) -> Iterator[None]:
        own = vars(self)
        parameters = own["_parameters"]
        own["_parameters"] = {**parameters, **bank}
        self.num_experts = experts
        try:
            yield
        finally:
            own["_parameters"] = parameters
            self.num_experts = self.layerstream_experts.set.experts

    def _together(self, lease: Lease, hidden: Any, index: Any, weights: Any) -> Any:
        """One computation with all experts that are needed."""
        access = self.layerstream_experts
        numbers = torch.zeros(access.set.experts, dtype=index.dtype, device=index.device)
        numbers[list(lease.group.experts)] = torch.tensor(
            lease.cells, dtype=index.dtype, device=index.device
        )
        with self._computing_with(access.bank(lease.region), lease.region.count):
            return super().forward(hidden, numbers[index], weights)

    def _in_groups(
        self, groups: Sequence[ExpertGroup], hidden: Any, index: Any, weights: Any
    ) -> Any:
        """One computation for each group, of the tokens that are routed to it; summed at the end as in one."""
        access = self.layerstream_experts
        tokens, per_token = index.shape
        chosen = index.reshape(-1)
        results: torch.Tensor | None = None
        for lease in access.leases(groups):
            member = torch.zeros(access.set.experts, dtype=torch.bool, device=index.device)
            member[list(lease.group.experts)] = True
            places = member[chosen].nonzero().squeeze(1)
            # Each choice of a token as a token of its own with one choice, of weight one: what a sum of one leaves unchanged.
            part = self._together(
                lease,
                hidden[places // per_token],
                chosen[places].unsqueeze(1),
                torch.ones((len(places), 1), dtype=weights.dtype, device=weights.device),
            )
            if results is None:
                dtype = next(iter(access.bank(lease.region).values())).dtype
                results = torch.zeros(
                    (len(chosen), part.shape[-1]), dtype=dtype, device=part.device
                )
            results[places] = part.to(results.dtype)
        if results is None:  # no tokens
            return torch.zeros_like(hidden)
        weighted = results * weights.reshape(-1, 1)
        return weighted.view(tokens, per_token, -1).sum(dim=1).to(hidden.dtype)

    def _one_by_one(self, experts: Sequence[int], hidden: Any, index: Any, weights: Any) -> Any:
        """The class's own loop over experts, which adds to the result in their order."""
        access = self.layerstream_experts
        in_turn = _InTurn(access, experts)
        bank = {view.name: _OnDemand(view.name, in_turn) for view in access.set.tensors}
        try:
            with self._computing_with(bank, access.set.experts):
                return super().forward(hidden, index, weights)
        finally:
            in_turn.close()


_CLASSES: dict[type[Any], type[Any]] = {}


def _streamed(kind: type[Any]) -> type[Any]:
    """The class ``kind`` with experts on demand."""
    if kind not in _CLASSES:
        names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        names["layerstream_signature"] = inspect.signature(kind.forward)
        _CLASSES[kind] = type(kind.__name__, (_StreamedExperts, kind), names)
    return _CLASSES[kind]
