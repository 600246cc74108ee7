"""Tiny models of any architecture: the default config of its class with smaller sizes, found by the names of its settings."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch

__all__ = ["NotTinyError", "model_classes", "tiny_models"]

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
    r"|position|pos_emb|grid|pool|block_size|max_|crop|frame|type_vocab|num_mel"
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
    (re.compile(r"(^|_)(num|n|moe_num)_(routed_|local_)?experts$"), 8),
    (re.compile(r"per_tok(en)?$|^(moe_)?top_?k$|^moe_k$|num_selects$"), 2),
    (re.compile(r"period|interval|every_n|_freq$"), 2),
    (re.compile(r"^(n_group|topk_group|num_groups|num_expert_group)$"), 1),
    (re.compile(r"max_\w*positions?|n_positions|max_\w*(length|len)$|n_ctx|positions$"), 512),
    (re.compile(r"^image_size$"), 64),
    (re.compile(r"^image_embedding_size$"), 4),
)
_TOKEN = re.compile(r"_(token_)?(id|ids|index|idx)$")
_LEAST_SCALED = 32
_MOST_PARAMETERS = 100_000_000
# By how much sizes are divided, whether heads become fewer, not smaller, and what stays as it is.
_KEPT_PARTS = (frozenset[str](), frozenset({"backbone_config"}), frozenset({"image_size"}))
_VARIANTS = tuple(
    (scale, fewer, kept)
    for kept, scales in zip(_KEPT_PARTS, ((16, 8, 4, 28, 2, 1), (16, 4, 1), (16, 4)), strict=True)
    for scale in scales
    for fewer in (False, True)
)
_INDICES = re.compile(r"index(es)?$|indices$|layers_idx$|layer_ids$")
_WIDTH = re.compile(r"^(hidden_size|embed_dim|d_model|n_embd|hidden_dim|dim)$")
_ALL_HEADS = re.compile(
    r"^(num_attention_heads|num_heads|n_heads?|attention_heads|\w+coder_attention_heads)$"
)
_STAGES: Mapping[str, Callable[[int], Any]] = {"out_features": "stage{}".format, "out_indices": int}
_SERIES = {"prediction_length": 8, "context_length": 16}
_INDEXER = {
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_ROPES = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
_SECTIONS = {"partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
_GLM = {"rope_parameters": {**_ROPE, **_SECTIONS}}
_GEMMA_EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 1024,
}
# Settings without which a config class makes no config, none that computes, or one without the experts that it may have.
_NEEDED: Mapping[str, Mapping[str, Any]] = {
    "AutoformerConfig": _SERIES,
    "BambaConfig": {"attn_layer_indices": [1]},
    "CohereCompassConfig": {"text_config": _ROPES},
    "CohereCompassTextConfig": _ROPES,
    "DbrxConfig": {"attn_config": {"kv_n_heads": 8, "rope_theta": 10_000.0, "clip_qkv": 8}},
    "DeepseekV2Config": {"num_experts_per_tok": 2, "moe_intermediate_size": 1408},
    "Dots1Config": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "EsmConfig": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "Gemma4Config": {"text_config": _GEMMA_EXPERTS},
    "Gemma4TextConfig": _GEMMA_EXPERTS,
    "Glm46VConfig": {"text_config": _GLM},
    "Glm4vConfig": {"text_config": _GLM},
    "Glm4vMoeConfig": {"text_config": _GLM},
    "Glm4vTextConfig": _GLM,
    "GlmImageTextConfig": _GLM,
    "GraniteMoeHybridConfig": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
    },
    "HunYuanDenseV1Config": {"head_dim": 128},
    "HunYuanMoEV1Config": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
    "InformerConfig": _SERIES,
    "Lfm2MoeConfig": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "NemotronHConfig": {"moe_intermediate_size": 7680},
    "Qwen4ExpConfig": {"text_config": _INDEXER},
    "Qwen4ExpTextConfig": _INDEXER,
    "ReformerConfig": {"is_decoder": True},
    "TimeSeriesTransformerConfig": _SERIES,
    "Wav2Vec2BertConfig": {"vocab_size": 64},
    "XmodConfig": {"default_language": "en_XX"},
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
    for scale, fewer, kept in _VARIANTS:
        if kept and not any(f"'{name}'" in repr(default) for name in kept):
            continue
        sizes = _Sizes(scale, fewer_heads=fewer, kept=kept)

        def build(sizes: _Sizes = sizes) -> Any:
            return _built(kind, config_class.from_dict(sizes.shrunk(default)))

        yield build


class _Sizes:
    """Makes settings smaller, in one way for all of a config.

    Args:
        scale: What sizes are divided by.
        fewer_heads: Divide the number of heads, instead of the size of each.
        kept: Parts of the config that stay as they are.
    """

    def __init__(self, scale: int, *, fewer_heads: bool, kept: AbstractSet[str]) -> None:
        self._scale = scale
        self._kept = kept
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
                shrunk[name] = self._per_layer(value, values.get("layer_types") or [], layers)
            elif name in _KEPT or name in self._kept or not isinstance(name, str):
                shrunk[name] = value
            elif isinstance(value, dict):
                shrunk[name] = self.shrunk(value)
            elif isinstance(value, list | tuple) and value:
                shrunk[name] = self._list(name, list(value), layers)
            elif isinstance(value, int) and not isinstance(value, bool):
                shrunk[name] = self._number(name, value)
            else:
                shrunk[name] = value
        return _mended(shrunk)

    def _per_layer(
        self, settings: Mapping[Any, Any], types: list[Any], layers: list[int]
    ) -> dict[Any, Any] | None:
        """Settings of single layers: those that the first of each type has."""
        first = {types[int(key)]: (key, each) for key, each in reversed(list(settings.items()))}
        kinds = enumerate(self._list("layer_types", types, layers) if types else [])
        return {
            type(first[kind][0])(number): self.shrunk(first[kind][1])
            for number, kind in kinds
            if kind in first
        } or None

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
        if not is_scaled or (self._fewer_heads and _OF_A_HEAD.search(name)):
            return value
        return value // math.gcd(value, self._scale)

    def _list(self, name: str, value: list[Any], layers: list[int]) -> list[Any]:  # noqa: PLR0911 - one for each kind
        if isinstance(value[0], dict):
            return [self.shrunk(each) if isinstance(each, dict) else each for each in value]
        if name in _STAGES and int(re.sub(r"\D", "", f"0{value[-1]}")) > _MOST_LAYERS:
            first = _MOST_LAYERS - min(len(value), _MOST_LAYERS) + 1
            return [_STAGES[name](number) for number in range(first, _MOST_LAYERS + 1)]
        if len(value) in layers and len(value) > _MOST_LAYERS:
            kinds = dict.fromkeys(map(str, value))
            first_of = [next(each for each in value if str(each) == kind) for kind in kinds]
            some = [*first_of, *value][: max(len(first_of), _MOST_LAYERS - 1)]
            return [*some, value[-1]][:_MOST_LAYERS]  # the last one often has to be of its type
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in value):
            return value
        if _INDICES.search(name) and name not in _STAGES:
            return value if max(value) < _MOST_LAYERS else list(range(_MOST_LAYERS))[-len(value) :]
        if "depth" in name or _LAYERS.search(name):
            return [min(each, 2) for each in value]
        return [self._number(name, each) for each in value]

    def _token(self, token: int) -> int:
        """A number within a small vocabulary; equal tokens stay equal."""
        if token < _FIRST_SPECIAL:
            return token
        return self._tokens.setdefault(token, _FIRST_SPECIAL + len(self._tokens) % (_VOCAB - 101))


def _mended(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with numbers of heads that divide their width."""
    names = [name for name in values if isinstance(name, str)]
    width = next((values[name] for name in names if _WIDTH.search(name)), None)
    heads = [name for name in names if _ALL_HEADS.search(name) and isinstance(values[name], int)]
    if isinstance(width, int) and not any(map(_OF_A_HEAD.search, names)):
        values.update((name, math.gcd(values[name], width)) for name in heads)
    if heads and values.get("num_key_value_heads", 0) is None:
        values["num_key_value_heads"] = values[heads[0]]
    rope = values.get("rope_parameters") or {}
    if heads and isinstance(width, int) and rope.get("mrope_section"):
        size = values.get("head_dim") or width // values[heads[0]]
        size = int(size * rope.get("partial_rotary_factor", 1)) // 2
        whole = sum(rope["mrope_section"])
        others = [each * size // whole for each in rope["mrope_section"][1:]]
        values["rope_parameters"] = {**rope, "mrope_section": [size - sum(others), *others]}
    return values


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
