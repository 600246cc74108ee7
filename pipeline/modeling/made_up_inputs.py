"""Inputs on the meta device that a model may accept, made up from its config and the signature of its ``forward``."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["made_up_inputs", "media_inputs"]

# Samples per token, where no config tells them: of wav2vec2 and its relatives.
_SAMPLES_PER_TOKEN = 320
_TOKENS = 8
_SECOND_OF_SOUND = 50  # in tokens


def media_inputs(model: Any, *, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """An image and a sound for each of ``rows``, as far as ``model`` accepts them.

    They are as large as its config says. Sounds that may be of any length make ``tokens`` tokens.
    """
    config = model.config
    accepted = inspect.signature(model.forward).parameters
    vision = getattr(config, "vision_config", None) or config
    sizes = [getattr(vision, name, None) for name in ("image_size", "input_size", "img_size")]
    size = next((size for size in sizes if isinstance(size, (int, list, tuple))), 224)
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    channels = _int_setting(vision, "num_channels", 3)
    sound = getattr(config, "audio_config", None) or config
    mel_bins = _int_setting(sound, "num_mel_bins", 80)
    frames = 2 * _int_setting(sound, "max_source_positions", 1500)
    samples = tokens * _int_setting(config, "inputs_to_logits_ratio", _SAMPLES_PER_TOKEN)
    spectrum = _int_setting(config, "max_length", 0) if hasattr(config, "num_mel_bins") else 0
    shapes = {
        "pixel_values": (rows, channels, height, width),
        "input_features": (rows, mel_bins, frames),
        "input_values": (rows, spectrum, mel_bins) if spectrum else (rows, samples),
    }
    return {
        name: torch.ones(shape, dtype=model.dtype, device="meta")
        for name, shape in shapes.items()
        if name in accepted
    }


def made_up_inputs(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs that a forward pass of ``model`` may accept; those with most arguments first."""
    accepted = inspect.signature(model.forward).parameters
    tokens = torch.ones((1, _TOKENS), dtype=torch.long, device="meta")
    text = {"input_ids": tokens} if "input_ids" in accepted else {}
    decoder = {}
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        decoder = {"decoder_input_ids": tokens}
    media = media_inputs(model, rows=1, tokens=_SECOND_OF_SOUND)
    seen = set()
    for inputs in (
        {**text, **decoder, **media},
        {**text, **decoder},
        {**media, **decoder},
        media,
        text,
        {**_to_meta(model.dummy_inputs), **decoder},
    ):
        if inputs and frozenset(inputs) not in seen:
            seen.add(frozenset(inputs))
            yield inputs


def _int_setting(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else default


def _to_meta(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: value.to("meta") for name, value in inputs.items() if isinstance(value, torch.Tensor)
    }
