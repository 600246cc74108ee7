"""What travels through the stages: plain data, decided by the plan before anything runs.

A layer batch has two images. The host image has the layout of the files: each read arrives in it unchanged. The
device image has the layout that computation needs. Offsets are bytes from the start of the image.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Self

__all__ = [
    "Extent",
    "LayerBatch",
    "Place",
    "Read",
    "Residence",
    "Segment",
    "TensorView",
    "layers_label",
]


class Place(StrEnum):
    """The image in which a tensor is handed to computation."""

    HOST = "host"
    DEVICE = "device"


class Residence(StrEnum):
    """Which images of a layer batch stay in memory."""

    STREAMED = "streamed"
    """None: every sweep reads it from disk."""
    HOST = "host"
    """The host image: it is read once."""
    DEVICE = "device"
    """The device image: it is read and copied once."""
    BOTH = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A contiguous piece of a weight file."""

    file: int
    """Index into the plan's files."""
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """One contiguous extent of a weight file and its place in the host image.

    ``file_offset`` and ``host_offset`` are multiples of the block size that O_DIRECT wants. ``nbytes`` is
    what the file holds there: a multiple of the block size too, unless the extent ends with the file.
    """

    file: int
    """Index into the plan's files."""
    file_offset: int
    host_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One copy from the host image to the device image. It never spans two reads."""

    host_offset: int
    device_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorView:
    """The place of a tensor in one of the two images, where it is contiguous."""

    name: str
    dtype: str
    """torch's name, e.g. "bfloat16"."""
    shape: tuple[int, ...]
    place: Place
    offset: int
    nbytes: int


def layers_label(layers: Sequence[str]) -> str:
    """The names of the first and the last of ``layers``."""
    first, *rest = layers or ("",)
    return f"{first} to {rest[-1]}" if rest else first


@dataclass(frozen=True, kw_only=True)
class LayerBatch:
    """Consecutive layers that travel as one unit.

    It has no ``__slots__``: what stages need in every sweep is cached, instead of computed from hundreds of
    tensors each time.
    """

    index: int
    """Place in execution order, from 0."""
    layers: tuple[str, ...]
    reads: tuple[Read, ...]
    segments: tuple[Segment, ...]
    tensors: tuple[TensorView, ...]
    host_bytes: int
    """Size of the host image."""
    device_bytes: int
    """Size of the device image; 0 where computation reads only the host image."""
    scratch_bytes: int = 0
    """Bytes of tensors that are made from it before use: casts, transposes."""
    residence: Residence = Residence.STREAMED
    unpacked_bytes: int = 0
    """What its packed weights take unpacked, if they are kept so beside the images; 0: they are not."""

    @property
    def label(self) -> str:
        """The names of its first and last layer."""
        return layers_label(self.layers)

    @property
    def streamed(self) -> bool:
        """Whether every sweep reads the batch from disk."""
        return self.residence is Residence.STREAMED

    @property
    def host_resident(self) -> bool:
        """Whether the host image stays in memory."""
        return self.residence in {Residence.HOST, Residence.BOTH}

    @property
    def device_resident(self) -> bool:
        """Whether the device image stays in memory."""
        return self.residence in {Residence.DEVICE, Residence.BOTH}

    def with_residence(self, residence: Residence, *, unpacked_bytes: int = 0) -> Self:
        """The same bytes in the same places, so that what is cached of them stays."""
        changed = copy(self)
        # It is new, and nobody else has it.
        object.__setattr__(changed, "residence", residence)
        object.__setattr__(changed, "unpacked_bytes", unpacked_bytes)
        return changed

    def residence_on_cpu(self, *, mapped: bool) -> Residence:
        """Its residence where computation reads host images: in all that it reads. A mapping of files takes no memory."""
        if self.uses_host_image and not mapped:
            return Residence.BOTH if self.device_bytes else Residence.HOST
        return Residence.DEVICE if self.device_bytes else Residence.STREAMED

    @cached_property
    def views(self) -> Mapping[Place, tuple[TensorView, ...]]:
        """Its tensors by the image in which computation reads them, without images that have none."""
        places = [place for place in Place if any(view.place is place for view in self.tensors)]
        return {place: tuple(v for v in self.tensors if v.place is place) for place in places}

    @property
    def uses_host_image(self) -> bool:
        """Whether computation reads tensors in the host image, which must then outlast the copy."""
        return Place.HOST in self.views

    @property
    def uses_device_image(self) -> bool:
        """Whether computation reads tensors in the device image."""
        return Place.DEVICE in self.views

    @cached_property
    def read_bytes(self) -> int:
        """Bytes that are read from disk."""
        return sum(read.nbytes for read in self.reads)

    @cached_property
    def copied_bytes(self) -> int:
        """Bytes that are copied from the host image to the device image."""
        return sum(segment.nbytes for segment in self.segments)

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(view.nbytes for view in self.tensors)
