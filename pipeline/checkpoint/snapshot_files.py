"""The files that a model, or an adapter alone, needs of a repository."""

import json
from collections.abc import Sequence
from pathlib import Path

from layerstream.pipeline.checkpoint.weight_choice import WeightChoice

__all__ = ["ADAPTER_CONFIG_FILE", "ADAPTER_WEIGHT_FILES", "CONFIG_FILE", "missing_files"]

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def missing_files(snapshot: Path, files: Sequence[str], choice: WeightChoice) -> list[str]:
    """Return the files that ``snapshot`` should have and does not: ``files``, or a whole model if there are none.

    A link to a blob that was deleted from the cache counts as missing.
    """
    if files:
        return [name for name in files if not (snapshot / name).is_file()]
    missing = [] if (snapshot / CONFIG_FILE).is_file() else [CONFIG_FILE]
    if missing and (snapshot / ADAPTER_CONFIG_FILE).is_file():
        has_weights = any((snapshot / name).is_file() for name in ADAPTER_WEIGHT_FILES)
        return [] if has_weights else [ADAPTER_WEIGHT_FILES[0]]
    for known in choice.formats:
        index = snapshot / str(choice.name(known.index_file))
        if known.index_file and index.is_file():
            break
        single = choice.name(known.single_file)
        any_name = known.of_any_name and choice.variant is None
        pattern = f"*{known.suffixes[0]}" if any_name else single
        if single and any(path.is_file() for path in snapshot.glob(str(pattern))):
            return missing
    else:
        return [*missing, choice.name("*.safetensors") or ""]
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return missing + [shard for shard in shards if not (snapshot / shard).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return missing  # not a valid index: Checkpoint.open refuses it, and says why
