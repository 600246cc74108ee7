"""What the parameters of a GGUF model are made of: transformers' own loading of it, with tracers for tensors.

transformers has two loaders of GGUF. The newer, for few architectures, unpacks in the dtype of the model and has
conversions of tensors, like those for safetensors; the older unpacks in float32 with the gguf package, turns arrays of
numpy about, and casts. Which of them from_pretrained takes for a file is its decision, and so are all names.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint, TensorInfo
from layerstream.pipeline.modeling.gguf_reading import quick_headers, require_gguf_packages
from layerstream.pipeline.modeling.replacing import for_this_thread
from layerstream.pipeline.modeling.traced_array import TracedArray
from layerstream.pipeline.modeling.tracer_tensor import Tracer
from layerstream.pipeline.modeling.unpacking import unpacked
from layerstream.stages.unpack.gguf import GGUF_BLOCKS, GgufPacking
from layerstream.stages.unpack.packing import Packing

__all__ = ["load_gguf_tracers"]

Arithmetic = Literal["float32", "target"]

# Of a reference's operations at a time: their intermediate results take some MiB, whatever the matrix.
_REFERENCE_COLUMNS = 1 << 16


def load_gguf_tracers(checkpoint: Checkpoint, loader: type[Any], **kwargs: Any) -> Any:
    """Let transformers load a GGUF model whose tensors are tracers; ``kwargs`` are from_pretrained's."""
    from transformers import GgufConfig

    require_gguf_packages(checkpoint.path)
    file = checkpoint.files[0].path
    with quick_headers(checkpoint), _tracers_for_tensors(checkpoint):
        # Where there are kernels for packed weights, they would stay packed in modules of transformers' own.
        return loader.from_pretrained(
            str(file.parent),
            gguf_file=str(file),
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            **kwargs,
        )


@contextmanager
def _tracers_for_tensors(checkpoint: Checkpoint) -> Iterator[None]:
    """Let this thread's loading of GGUF get tracers in the place of tensors, and record what it does to them."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as older
    from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

    def state_dict(self: Any, file: str, model: Any) -> Mapping[str, torch.Tensor]:
        if self.supported:
            self.quantized = {}  # unpacked already
            _keep_permutations(self.mapping)
            return {
                name: _values(info, "target", self.dtype)
                for name, info in checkpoint.tensors.items()
            }
        with (
            for_this_thread(gguf.GGUFReader, "_build_tensors", tensors),
            for_this_thread(gguf, "dequantize", values),
            # Made anew for every module, this is most of the time of loading.
            for_this_thread(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
            for_this_thread(torch, "from_numpy", _tensor_of),
            for_this_thread(torch, "zeros", lambda shape, **_: _JoinedTensor(shape)),
            for_this_thread(older, "tqdm", lambda each, **_: each),
        ):
            found: Mapping[str, Any] = read_state_dict(self, file, model)
        return {
            name: tensor.joined() if isinstance(tensor, _JoinedTensor) else tensor
            for name, tensor in found.items()
        }

    def tensors(reader: Any, *_: Any) -> None:
        reader.tensors = [
            SimpleNamespace(name=name, data=info, tensor_type=None)
            for name, info in checkpoint.tensors.items()
        ]

    def values(info: TensorInfo, _kind: Any) -> TracedArray:
        return TracedArray(_values(info, "float32", torch.float32))

    with for_this_thread(GgufHfQuantizer, "get_state_dict", state_dict) as read_state_dict:
        yield


def _tensor_of(array: Any) -> Any:
    return array.tensor if isinstance(array, TracedArray) else torch.as_tensor(array)


def _keep_permutations(conversions: Sequence[Any]) -> None:
    """Let conversions that permute rows or columns keep their indices, which they would move to the tracers' device."""
    operations = (each for entry in conversions for each in getattr(entry, "operations", ()))
    for operation in operations:
        indices = getattr(operation, "permutation", None)
        if isinstance(indices, torch.Tensor):
            operation.permutation = SimpleNamespace(to=lambda _device, indices=indices: indices)


class _JoinedTensor:
    """A tensor that is made empty and then filled part by part: gates and ups of experts are two in GGUF, not one."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self._parts: dict[int, torch.Tensor] = {}
        self._dimension = 0

    def narrow(self, dimension: int, start: int, _length: int) -> SimpleNamespace:
        """As torch's; what it returns can only be written to."""
        self._dimension = dimension
        return SimpleNamespace(copy_=lambda tensor: self._parts.__setitem__(start, tensor))

    def joined(self) -> torch.Tensor:
        """All parts, in order."""
        return torch.cat([self._parts[start] for start in sorted(self._parts)], self._dimension)


def _values(info: TensorInfo, arithmetic: Arithmetic, dtype: torch.dtype) -> Any:
    """The tracer of a tensor's values: of float32, or as they are stored for arithmetic in another dtype."""
    source = Tracer.source(info.name, shape=info.shape, dtype=getattr(torch, info.dtype))
    if info.encoding is None:
        if not source.dtype.is_floating_point or source.dtype == torch.float64:
            raise NotImplementedError(
                f"tensor {info.name} is of type {info.dtype}, which transformers does not load"
            )
        return source.float() if arithmetic == "float32" else source
    shape = info.logical_shape
    return unpacked(
        [source],
        _packing_of(info.encoding, shape[-1], arithmetic),
        shape=shape,
        dtype=dtype,
        on_device=_OnDevice(info.encoding, shape, dtype),
    )


def _packing_of(encoding: str, columns: int, arithmetic: Arithmetic) -> Packing:
    """Our kernel for an encoding, or transformers' function."""
    if encoding in GGUF_BLOCKS:
        return GgufPacking(encoding=encoding, columns=columns, arithmetic=arithmetic)
    return _ReferencePacking(encoding=encoding, arithmetic=arithmetic)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReferencePacking:
    """A matrix of GGUF blocks that there is no kernel of ours for: unpacked by the functions that transformers uses."""

    encoding: str
    arithmetic: Arithmetic

    def unpack(self, parts: Sequence[torch.Tensor], first: int, out: torch.Tensor) -> None:
        """See ``Packing``."""
        rows = parts[0].reshape(-1, parts[0].shape[-1])[first : first + len(out)]
        step = max(1, _REFERENCE_COLUMNS // out.shape[-1])
        for start in range(0, len(rows), step):
            out[start : start + step] = self._values(rows[start : start + step], out.dtype)

    def multiply(
        self, parts: Sequence[torch.Tensor], first: int, inputs: torch.Tensor, out: torch.Tensor
    ) -> None:
        """See ``Packing``: nothing is faster here than unpacking."""
        rows = torch.empty(out.shape[1], inputs.shape[1])
        self.unpack(parts, first, rows)
        torch.mm(inputs, rows.T, out=out)

    def _values(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        import gguf

        kind = gguf.GGMLQuantizationType[self.encoding]
        if self.arithmetic == "float32":
            return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), kind))
        return _OnDevice(self.encoding, (len(rows), -1), dtype)(rows)


@dataclass(frozen=True, slots=True)
class _OnDevice:
    """transformers' unpacking by operations of torch, on any device."""

    encoding: str
    shape: Sequence[int]
    dtype: torch.dtype

    def __call__(self, packed: torch.Tensor) -> torch.Tensor:
        import gguf
        from transformers.integrations.gguf import dequant

        kind = gguf.GGMLQuantizationType[self.encoding]
        if int(kind) in dequant.GGML_BLOCK:
            return dequant.dequantize(packed, int(kind), self.dtype).reshape(tuple(self.shape))
        values = torch.from_numpy(gguf.quants.dequantize(packed.cpu().numpy(), kind))
        return values.to(packed.device, self.dtype).reshape(tuple(self.shape))
