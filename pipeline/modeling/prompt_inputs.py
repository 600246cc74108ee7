"""The inputs of the passes that process a workload's prompt and choose tokens after it, on the meta device."""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerstream.pipeline.modeling.call_arguments import is_encoder_decoder
from layerstream.pipeline.modeling.config import text_config_of
from layerstream.pipeline.modeling.made_up_inputs import media_inputs
from layerstream.pipeline.planning.plan import Workload

__all__ = ["PromptInputs"]

# What configs call the number of positions that a model has.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")
# Some models number positions from 2 on.
_SPARE_POSITIONS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptInputs:
    """Text of the length of a workload, images and sounds, or some of these.

    Generation passes the same, with padding where sequences differ in length.
    """

    module: Any
    workload: Workload
    text: bool
    answer: bool
    """What the model is told where it asks whether a condition on values holds."""
    media: bool
    """Whether each sequence has an image, or a sound of the length of the prompt."""

    @classmethod
    def choices(cls, module: Any, workload: Workload) -> list["PromptInputs"]:
        """Inputs that ``module`` may accept, those that take most memory first; none if it takes no known ones."""
        accepted = inspect.signature(module.forward).parameters
        media = bool(media_inputs(module, rows=1, tokens=1))
        kinds = [(True, True), (True, False)] if media else [(True, False)]
        if "input_ids" not in accepted:
            kinds = []
        if media:
            kinds.append((False, True))
        workloads = [workload]
        if (tokens := _longest_prompt(module, workload)) < workload.prompt_tokens:
            # Passes of what a model has no positions for may fail.
            workloads.append(replace(workload, prompt_tokens=tokens))
        return [
            cls(module=module, workload=each, text=text, media=with_media, answer=answer)
            for each in workloads
            for answer in (True, False)
            for text, with_media in kinds
        ]

    @property
    def has_encoder(self) -> bool:
        """Whether a decoder reads what an encoder makes of the inputs."""
        accepted = inspect.signature(self.module.forward).parameters
        return is_encoder_decoder(self.module) and "decoder_input_ids" in accepted

    def prompt(self) -> dict[str, Any]:
        """The inputs of the pass that processes the prompt."""
        return self._made(self.workload.prompt_tokens, self.workload.prompt_tokens)

    def step(self, cache_argument: str, cache: Any, encoded: torch.Tensor | None) -> dict[str, Any]:
        """The inputs of the pass for the last token.

        Args:
            cache_argument: The name of the argument that takes ``cache``; "" for a model without one.
            cache: What the passes before have cached.
            encoded: The output of the encoder; None without an encoder.
        """
        # A model without a cache computes all tokens again for each one.
        total = self.workload.prompt_tokens + self.workload.new_tokens
        inputs = self._made(1 if cache_argument or self.has_encoder else total, total)
        if cache_argument:
            inputs[cache_argument] = cache
        if cache_argument or encoded is not None:
            for name in media_inputs(self.module, rows=1, tokens=1):
                inputs.pop(name, None)
        if encoded is not None:
            from transformers.modeling_outputs import BaseModelOutput

            inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
            inputs.pop("input_ids", None)
        return inputs

    def _made(self, tokens: int, total_tokens: int) -> dict[str, Any]:
        """The inputs for ``tokens`` new ones of ``total_tokens``."""
        batch, prompt = self.workload.batch_size, self.workload.prompt_tokens
        if self.has_encoder:
            total_tokens = prompt

        def ones(tokens: int) -> torch.Tensor:
            return torch.ones((batch, tokens), dtype=torch.long, device="meta")

        inputs: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
        if self.text:
            inputs |= {"input_ids": ones(tokens), "attention_mask": ones(total_tokens)}
        if self.media:
            inputs |= media_inputs(self.module, rows=batch, tokens=prompt)
        if self.has_encoder:
            inputs["decoder_input_ids"] = ones(1)
        accepted = inspect.signature(self.module.forward).parameters
        return {name: value for name, value in inputs.items() if name in accepted}


def _longest_prompt(module: Any, workload: Workload) -> int:
    """The tokens of the longest prompt that ``module`` has positions for, or of that of ``workload`` if it tells none."""
    config = text_config_of(module.config)
    values = [getattr(config, name, None) for name in _POSITIONS]
    generates = bool(getattr(module, "can_generate", bool)())
    taken = _SPARE_POSITIONS + (workload.new_tokens if generates else 0)
    # At most half of them are left for new tokens.
    left = [max(each - taken, each // 2) for each in values if isinstance(each, int) and each > 1]
    return min(left, default=workload.prompt_tokens)
