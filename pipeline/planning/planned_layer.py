"""A layer as the planner sees it: its tensors, where they are in the files, and what computation multiplies with. Plain data."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.checkpoint.packed_form import PackedForm
from layerstream.pipeline.planning.expert_source import ExpertSource
from layerstream.stages.batch import Extent

__all__ = ["LayerWeights", "PackedBytes", "PlannedLayer", "TensorSource"]

_EXPERT = re.compile(r"(^|\.)experts?(\.|$)")
_MATRIX_DIMENSIONS = 2


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """A tensor as computation needs it, and the extents of files that it consists of, in order.

    It has no ``__slots__``, so that its bytes are counted once, not for each plan that is considered.
    """

    name: str
    dtype: str
    """torch's name, e.g. "bfloat16"."""
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    """One, unless the tensor is fused from several."""
    copied: bool = False
    """Whether transformers computes with a copy of it, which needs an aligned place of its own."""
    packed: PackedForm | None = None
    """How it is packed, if it is."""

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return sum(extent.nbytes for extent in self.extents)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """A layer with everything that is needed to place it. It has no ``__slots__`` for the same reason."""

    name: str
    kind: LayerKind
    tensors: tuple[TensorSource, ...]
    scratch_bytes: int = 0
    """Tensors that computation makes from them before use."""
    tile_bytes: int = 0
    """What packed weights are unpacked into piece by piece, or what unpacking takes besides ``scratch_bytes``."""
    once_bytes: int = 0
    """What its packed weights take unpacked."""
    always_resident: bool = False
    """Whether it must be resident: computation uses it more than once, or at an unknown time."""
    experts: tuple[ExpertSource, ...] = ()
    """Experts that are read on demand; not among ``tensors``."""

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def weights(self) -> "LayerWeights":
        """What computation multiplies with."""
        plain = experts = 0
        packed: dict[str, PackedBytes] = {}
        packed_experts: Counter[str] = Counter()
        for tensor in self.tensors:
            form, is_expert = tensor.packed, _EXPERT.search(tensor.name)
            nbytes = tensor.nbytes * (len(tensor.shape) >= _MATRIX_DIMENSIONS)
            if form is not None:
                nbytes = form.plain_bytes
                if is_expert:
                    packed_experts[form.encoding] += tensor.nbytes
                else:
                    before = packed.get(form.encoding, PackedBytes(0, 0))
                    packed[form.encoding] = before.plus(PackedBytes(tensor.nbytes, nbytes))
            if is_expert:
                experts += nbytes
            else:
                plain += nbytes
        for source in self.experts:
            for part in source.tensors:
                nbytes = part.nbytes
                if part.packed is not None:
                    packed_experts[part.packed.encoding] += source.experts * nbytes
                    nbytes = part.packed.plain_bytes
                experts += source.experts * nbytes
        return LayerWeights(
            dense_bytes=plain, expert_bytes=experts, packed=packed, packed_experts=packed_experts
        )


class PackedBytes(NamedTuple):
    """Bytes of packed weights."""

    packed: int
    plain: int
    """Unpacked."""

    def plus(self, other: "PackedBytes") -> "PackedBytes":
        """The sum of both."""
        return PackedBytes(self.packed + other.packed, self.plain + other.plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """What a layer computes with."""

    dense_bytes: int
    """Of matrices that every token is multiplied with, unpacked."""
    expert_bytes: int
    """Of all experts, unpacked."""
    packed: Mapping[str, PackedBytes]
    """Of what is not an expert, by encoding."""
    packed_experts: Mapping[str, int]
    """Packed bytes of all experts, by encoding."""
