"""Inputs of tiny models, found by the names of their arguments."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["inputs_of"]

_OTHERS = ("pixel_values", "input_features", "input_values", "bbox")
_GRIDS = ("grid_thw", "image_grid_thw")
# What goes with another input, though it may be left out.
_BESIDE = (
    *("spatial_shapes", "pixel_attention_mask", "pixel_position_ids", "input_features_mask"),
    *("actions", "rewards", "returns_to_go", "timesteps"),
)
# The side of a picture in patches, and its patches.
_SIDE = 4
_PATCHES = _SIDE**2


def inputs_of(model: Any, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs that the model may take, the most complete first."""
    taken = inspect.signature(model.forward).parameters
    makers = _makers(model.config, dtype, set(taken))
    main = getattr(model, "main_input_name", "input_ids")
    needed = [
        name
        for name, each in taken.items()
        if each.default is inspect.Parameter.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    mains = [main] if isinstance(main, str) else list(main)
    wanted = [name for name in dict.fromkeys([*mains, *needed]) if name in makers]
    decoder = [name for name in ("decoder_input_ids",) if name in taken]
    text = [name for name in ("input_ids",) if name in taken]
    pictures = [name for name in ("pixel_values",) if name in taken]
    beside = [name for name in _BESIDE if name in taken and not text]
    encoded = [name for name in ("encoder_hidden_states",) if name in taken]
    all_of_them = [*text, *(name for name in _OTHERS if name in taken)]
    tried: list[list[str]] = []
    for names in (
        [*wanted, *all_of_them],
        [*wanted, *text, *pictures],
        [*wanted, *decoder],
        [*all_of_them, *decoder],
        *([name, *decoder] for name in _OTHERS if name in taken and decoder),
        wanted,
        [*wanted, *beside],
        [*wanted, *encoded],
        [*text, *decoder],
        text,
        pictures,
    ):
        if (unique := list(dict.fromkeys(names))) and unique not in tried:
            tried.append(unique)
    if pictures and text:
        yield from _with_pictures(model, makers)
    for names in tried:
        variants = max(len(makers[name]) for name in names)
        for number in range(variants):
            yield {name: makers[name][min(number, len(makers[name]) - 1)] for name in names}


def _with_pictures(model: Any, makers: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Text with as many tokens of a picture as it has features."""
    token = getattr(
        model.config, "image_token_id", getattr(model.config, "image_token_index", None)
    )
    if token is None or not hasattr(model, "get_image_features"):
        return
    taken = inspect.signature(model.get_image_features).parameters
    beside = {name: makers[name][0] for name in ("image_grid_thw",) if name in taken}
    for pixels in makers["pixel_values"]:
        try:
            with torch.no_grad():
                features = model.get_image_features(pixel_values=pixels, **beside)
        except Exception:  # noqa: BLE001, S112 - the next picture may be one that it takes
            continue
        features = getattr(features, "pooler_output", features)
        if isinstance(features, list | tuple):
            features = torch.cat([each.reshape(-1, each.shape[-1]) for each in features])
        if isinstance(features, torch.Tensor):
            count = features.numel() // features.shape[-1]
            ids = makers["input_ids"][0]
            ids = torch.cat([ids[:, :3], torch.full((1, count), token), ids[:, 3:]], dim=1)
            kinds = {"mm_token_type_ids": (ids == token).int()}
            kinds = (
                kinds if "mm_token_type_ids" in inspect.signature(model.forward).parameters else {}
            )
            yield {"input_ids": ids, "pixel_values": pixels, **beside, **kinds}


def _makers(config: Any, dtype: torch.dtype, taken: set[str]) -> dict[str, list[torch.Tensor]]:
    """For each name of an input the tensors that may be it."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(5, most, shape, generator=generator)

    def setting(default: int, *names: str) -> Any:
        return _setting(config, names, default)

    most = max(6, min(60, setting(128, "vocab_size")))
    sizes = setting(64, "image_size", "input_size")
    pair = [sizes, sizes] if isinstance(sizes, int) else list(sizes)[-2:]
    width = setting(32, "hidden_size", "d_model", "embed_dim", "hidden_dim")
    pictures, videos = _pictures(config, noise, pair)
    if taken.intersection((*_GRIDS, "spatial_shapes", "pixel_position_ids")):
        pictures = _patches(config, noise, batch="grid_thw" not in " ".join(taken))
    series = _series(config, noise)
    cells = torch.cartesian_prod(torch.arange(_SIDE), torch.arange(_SIDE))
    patches = torch.cat([cells + 1, noise(_PATCHES, 3 * _side(config) ** 2)], dim=1)
    masked = torch.arange(setting(0, "seq_length") or _positions(config, pair)) % 2 == 0
    return {
        **_sounds(config, noise),
        **series,
        "input_ids": [ids(1, 9)],
        "decoder_input_ids": [ids(1, 4)],
        "qformer_input_ids": [ids(1, 9)],
        "task_inputs": [ids(1, setting(9, "task_seq_len"))],
        "labels": [ids(1, 9)],
        "bbox": [torch.tensor([[[10, 10, 40, 40]] * 9])],
        "pixel_values": [*pictures, *videos],
        "pixel_values_videos": videos,
        "prompt_pixel_values": pictures,
        "prompt_masks": pictures,
        "pixel_mask": [torch.ones(1, *pair, dtype=torch.long)],
        "bool_masked_pos": [masked[None]],
        **{name: [torch.tensor([[1, _SIDE, _SIDE]])] for name in _GRIDS},
        "merge_sizes": [torch.tensor([1])],
        "spatial_shapes": [torch.tensor([[_SIDE, _SIDE]])],
        "pixel_attention_mask": [torch.ones(1, _PATCHES, dtype=torch.long)],
        "pixel_position_ids": [cells[None]],
        "flattened_patches": [patches[None]],
        "hidden_states": [*_patches(config, noise, batch=False), *_hidden(noise, width)],
        "latents": _hidden(noise, width),
        "inputs_embeds": _hidden(noise, width),
        "query_embeds": _hidden(noise, width),
        "encoder_hidden_states": _hidden(noise, setting(width, "encoder_hidden_size")),
        "state": [noise(1, setting(17, "max_state_dim"))],
        "states": [noise(1, 5, setting(17, "state_dim"))],
        "actions": [noise(1, 5, setting(4, "act_dim"))],
        "rewards": [noise(1, 5, 1)],
        "returns_to_go": [noise(1, 5, 1)],
        "timesteps": [torch.arange(5)[None]],
    }


def _pictures(config: Any, noise: Any, pair: list[int]) -> tuple[list[Any], list[Any]]:
    """Pictures, and videos."""
    channels = _channels(config, "num_channels", "in_channels", "in_chans")
    shapes = (
        (channels, *pair),
        (3, 64, 64),
        (3, 224, 224),
        (3, 48, 320),
        (3, pair[0] // 2, pair[1]),
    )
    pictures = [noise(1, *shape) for shape in shapes]
    frames = (_setting(config, ("num_frames",), 4), 16, 2)
    return pictures, [noise(1, each, channels, *pair) for each in frames]


def _patches(config: Any, noise: Any, *, batch: bool) -> list[Any]:
    """A picture in patches, as models take it that are told its grid."""
    channels = _channels(config, "in_channels", "in_chans", "num_channels")
    side = _side(config)
    frames = _setting(config, ("temporal_patch_size", "patch_temporal"), 1)
    area = side**2
    if batch:
        return [noise(1, _PATCHES, channels * area)]
    return [
        noise(_PATCHES, channels * frames * area),
        noise(_PATCHES, channels, side, side),
        noise(_PATCHES, channels * area),
    ]


def _channels(config: Any, *names: str) -> int:
    """Of a picture; some settings of these names are lists, of layers."""
    channels = _setting(config, names, 3)
    return channels if isinstance(channels, int) else 3


def _side(config: Any) -> int:
    """Of a patch, in pixels."""
    side = _setting(config, ("patch_size",), 16)
    return int(side if isinstance(side, int | float) else side[-1])


def _hidden(noise: Any, width: int) -> list[Any]:
    return [noise(1, 9, width), noise(1, width, 9)]


def _positions(config: Any, pair: list[int]) -> int:
    """The number of patches of a video, or of a picture."""
    side = _side(config)
    frames = _setting(config, ("num_frames",), 1) // _setting(config, ("tubelet_size",), 1)
    return int(frames * (pair[0] // side) * (pair[1] // side))


def _series(config: Any, noise: Any) -> dict[str, list[Any]]:
    past = _setting(config, ("context_length",), 16)
    lags = max(getattr(config, "lags_sequence", None) or [0])
    return {
        "past_values": [noise(1, past + lags), noise(1, past, 7), noise(1, past, 1)],
        "past_time_features": [noise(1, past + lags, getattr(config, "num_time_features", 0))],
        "past_observed_mask": [torch.ones(1, past + lags)],
    }


def _sounds(config: Any, noise: Any) -> dict[str, list[Any]]:
    """Waves, spectra and codes."""
    names = ("num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", "input_dim")
    bins = _setting(config, ("feature_projection_input_dim", *names), 80)
    frames = 2 * _setting(config, ("max_source_positions",), 32)
    length = _setting(config, ("max_length",), frames)
    spectra = [
        noise(1, bins, frames),
        noise(1, frames, bins),
        noise(1, 128, frames),
        noise(1, bins, 200),
        noise(1, 1, 1024, bins),
    ]
    return {
        "input_features": spectra,
        "input_features_mask": [
            torch.ones(1, max(each.shape[1:]), dtype=torch.long) for each in spectra
        ],
        "audio_mel": [spectra[1]],
        "audio_mel_mask": [torch.zeros(1, frames, dtype=torch.bool)],
        "input_values": [
            noise(1, 4000),
            noise(1, 1, 4000),
            noise(1, frames, bins),
            noise(1, length, bins),
        ],
        "audio_codes": [torch.randint(5, 60, (1, 1, 9))],
        "waveform": [noise(1, 4000)],
        "spectrogram": [noise(1, frames, bins)],
    }


def _setting(config: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of ``names`` that the config or a part of it has."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for part in parts:
        for name in names:
            if (value := getattr(part, name, None)) is not None:
                return value
    return default
