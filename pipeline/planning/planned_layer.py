"""A layer as the planner sees it: its tensors, where they are in the files, and what computation multiplies with. Plain data."""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import torch

from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.checkpoint.packed_form import PackedForm
from layerstream.pipeline.planning.expert_source import ExpertSource
from layerstream.stages.batch import Extent

__all__ = ["LayerWeights", "PlannedLayer", "TensorSource"]

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
    exact_tile_bytes: int = 0
    """The same for exact kernels, if that is more: where products by tiles have other bits, prompts need whole matrices."""
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
        found = LayerWeights()
        for tensor in self.tensors:
            plain = tensor.nbytes * (len(tensor.shape) >= _MATRIX_DIMENSIONS)
            if _EXPERT.search(tensor.name):
                found.add_experts(tensor.packed, tensor.nbytes, plain)
            elif tensor.packed is None:
                found.dense_bytes += plain
            else:
                found.dense_bytes += tensor.packed.plain_bytes
                found.packed[tensor.packed.encoding] += tensor.nbytes
                found.packed_matrices += tensor.packed.plain_bytes > 0
                found.unpacked[tensor.packed.encoding] += tensor.packed.plain_bytes
        for source in self.experts:
            for part in source.tensors:
                found.add_experts(part.packed, part.nbytes, part.nbytes, source=source)
        return found


@dataclass(slots=True, kw_only=True)
class LayerWeights:
    """What a layer computes with."""

    dense_bytes: int = 0
    """Of matrices that every token is multiplied with, unpacked."""
    expert_bytes: int = 0
    """Of all experts, unpacked."""
    packed: Counter[str] = field(default_factory=Counter)
    """Packed bytes of what is not an expert, by encoding."""
    unpacked: Counter[str] = field(default_factory=Counter)
    """The same unpacked."""
    packed_matrices: int = 0
    """How many those are."""
    packed_experts: Counter[str] = field(default_factory=Counter)
    """Packed bytes of all experts, by encoding."""
    packed_expert_matrices: int = 0
    """How many matrices those are."""
    unpacked_experts: Counter[str] = field(default_factory=Counter)
    """The same unpacked, of those that are read on demand."""

    def add_experts(
        self,
        form: PackedForm | None,
        nbytes: int,
        plain_bytes: int,
        *,
        source: ExpertSource | None = None,
    ) -> None:
        """Count a tensor of all experts, or of each of those that are read on demand.

        Args:
            form: If it is packed.
            nbytes: As it is stored.
            plain_bytes: If it is not packed.
            source: The experts that are read on demand.
        """
        count = 1 if source is None else source.experts
        if form is not None:
            plain_bytes = form.plain_bytes
            self.packed_experts[form.encoding] += count * nbytes
            self.packed_expert_matrices += count * (plain_bytes > 0)
            if source is not None and source.is_multiplied_packed:
                self.unpacked_experts[form.encoding] += count * plain_bytes
        self.expert_bytes += count * plain_bytes
