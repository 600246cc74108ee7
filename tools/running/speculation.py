"""Speculation as a switch: several tokens are guessed and verified in one sweep."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerstream.stages.errors import ModelError

__all__ = ["Speculation", "add_speculation_argument", "load_speculation"]

LOOKUP = "lookup"

# A sweep costs the same with some tokens more, and a wrong guess costs little.
_GUESSED_TOKENS = 10


def add_speculation_argument(parser: argparse.ArgumentParser) -> None:
    """Add the switch."""
    parser.add_argument(
        "--speculate",
        metavar="lookup|MODEL",
        help="guess tokens and verify several in one sweep: from repetitions in the text (lookup), or with a "
        "small model of the same vocabulary, which is loaded beside the budget",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How tokens are guessed."""

    assistant: Any | None
    """A small model that guesses them; None to look them up in the text."""

    def options(self) -> dict[str, Any]:
        """Options of one ``generate``."""
        if self.assistant is None:
            return {"prompt_lookup_num_tokens": _GUESSED_TOKENS}
        from layerstream.pipeline.modeling.clone import clone_modules

        # One for each request: it adapts the number of tokens that it guesses.
        return {"assistant_model": clone_modules(self.assistant)}

    def check(self, module: Any) -> None:
        """Raise a ModelError if the assistant cannot guess the tokens of ``module``."""
        if self.assistant is None:
            return
        sizes = [each.config.get_text_config().vocab_size for each in (self.assistant, module)]
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"The model of --speculate has a vocabulary of {sizes[0]} tokens, and this one {sizes[1]}; give one of the "
                "same family, or 'lookup'."
            )


def load_speculation(given: str | None, *, device: str) -> Speculation | None:
    """What ``--speculate`` asks for; None for no speculation. To be called before the streamed model is opened.

    Raises:
        ModelError: The assistant cannot be loaded.
    """
    if given is None:
        return None
    if given == LOOKUP:
        return Speculation(assistant=None)
    from transformers import AutoModelForCausalLM

    from layerstream.pipeline.checkpoint.hub import resolve_model_path
    from layerstream.stages.devices.lookup import open_device

    path: Path = resolve_model_path(given)
    try:
        assistant: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"The model of --speculate, {given}, cannot be loaded: {error}") from error
    assistant.eval().to(open_device(device).torch_device)
    return Speculation(assistant=assistant)
