"""Models of every architecture of transformers, cut down to some megabytes, with random weights."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Architecture", "architectures", "fitted_config", "write_model"]

# In this order: of an architecture, what generates text comes first.
_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)

_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"),
    *("decoder_layers", "num_decoder_layers", "depth", "num_encoder_layers"),
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k")
_WIDTHS = (
    *("hidden_size", "intermediate_size", "d_model", "d_ff", "n_embd", "n_inner", "ffn_dim", "dim"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "ffn_hidden_size"),
    *("shared_expert_intermediate_size", "embedding_size", "word_embed_proj_dim", "hidden_dim"),
    *(
        "expert_ffn_hidden_size",
        "lru_width",
        "mamba_d_ssm",
        "attention_hidden_size",
        "out_hidden_size",
    ),
    *("dense_intermediate_size", "intermediate_size_mlp", "mamba_intermediate", "projection_dim"),
    *(
        "num_attention_heads",
        "num_key_value_heads",
        "n_head",
        "num_heads",
        "n_heads",
        "num_kv_heads",
    ),
    *("encoder_attention_heads", "decoder_attention_heads", "mamba_n_heads", "mamba_num_heads"),
    *("linear_num_key_heads", "linear_num_value_heads"),
)
_IDS = (
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id"),
    *("cls_token_id", "forced_eos_token_id", "forced_bos_token_id", "mask_token_id"),
)
_KEPT_VOCABULARY, _KEPT_EXPERTS = 16_384, 16
_MOST_HALVINGS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model class of transformers, and the class of its config."""

    name: str
    """The config's ``model_type``."""
    model: str
    config: type[Any]
    generates: bool
    """Whether it generates text from text alone."""


def architectures() -> Iterator[Architecture]:
    """One model class for each type of config, those that generate text first."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    seen: set[str] = set()
    for mapping in _MAPPINGS:
        for name, models in getattr(modeling_auto, mapping).items():
            model = models if isinstance(models, str) else models[0]
            if name in seen or name not in CONFIG_MAPPING or not hasattr(transformers, model):
                continue
            seen.add(name)
            yield Architecture(
                name=name,
                model=model,
                config=CONFIG_MAPPING[name],
                generates=mapping in _MAPPINGS[:2],
            )


def fitted_config(architecture: Architecture, parameters: int, *, layers: int) -> Any:
    """The default config of ``architecture``, with fewer layers, experts and words, and narrower where that is not enough.

    Args:
        architecture: Whose config.
        parameters: The most that the model has.
        layers: The most that it has, where it has no need of more.

    Raises:
        ValueError: No such config builds a model of at most ``parameters`` parameters.
    """
    import torch
    import transformers

    why: Exception | None = None
    model_class = getattr(transformers, architecture.model)
    for most_layers in (layers, None):
        for halvings in range(_MOST_HALVINGS):
            try:
                config = _cut(architecture.config(), layers=most_layers, halvings=halvings)
                with torch.device("meta"):
                    model = model_class._from_config(config)  # noqa: SLF001 - for any class
                if sum(each.numel() for each in model.parameters()) <= parameters:
                    return config
            except Exception as error:  # noqa: BLE001 - a config that is cut may break any rule
                why = error
    raise ValueError(f"{architecture.name} cannot be cut to {parameters:,} parameters: {why}")


def write_model(architecture: Architecture, config: Any, folder: Path, dtype: str) -> None:
    """Write a model with random weights as transformers does."""
    import torch
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, architecture.model)
    model = model_class._from_config(config, dtype=getattr(torch, dtype))  # noqa: SLF001
    for parameter in model.parameters():
        if parameter.is_floating_point():
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)


def _cut(config: Any, *, layers: int | None, halvings: int) -> Any:
    """``config`` itself, and those within it, made smaller."""
    made = vars(config)
    vocabulary = min(made.get("vocab_size") or _KEPT_VOCABULARY, _KEPT_VOCABULARY)
    _limit(config, ("vocab_size",), _KEPT_VOCABULARY)
    for name in _IDS:
        if _is_above(made.get(name), vocabulary - 1):
            setattr(config, name, 1)
    if made.get("is_encoder_decoder") and made.get("decoder_start_token_id") is None:
        config.decoder_start_token_id = 0
    _limit(config, _LAYERS, layers)
    _limit(config, _EXPERTS, _KEPT_EXPERTS)
    _limit(config, _CHOSEN_EXPERTS, _KEPT_EXPERTS // 2)
    for name in _WIDTHS:
        if _is_above(made.get(name), 1):
            setattr(config, name, max(1, made[name] >> halvings))
    for name, value in list(made.items()):
        if isinstance(value, list) and name.endswith(("layer_types", "layers_block_type")):
            setattr(config, name, value[:layers])
        elif hasattr(value, "model_type"):
            _cut(value, layers=layers, halvings=halvings)
    return config


def _limit(config: Any, names: Iterable[str], most: int | None) -> None:
    for name in names:
        if most is not None and _is_above(vars(config).get(name), most):
            setattr(config, name, most)


def _is_above(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > most
