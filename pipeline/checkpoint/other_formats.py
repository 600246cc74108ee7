"""Files that hold weights for others: what they are, and what to do instead."""

from collections.abc import Sequence
from pathlib import Path

from layerstream.pipeline.checkpoint.formats.registry import FORMATS
from layerstream.stages.errors import CheckpointError

__all__ = ["no_weights_message", "refuse_compiled_file", "refuse_other_framework"]

_SUPPORTED = " or ".join(known.single_file or f"*{known.suffixes[0]}" for known in FORMATS)
_UNSUPPORTED = (".ckpt", ".h5", ".msgpack", ".npz")
_HOW_TO_CONVERT = (
    "convert it: load it with transformers' from_pretrained(), and write it with save_pretrained()"
)
# What was made of weights for one program alone: files, and folders.
_COMPILED = {
    ".onnx": "ONNX Runtime",
    ".mlpackage": "Core ML",
    ".mlmodel": "Core ML",
    "openvino_model.xml": "OpenVINO",
    ".tflite": "LiteRT",
    ".litertlm": "LiteRT",
    ".task": "MediaPipe",
    ".pte": "ExecuTorch",
    ".engine": "TensorRT",
    ".llamafile": "llamafile",
}


def refuse_compiled_file(path: Path) -> None:
    """Refuse a file that was made for one program alone.

    Raises:
        CheckpointError: It names the program.
    """
    if program := _program_of(path.name):
        raise CheckpointError(
            f"{path} is for {program} alone: download the weights that it was made from."
        )


def refuse_other_framework(path: Path) -> None:
    """Refuse a file of weights of another framework.

    Raises:
        CheckpointError: It says how to convert it.
    """
    if path.name.lower().endswith(_UNSUPPORTED):
        raise CheckpointError(f"{path} is not supported: {_HOW_TO_CONVERT}.")


def no_weights_message(path: Path, names: Sequence[str]) -> str:
    """What is wrong with a folder in which ``names`` are, without weights that are read."""
    unsupported = next((name for name in names if name.lower().endswith(_UNSUPPORTED)), None)
    if unsupported:
        return (
            f"{path} holds no {_SUPPORTED}, and {unsupported} is not supported: {_HOW_TO_CONVERT}."
        )
    for name in names:
        if program := _program_of(name):
            return (
                f"{path} holds no {_SUPPORTED}, but {name}, which only {program} runs: download the weights that it was "
                "made from."
            )
    return f"{path} holds no weights: give the folder that {_SUPPORTED} is in, or download the model again."


def _program_of(name: str) -> str | None:
    """The program that a file of this name was made for, if it is no checkpoint."""
    found = (program for end, program in _COMPILED.items() if name.lower().endswith(end))
    return next(found, None)
