"""Arguments that several subcommands share, and the argparse types of their values."""

import argparse
from pathlib import Path

from layerstream.stages.text import parse_bytes, parse_rate, parse_size

__all__ = [
    "MODEL_HELP",
    "add_dtype_argument",
    "add_generation_arguments",
    "add_model_arguments",
    "add_output_arguments",
    "add_verify_argument",
    "budget_size",
    "byte_count",
    "byte_rate",
    "non_negative_int",
    "picture_path",
    "positive_float",
    "positive_int",
    "token_ids",
]

MODEL_HELP = "a folder, a weight file (safetensors, or GGUF with any of its parts), a hub id, or ID:FILE.gguf"


def positive_int(text: str) -> int:
    """Parse a whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"not a whole number above zero: {text!r}")
    return int(text)


def non_negative_int(text: str) -> int:
    """Parse a whole number, zero or above."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"not a whole number, zero or above: {text!r}")
    return int(text)


def byte_count(text: str) -> int:
    """Parse a number of bytes, with or without a unit."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def budget_size(text: str) -> str:
    """Check a size, or a share of free memory such as "80%", which ``Budget`` parses."""
    try:
        parse_size(text, of_bytes=1 << 40)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def byte_rate(text: str) -> float:
    """Parse bytes per second, such as "7GB/s"."""
    try:
        return parse_rate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def token_ids(text: str) -> list[int]:
    """Parse token ids with commas between them."""
    return [non_negative_int(part.strip()) for part in text.split(",")]


def picture_path(text: str) -> Path:
    """Parse the path of a .png or .svg file."""
    path = Path(text)
    if path.suffix.lower() not in {".png", ".svg"}:
        raise argparse.ArgumentTypeError(f"not the name of a .png or .svg file: {text!r}")
    return path


def positive_float(text: str) -> float:
    """Parse a finite number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"not a number above zero: {text!r}")
    return number


def add_generation_arguments(
    parser: argparse.ArgumentParser, *, max_new_tokens: int, greedy: bool = True
) -> None:
    """Add the number of new tokens, and how they are sampled: greedily by default, or else as the model's settings say."""
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=max_new_tokens,
        metavar="N",
        help="tokens to generate at most (default: %(default)s)",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--greedy",
        action="store_true",
        help=f"always the likeliest token{' (the default)' if greedy else '; by default as generation_config.json says'}",
    )
    choice.add_argument(
        "--temperature", type=positive_float, metavar="T", help="draw tokens, at this temperature"
    )
    parser.add_argument(
        "--seed",
        type=non_negative_int,
        default=0 if greedy else None,
        help=f"of drawn tokens (default: {0 if greedy else 'any'})",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how a model is streamed: device, budget, reader."""
    parser.add_argument(
        "--device",
        default="auto",
        help="auto (CUDA where there is one, else CPU), cpu, cuda:0, ...",
    )
    parser.add_argument(
        "--vram",
        type=budget_size,
        metavar="SIZE",
        help="VRAM that may be used, such as 4GiB, or 80%% of what is free",
    )
    parser.add_argument(
        "--host", type=budget_size, metavar="SIZE", help="host memory that may be used, likewise"
    )
    parser.add_argument(
        "--reader", choices=["direct", "mmap"], help="how files are read (default: what suits)"
    )
    parser.add_argument(
        "--kernels",
        choices=["auto", "exact", "fused"],
        default="auto",
        help="for packed weights on a CPU: exact gives the bits of transformers, fused is faster for a few tokens and sums in "
        "another order, auto (the default) takes what the plan finds faster",
    )


def add_dtype_argument(parser: argparse._ActionsContainer) -> None:
    """Add what the model computes in."""
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="what weights are loaded as and computed in; auto (the default) is what transformers takes: the checkpoint's own, and "
        "for GGUF float32",
    )


def add_verify_argument(parser: argparse._ActionsContainer) -> None:
    """Add the check of the weight files' content."""
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check the weight files against their recorded SHA-256 digests (those of `layerstream verify --record`, or the hub's) "
        "while the model runs; nothing waits for it",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the form of the output: JSON, logging."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, for machines")
    parser.add_argument("--verbose", action="store_true", help="log what happens to stderr")
