"""Tiny models of any architecture: the default config of its class with smaller sizes, found by the names of its settings."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

__all__ = ["NotTinyError", "inputs_of", "model_classes", "tiny_models"]

# The first of these mappings that names a class for an architecture gives the one to try: what generates goes first.
_LAST = ("MULTIPLE_CHOICE", "MODEL")
_FIRST = (
    *("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM"),
    *("TEXT_TO_WAVEFORM", "CAUSAL_LM", "MASKED_LM", "PRETRAINING", "CTC"),
)
_LAYERS = re.compile(
    r"(^|_)(n_?|num_)?(hidden_)?layers?(_\w+)?$|^depth$|_depth$|num_blocks$|n_layer$"
)
_IS_NO_NUMBER_OF_LAYERS = re.compile(
    r"kernel|_dim|size|_idx|index|_ids?$|shared|start|drop|type|feature|offset|period"
)
_DIM = re.compile(
    r"size|dim|width|channels?|hidden|model|embd|inner|ff|rank|filters|latents?$|head$|^d_"
)
_NOT_SCALED = re.compile(
    r"patch|image|kernel|chunk|window|num_channels|in_chan|batch|group|stride|sampl|codebook|vocab|resolution|temporal"
    r"|position|grid|pool|block_size|max_|crop|frame|type_vocab|num_mel"
)
_HEADS = re.compile(r"(^|_)heads?$|_heads_|n_head(_kv)?$")
_OF_A_HEAD = re.compile(r"head_dim|kv_channels|d_kv|rope_\w*dim|rotary_dim|_d?_?head$|head_size")
_KEPT = frozenset(
    {"rope_parameters", "rope_scaling", "quantization_config", "id2label", "label2id"}
)

_VOCAB, _FIRST_SPECIAL, _MOST_LAYERS = 128, 100, 4
# What a setting becomes at most, by the first pattern that its name matches.
_MOST = (
    (re.compile(r"offset"), 1),
    (re.compile(r"kv_shared_layers"), 1),
    (re.compile(r"(^|_)vocab_size|vocab_size$|^vocab|_vocab$"), _VOCAB),
    (re.compile(r"(^|_)(num|n|moe_num)_(routed_|local_)?experts$"), 4),
    (re.compile(r"per_tok(en)?$|^(moe_)?top_?k$|^moe_k$|num_selects$"), 2),
    (re.compile(r"period|interval|every_n|_freq$"), 2),
    (re.compile(r"^(n_group|topk_group|num_groups)$"), 1),
    (re.compile(r"max_\w*positions?|n_positions|max_\w*(length|len)$|n_ctx|positions$"), 512),
    (re.compile(r"^image_size$"), 64),
)
_TOKEN = re.compile(r"_(token_)?(id|ids|index|idx)$")
_LEAST_SCALED = 32
_MOST_PARAMETERS = 60_000_000
# By how much sizes are divided, and whether heads become fewer, not smaller.
_VARIANTS = tuple((scale, fewer) for scale in (16, 8, 4, 2, 1) for fewer in (False, True))
_STAGES: Mapping[str, Callable[[int], Any]] = {"out_features": "stage{}".format, "out_indices": int}
_SERIES = {"prediction_length": 8, "context_length": 16}
# Settings without which a config class makes no config, or none that computes.
_NEEDED: Mapping[str, Mapping[str, Any]] = {
    "AutoformerConfig": _SERIES,
    "BambaConfig": {"attn_layer_indices": [1]},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "GraniteMoeHybridConfig": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
    },
    "HunYuanDenseV1Config": {"head_dim": 128},
    "HunYuanMoEV1Config": {"head_dim": 128},
    "InformerConfig": _SERIES,
    "TimeSeriesTransformerConfig": _SERIES,
}


class NotTinyError(Exception):
    """Raised when no small config of an architecture works in transformers."""


def model_classes(*, all_of_them: bool = False) -> Mapping[str, str]:
    """The class to try of each architecture that transformers knows, and its model type; or all classes."""
    from transformers.models.auto import modeling_auto

    mappings = {
        name.removesuffix("_MAPPING_NAMES").removeprefix("MODEL_FOR_"): getattr(modeling_auto, name)
        for name in dir(modeling_auto)
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")
    }
    order = [*_FIRST, *(name for name in mappings if name not in (*_FIRST, *_LAST)), *_LAST]
    found: dict[str, str] = {}
    seen: set[str] = set()
    for kind in order:
        for model_type, names in mappings[kind].items():
            for name in [names] if isinstance(names, str) else names:
                if name not in found and (all_of_them or model_type not in seen):
                    found[name] = model_type
            seen.add(model_type)
    return dict(sorted(found.items()))


def tiny_models(kind: type[Any]) -> Iterator[Callable[[], Any]]:
    """What builds a small model with random weights; each changes the default config less than the one before.

    The first ones may break a rule of the architecture's, and fail. All raise NotTinyError for a model that is too large.
    """
    config_class = kind.config_class
    default = config_class(**_NEEDED.get(config_class.__name__, {})).to_dict()
    for scale, fewer in _VARIANTS:
        sizes = _Sizes(scale, fewer_heads=fewer)

        def build(sizes: _Sizes = sizes) -> Any:
            return _built(kind, config_class.from_dict(sizes.shrunk(default)))

        yield build


class _Sizes:
    """Makes settings smaller, in one way for all of a config.

    Args:
        scale: What sizes are divided by.
        fewer_heads: Divide the number of heads, instead of the size of each.
    """

    def __init__(self, scale: int, *, fewer_heads: bool) -> None:
        self._scale = scale
        self._fewer_heads = fewer_heads
        self._tokens: dict[int, int] = {}

    def shrunk(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a config, or of a part of one."""
        layers = [each for name, each in values.items() if _counts_layers(name, each)]
        shrunk: dict[str, Any] = {}
        for name, value in values.items():
            if name == "stage_names":
                continue  # follow from the number of layers
            if name == "per_layer_config" and isinstance(value, dict):
                shrunk[name] = {k: v for k, v in value.items() if int(k) < _MOST_LAYERS} or None
            elif name in _KEPT or not isinstance(name, str):
                shrunk[name] = value
            elif isinstance(value, dict):
                shrunk[name] = self.shrunk(value)
            elif isinstance(value, list | tuple) and value:
                shrunk[name] = self._list(name, list(value), layers)
            elif isinstance(value, int) and not isinstance(value, bool):
                shrunk[name] = self._number(name, value)
            else:
                shrunk[name] = value
        return shrunk

    def _number(self, name: str, value: int) -> int:
        if _counts_layers(name, value):
            return min(value, _MOST_LAYERS)
        for pattern, most in _MOST:
            if pattern.search(name):
                return min(value, most)
        if _TOKEN.search(name):
            return self._token(value)
        if self._fewer_heads and _HEADS.search(name):
            return max(1, value // self._scale)
        is_scaled = value >= _LEAST_SCALED and _DIM.search(name) and not _NOT_SCALED.search(name)
        if not is_scaled or value % self._scale or (self._fewer_heads and _OF_A_HEAD.search(name)):
            return value
        return value // self._scale

    def _list(self, name: str, value: list[Any], layers: list[int]) -> list[Any]:
        if isinstance(value[0], dict):
            return [self.shrunk(each) if isinstance(each, dict) else each for each in value]
        if name in _STAGES and int(re.sub(r"\D", "", f"0{value[-1]}")) > _MOST_LAYERS:
            first = _MOST_LAYERS - min(len(value), _MOST_LAYERS) + 1
            return [_STAGES[name](number) for number in range(first, _MOST_LAYERS + 1)]
        if len(value) in layers and len(value) > _MOST_LAYERS:
            kinds = dict.fromkeys(map(str, value))
            first_of = [next(each for each in value if str(each) == kind) for kind in kinds]
            return [*first_of, *value][:_MOST_LAYERS]
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in value):
            return value
        if "depth" in name or _LAYERS.search(name):
            return [min(each, 2) for each in value]
        return [self._number(name, each) for each in value]

    def _token(self, token: int) -> int:
        """A number within a small vocabulary; equal tokens stay equal."""
        if token < _FIRST_SPECIAL:
            return token
        return self._tokens.setdefault(token, _FIRST_SPECIAL + len(self._tokens) % (_VOCAB - 101))


def _counts_layers(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, int)
        and not isinstance(value, bool)
        and bool(_LAYERS.search(name))
        and not _IS_NO_NUMBER_OF_LAYERS.search(name)
    )


def _built(kind: type[Any], config: Any) -> Any:
    with torch.device("meta"):
        count = sum(each.numel() for each in kind(config).parameters())
    if count > _MOST_PARAMETERS:
        raise NotTinyError(f"{count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():  # zeros and ones would hide mistakes
        if parameter.is_floating_point() and parameter.numel():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def inputs_of(model: Any, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs that the model may take, the most complete first."""
    import inspect

    taken = inspect.signature(model.forward).parameters
    makers = _makers(model.config, dtype)
    main = getattr(model, "main_input_name", "input_ids")
    needed = [
        name
        for name, each in taken.items()
        if each.default is inspect.Parameter.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    wanted = [name for name in dict.fromkeys([main, *needed]) if name in makers]
    decoder = [name for name in ("decoder_input_ids",) if name in taken]
    text = [name for name in ("input_ids",) if name in taken]
    pictures = [name for name in ("pixel_values",) if name in taken]
    others = ("pixel_values", "input_features", "input_values", "bbox")
    all_of_them = [*text, *(name for name in others if name in taken)]
    tried: list[list[str]] = []
    for names in (
        [*wanted, *all_of_them],
        [*wanted, *text, *pictures],
        [*wanted, *decoder],
        wanted,
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
    for pixels in makers["pixel_values"]:
        try:
            with torch.no_grad():
                features = model.get_image_features(pixel_values=pixels)
        except Exception:  # noqa: BLE001, S112 - the next picture may be one that it takes
            continue
        features = getattr(features, "pooler_output", features)
        if isinstance(features, list | tuple):
            features = torch.cat([each.reshape(-1, each.shape[-1]) for each in features])
        if isinstance(features, torch.Tensor):
            count = features.numel() // features.shape[-1]
            ids = makers["input_ids"][0]
            ids = torch.cat([ids[:, :3], torch.full((1, count), token), ids[:, 3:]], dim=1)
            yield {"input_ids": ids, "pixel_values": pixels}


def _makers(config: Any, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """For each name of an input the tensors that may be it."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(5, 60, shape, generator=generator)

    channels = _setting(config, ("num_channels", "in_channels", "in_chans"), 3)
    sizes = _setting(config, ("image_size", "input_size"), 64)
    pair = [sizes, sizes] if isinstance(sizes, int) else list(sizes)[-2:]
    bins = _setting(
        config,
        ("num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", "input_dim"),
        80,
    )
    frames = 2 * _setting(config, ("max_source_positions",), 32)
    pictures = [noise(1, channels, *pair), noise(1, 3, 64, 64), noise(1, 3, 224, 224)]
    videos = [
        noise(1, frames_, channels, *pair) for frames_ in (_setting(config, ("num_frames",), 4), 16)
    ]
    box = torch.tensor([[[10, 10, 40, 40]] * 9])
    past = _setting(config, ("context_length",), 16)
    lags = max(getattr(config, "lags_sequence", None) or [0])
    length = _setting(config, ("max_length",), frames)
    return {
        "input_ids": [ids(1, 9)],
        "decoder_input_ids": [ids(1, 4)],
        "pixel_values": [*pictures, *videos],
        "pixel_values_videos": videos,
        "input_features": [noise(1, bins, frames), noise(1, frames, bins), noise(1, 128, frames)],
        "input_values": [
            noise(1, 4000),
            noise(1, 1, 4000),
            noise(1, frames, bins),
            noise(1, length, bins),
        ],
        "bbox": [box],
        "past_values": [noise(1, past + lags), noise(1, past, 7), noise(1, past, 1)],
        "past_time_features": [noise(1, past + lags, getattr(config, "num_time_features", 0))],
        "past_observed_mask": [torch.ones(1, past + lags)],
        "audio_codes": [ids(1, 1, 9)],
        "labels": [ids(1, 9)],
        "pixel_mask": [torch.ones(1, *pair, dtype=torch.long)],
        "waveform": [noise(1, 4000)],
        "spectrogram": [noise(1, frames, bins)],
        "states": [noise(1, 5, _setting(config, ("state_dim",), 17))],
    }


def _setting(config: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of ``names`` that the config or a part of it has."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for part in parts:
        for name in names:
            if (value := getattr(part, name, None)) is not None:
                return value
    return default
