"""What a converted weight consists of, and how it is computed: with the functions of compressed-tensors."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch

from layerstream.pipeline.checkpoint.formats.safetensors_writing import StoredTensor
from layerstream.stages.errors import CheckpointError

__all__ = ["EncodedRows", "Encoding", "Target"]

_WORD_BITS = 32
_DTYPES = ("bfloat16", "float16", "float32")
_INT4_GROUP = 128


class Target(StrEnum):
    """The numbers that weights are rounded to."""

    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


class EncodedRows(NamedTuple):
    """Some rows of a weight, converted."""

    parts: dict[str, torch.Tensor]
    """By ``StoredTensor.name``, the same rows of each part; the shape is not among them."""
    squared_error: float
    """The sum of the squares of what conversion changed."""
    squared_weight: float
    """The sum of the squares of the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """A form of weights: symmetric, with a scale for each row or for each group of a row."""

    target: Target
    group_size: int | None
    """Consecutive values of a row that share a scale; None: all of the row."""

    @classmethod
    def of(cls, target: Target, group_size: int | str | None = None) -> "Encoding":
        """The form for ``target``.

        Args:
            target: The numbers.
            group_size: Values that share a scale, "channel" for a whole row, or None for what is usual.

        Raises:
            CheckpointError: There is no such form.
        """
        if group_size is None:
            group_size = _INT4_GROUP if target is Target.INT4 else "channel"
        if target is Target.FP8 and group_size != "channel":
            raise CheckpointError(
                "fp8 has one scale for each row, so --group-size has no meaning for it; leave it out, or "
                "convert to int8 or int4."
            )
        return cls(target=target, group_size=None if group_size == "channel" else int(group_size))

    @property
    def packs(self) -> bool:
        """Whether several values share a word of 32 bits."""
        return self.target is not Target.FP8

    @property
    def bits(self) -> int:
        """Of a value."""
        return 4 if self.target is Target.INT4 else 8

    @property
    def _settings(self) -> dict[str, Any]:
        """In the words of compressed-tensors."""
        return {
            "num_bits": self.bits,
            "type": "int" if self.packs else "float",
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "symmetric": True,
            "dynamic": False,
        }

    def config(self, ignore: tuple[str, ...]) -> dict[str, Any]:
        """The quantization_config of a config.json; ``ignore``: the linear layers that stay as they are."""
        group = {
            "targets": ["Linear"],
            "weights": self._settings,
            "input_activations": None,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized" if self.packs else "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
        }

    def obstacle(self, dtype: str, columns: int) -> str | None:
        """Why a weight of this dtype and so many columns cannot be converted; None if it can."""
        if dtype not in _DTYPES:
            return f"of dtype {dtype}"
        if not columns:
            return "empty"
        if self.group_size is not None and columns % self.group_size:
            return f"columns are no multiple of the group size, {self.group_size}"
        if self.packs and columns % (_WORD_BITS // self.bits):
            return f"columns are no multiple of {_WORD_BITS // self.bits}"
        return None

    def parts(self, dtype: str, rows: int, columns: int) -> tuple[StoredTensor, ...]:
        """What a weight of this dtype and shape is stored as."""
        scale = StoredTensor("weight_scale", dtype, (rows, columns // (self.group_size or columns)))
        if not self.packs:
            return StoredTensor("weight", "float8_e4m3fn", (rows, columns)), scale
        packed = (rows, columns * self.bits // _WORD_BITS)
        return (
            StoredTensor("weight_packed", "int32", packed),
            scale,
            StoredTensor("weight_shape", "int64", (2,)),
        )

    def encode(self, weight: torch.Tensor) -> EncodedRows | None:
        """Convert some rows of a weight; None if not all of its values are finite.

        Scales are those of compressed-tensors in the weight's dtype. Values are divided by them in 32 bits, since 16 bits
        would round the quotients before they are rounded to the nearest number, and of two nearest to the even one.
        """
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
        from compressed_tensors.quantization import QuantizationArgs, dequantize, quantize
        from compressed_tensors.quantization.utils import calculate_qparams

        arguments = QuantizationArgs(**self._settings)
        groups = weight.view(len(weight), -1, self.group_size or weight.shape[1])
        least, most = groups.amin(-1), groups.amax(-1)
        if not (least.isfinite().all() and most.isfinite().all()):
            return None
        scale, _ = calculate_qparams(least, most, arguments)
        exact = weight.float()
        numbers = quantize(exact, scale.float(), None, arguments, dtype=arguments.pytorch_dtype())
        difference = dequantize(numbers, scale, None, arguments).float() - exact
        parts = {"weight_scale": scale}
        if self.packs:
            parts["weight_packed"] = pack_to_int32(numbers, self.bits)
        else:
            parts["weight"] = numbers
        return EncodedRows(parts, _sum_of_squares(difference), _sum_of_squares(exact))


def _sum_of_squares(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
