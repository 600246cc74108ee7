"""Which GGUF files of a folder are the model: one file, or one in parts."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from layerstream.stages.errors import CheckpointError
from layerstream.stages.text import first_names

__all__ = ["all_parts", "choose_files"]

# "name-00001-of-00003.gguf", as llama.cpp's gguf-split names them.
_PART = re.compile(r"(?P<model>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


def choose_files(path: Path, names: Sequence[str]) -> Sequence[str]:
    """See ``Format.choose``: all parts of the model that ``path`` is a part of, or that the folder holds."""
    if path.name in names and not path.is_dir():
        return all_parts(path.name)
    models: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if not _is_projector(name):
            part = _PART.fullmatch(name)
            models[f"{part['model']} of {part['count']}" if part else name].append(name)
    if not models:
        raise CheckpointError(
            f"{path} holds no GGUF model, only the part of one that looks at images "
            f"({', '.join(names)}): download the model itself."
        )
    if len(models) > 1:
        choices = [parts[0] for parts in models.values()]
        raise CheckpointError(
            f"{path} holds {len(models)} GGUF models ({first_names(choices, 12)}): open one of these files "
            "instead of the folder."
        )
    return all_parts(next(iter(models.values()))[0])


def _is_projector(name: str) -> bool:
    """Whether a file is no language model, but what one of llama.cpp's looks at images with."""
    return "mmproj" in name.lower()


def all_parts(name: str) -> Sequence[str]:
    """The names of all files of the model that a file is a part of, in order."""
    part = _PART.fullmatch(name)
    if part is None:
        return (name,)
    count = int(part["count"])
    return tuple(
        f"{part['model']}-{number:05}-of-{part['count']}.gguf" for number in range(1, count + 1)
    )
