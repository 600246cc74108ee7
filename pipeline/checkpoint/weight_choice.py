"""Which of a model's weights are wanted, where a folder or repository holds several."""

from collections.abc import Sequence
from dataclasses import dataclass

from layerstream.pipeline.checkpoint.formats.format import Format
from layerstream.pipeline.checkpoint.formats.registry import FORMATS
from layerstream.pipeline.checkpoint.formats.safetensors import SAFETENSORS

__all__ = ["ANY_WEIGHTS", "WeightChoice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightChoice:
    """Arguments of ``from_pretrained`` that choose among files of weights."""

    variant: str | None = None
    """Files such as ``model.<variant>.safetensors`` are wanted; None for those without a variant."""
    use_safetensors: bool | None = None
    """True: files of safetensors only; False: none of them."""

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats that may be read, the preferred one first."""
        return tuple(
            known
            for known in FORMATS
            if self.use_safetensors in {None, known is SAFETENSORS}
            and (self.variant is None or known.single_file is not None)
        )

    def name(self, name: str | None) -> str | None:
        """The name that ``name`` has in this variant: as transformers says it, before the last suffix."""
        if name is None or self.variant is None:
            return name
        stem, _, suffix = name.rpartition(".")
        return f"{stem}.{self.variant}.{suffix}"

    def __str__(self) -> str:
        """The arguments that were given, for messages."""
        given = [
            f"{name}={value!r}"
            for name, value in (
                ("variant", self.variant),
                ("use_safetensors", self.use_safetensors),
            )
            if value is not None
        ]
        return " and ".join(given)

    def missing_message(self, path: object, names: Sequence[str]) -> str:
        """Why a folder with files of these names does not have what is wanted."""
        wanted = " or ".join(
            str(self.name(known.single_file)) for known in self.formats if known.single_file
        )
        weights = [
            name
            for name in names
            if any(name.lower().endswith(known.suffixes) for known in FORMATS)
        ]
        found = f"it has {', '.join(weights[:4])}" if weights else "it has no weights"
        return f"{path} holds no {wanted or 'weights'}, which {self} asks for: {found}."


ANY_WEIGHTS = WeightChoice()
