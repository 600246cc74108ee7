"""Tells a module's place in a forward pass from the words in its name, for any architecture."""

import enum
import re

__all__ = ["Phase", "phase_of_module", "phase_of_stack"]


class Phase(enum.IntEnum):
    """When a module is computed, relative to the other modules of its parent."""

    UNKNOWN = 0
    """Placed before all others, so that it is there when it is needed."""
    INPUT = 1
    TOWER = 2
    """Vision and audio."""
    TOWER_EXIT = 3
    ENCODER = 4
    BRIDGE = 5
    """From towers and encoders to the language model, or from one width to another."""
    DECODER = 6
    OUTPUT = 7
    HEAD = 8


# fmt: off
_TOWER = {"vision", "visual", "image", "images", "video", "audio", "speech", "sound"}
_DECODER = {"decoder", "language", "llm", "lm"}
_INPUT = {
    "conv", "feature", "in", "input", "patch", "pos", "position", "positional", "positions", "pre",
    "rotary", "shared", "stem", "tok", "token", "tokens", "wpe", "wte",
}
_BRIDGE = ("project", "proj", "connector", "merger", "adapter", "aligner", "resampler", "bridge")
_OUTPUT = {"final", "ln", "pooler", "pooling", "post"}
_OUT = {"out", "output", "outputs"}
_HEAD = {
    "classification", "classifier", "classifiers", "fc", "head", "heads", "logits", "loss", "pred",
    "prediction", "predictions", "score", "scores", "unembed", "unembedding", "vocab",
}
_HEAD_NAMES = {"cls", "embed_out"}
# fmt: on


def phase_of_module(name: str, *, in_tower: bool = False) -> Phase:
    """Return the phase of a module (or bare tensor) that has no blocks in it.

    Args:
        name: The last part of its dotted path.
        in_tower: Whether it is inside a tower; outside, "vision_proj" leads out of one.
    """
    words = _words(name)
    norm = "norm" in name.lower() or "ln" in words
    bridge = any(part in name.lower() for part in _BRIDGE)
    if words & _HEAD or name in _HEAD_NAMES:
        phase = Phase.HEAD
    elif words & _OUT:
        phase = Phase.OUTPUT if norm or bridge else Phase.HEAD
    elif words & _TOWER and not in_tower:
        phase = Phase.TOWER_EXIT
    elif words & _INPUT or "emb" in name.lower():
        phase = Phase.INPUT
    elif bridge:
        phase = Phase.BRIDGE
    elif norm or words & _OUTPUT:
        phase = Phase.OUTPUT
    else:
        phase = Phase.UNKNOWN
    return phase


def phase_of_stack(name: str) -> Phase:
    """Return the phase that one part of a stack's path indicates, UNKNOWN if none."""
    words = _words(name)
    if words & _DECODER:
        phase = Phase.DECODER
    elif words & _TOWER:
        phase = Phase.TOWER
    elif "encoder" in words:
        phase = Phase.ENCODER
    elif words & _INPUT or "emb" in name.lower():
        phase = Phase.INPUT
    elif any(part in name.lower() for part in _BRIDGE):
        phase = Phase.BRIDGE
    else:
        phase = Phase.UNKNOWN
    return phase


def _words(name: str) -> set[str]:
    """Return the words of a name: {"conv", "out"} for "conv1_out"."""
    return set(re.split("[_0-9]+", name.lower()))
