"""transformers' and gguf's readers of GGUF headers, made quick, and made to see all parts of a model.

gguf's reader makes several objects of each entry of a vocabulary, which takes 20 seconds for 260,000. A model in several
files is one that transformers does not know: it reads the first.
"""

import importlib.util
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.replacing import for_this_thread
from layerstream.stages.errors import ModelError

__all__ = ["load_gguf_tokenizer", "quick_headers", "require_gguf_packages"]

# Shorter arrays hold values per layer, which configs are made from; longer ones are vocabularies, of which configs
# only have the length.
_MAX_VALUES = 4096


def require_gguf_packages(path: Path) -> None:
    """Refuse a GGUF model if packages that transformers needs for it are not there.

    Raises:
        ModelError: One is missing.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"{path} is a GGUF model, for which transformers needs {' and '.join(missing)}: "
            "pip install 'layerstream[hf]'."
        )


@contextmanager
def quick_headers(checkpoint: Checkpoint) -> Iterator[None]:
    """Let readers of ``checkpoint``'s first file skip its vocabulary, and see the tensors of all its parts."""
    import gguf
    from transformers.integrations.gguf import reader as own_reader

    others = [info for info in checkpoint.tensors.values() if info.file]
    with ExitStack() as stack:

        def tensors(self: Any, start: int, fields: Any) -> None:
            read_tensors(self, start, fields)
            self.tensors += [SimpleNamespace(name=info.name) for info in others]

        def table(*args: Any) -> Any:
            entries, end = read_table(*args)
            types = {kind.name: int(kind) for kind in gguf.GGMLQuantizationType}
            names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
            return entries + [
                (each.name, each.logical_shape, types[each.encoding or names[each.dtype]], 0)
                for each in others
            ], end

        def parts(self: Any, at: int, kind: int) -> Any:
            return _long_array(self, at, kind) or read_parts(self, at, kind)

        enter = stack.enter_context
        read_tensors = enter(for_this_thread(gguf.GGUFReader, "_build_tensors", tensors))
        read_parts = enter(for_this_thread(gguf.GGUFReader, "_get_field_parts", parts))
        read_table = enter(for_this_thread(own_reader, "_read_tensor_table", table))
        yield


def load_gguf_tokenizer(checkpoint: Checkpoint) -> Any | None:
    """The transformers tokenizer in a GGUF model, with its special tokens and chat template; None if it has none.

    Raises:
        ModelError: A package is missing. transformers raises errors of other types about tokenizers that it cannot make.
    """
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.reader import read_gguf_metadata

    require_gguf_packages(checkpoint.path)
    file = checkpoint.files[0].path
    metadata, _ = read_gguf_metadata(str(file))
    if "tokenizer.ggml.model" not in metadata:
        return None
    with quick_headers(checkpoint):
        return AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True
        )


def _long_array(reader: Any, at: int, kind: int) -> Any:
    """The fields of a long array: of strings, as many empty ones; of numbers, none. None for any other value."""
    import gguf

    if kind != gguf.GGUFValueType.ARRAY:
        return None
    content = memoryview(reader.data)
    item, count = struct.unpack_from("<IQ", content, at)
    if count <= _MAX_VALUES or item == gguf.GGUFValueType.ARRAY:
        return None
    end = at + 12
    if item == gguf.GGUFValueType.STRING:
        for _ in range(count):
            end += 8 + struct.unpack_from("<Q", content, end)[0]
        # A type that transformers does not know it leaves as it is, half a million times.
        return end - at, [""], [0] * count, [None]
    end += count * np.dtype(reader.gguf_scalar_to_np[gguf.GGUFValueType(item)]).itemsize
    return end - at, [], [], [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(item)]
