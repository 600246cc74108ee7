"""Grouping by names, compared with the checkpoints and the forward passes of real models."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint, TensorInfo
from layerstream.pipeline.checkpoint.layers import Layer, LayerKind, group_layers

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
IMAGES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
BART = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "decoder_start_token_id": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1,
    "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip

IDS = torch.arange(3, 11)[None]
TEXT = {"input_ids": IDS}
PAIR = {"input_ids": IDS, "decoder_input_ids": IDS}
IMAGE = {"pixel_values": torch.zeros(1, 3, 16, 16)}
LARGE_IMAGE = {"pixel_values": torch.zeros(1, 3, 32, 32)}


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    config: dict[str, Any]
    inputs: dict[str, torch.Tensor] = field(default_factory=lambda: TEXT)
    blocks: int = 3
    tied: bool = False


CASES = [
    Case(model="LlamaForCausalLM", config=GROUPED),
    Case(model="LlamaForCausalLM", config={**GROUPED, "tie_word_embeddings": True}, tied=True),
    Case(model="LlamaModel", config=GROUPED),
    Case(model="Qwen3ForCausalLM", config={**GROUPED, "num_hidden_layers": 12}, blocks=12),
    Case(model="GPT2LMHeadModel", config=SIZES, tied=True),
    Case(model="GPT2Model", config=SIZES),
    Case(model="GPTNeoXForCausalLM", config=SIZES),
    Case(
        model="OPTForCausalLM",
        config={**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16},
        tied=True,
    ),
    Case(model="BloomForCausalLM", config={**SIZES, "n_layer": 3, "n_head": 4}, tied=True),
    Case(model="FalconForCausalLM", config=SIZES, tied=True),
    Case(model="MambaForCausalLM", config={**SIZES, "state_size": 4}, tied=True),
    Case(model="MixtralForCausalLM", config={**GROUPED, "num_local_experts": 3}),
    Case(model="Qwen3MoeForCausalLM", config={**EXPERTS, "num_experts": 3}),
    Case(model="DeepseekV3ForCausalLM", config={**EXPERTS, **LATENT}),
    Case(model="Gemma3ForCausalLM", config=GROUPED, tied=True),
    Case(model="BertForMaskedLM", config=SIZES, tied=True),
    Case(model="BertForSequenceClassification", config=SIZES),
    Case(model="RobertaForMaskedLM", config=SIZES, tied=True),
    Case(model="AlbertForMaskedLM", config={**SIZES, "embedding_size": 16}, blocks=1, tied=True),
    Case(model="DistilBertForSequenceClassification", config={**SIZES, "hidden_dim": 48}),
    Case(model="XLMWithLMHeadModel", config={**SIZES, "n_layers": 3}, tied=True),
    Case(
        model="T5ForConditionalGeneration",
        config={"vocab_size": 96, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4,
                "num_layers": 2},
        inputs=PAIR, blocks=4, tied=True,
    ),
    Case(model="BartForConditionalGeneration", config=BART, inputs=PAIR, blocks=4, tied=True),
    Case(
        model="WhisperForConditionalGeneration",
        config={**BART, "num_mel_bins": 8, "max_source_positions": 16},
        inputs={"input_features": torch.zeros(1, 8, 32), "decoder_input_ids": IDS},
        blocks=4, tied=True,
    ),
    Case(model="ViTForImageClassification", config=IMAGES, inputs=IMAGE, blocks=2),
    Case(
        model="SwinForImageClassification",
        config={"image_size": 32, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2],
                "window_size": 4},
        inputs=LARGE_IMAGE, blocks=2,
    ),
    Case(
        model="ResNetForImageClassification",
        config={"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]},
        inputs=LARGE_IMAGE, blocks=2,
    ),
    Case(
        model="ConvNextForImageClassification",
        config={"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2},
        inputs=LARGE_IMAGE, blocks=2,
    ),
    Case(
        model="CLIPModel",
        config={"text_config": SIZES, "vision_config": IMAGES, "projection_dim": 16},
        inputs={**TEXT, **IMAGE}, blocks=5,
    ),
]  # fmt: skip


@pytest.fixture
def build(tmp_path):
    def build(case: Case) -> tuple[torch.nn.Module, Checkpoint]:
        model_class = getattr(transformers, case.model)
        model = model_class(model_class.config_class(**case.config)).eval()
        model.save_pretrained(tmp_path)
        return model, Checkpoint.open(tmp_path)

    return build


def called_modules(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return the modules of one forward pass in the order of their first calls."""
    names = {module: name for name, module in model.named_modules()}
    order: dict[str, int] = {}

    def record(module: torch.nn.Module, _inputs: Any) -> None:
        order.setdefault(names[module], len(order))

    for module in names:
        module.register_forward_pre_hook(record)
    with torch.no_grad():
        model(**inputs)
    return order


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model)
def test_layers_stand_in_the_order_in_which_the_model_computes_them(build, case):
    model, checkpoint = build(case)
    order = called_modules(model, case.inputs)
    layers = group_layers(checkpoint)
    seen: set[str] = set()
    first_calls = []
    for layer in layers:
        owners = {name.rpartition(".")[0] for name in layer.tensors if name not in seen} - {""}
        seen.update(layer.tensors)
        calls = [order[owner] for owner in owners if owner in order]
        if calls:
            first_calls.append((min(calls), layer.name))
    assert first_calls == sorted(first_calls)
    assert sum(layer.kind is LayerKind.BLOCK for layer in layers) == case.blocks


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model)
def test_each_tensor_is_in_one_layer_and_a_tied_table_in_the_head_as_well(build, case):
    _, checkpoint = build(case)
    layers = group_layers(checkpoint)
    names = [name for layer in layers for name in layer.tensors]
    assert set(names) == set(checkpoint.tensors)
    assert len(names) == len(checkpoint.tensors) + case.tied
    if case.tied:
        (table,) = {name for name in names if names.count(name) > 1}
        assert table in layers[-1].tensors
        assert layers[-1].kind is LayerKind.HEAD


def checkpoint_of(names: list[str], config: dict[str, Any] | None = None) -> Checkpoint:
    tensors = {
        name: TensorInfo(
            name=name,
            dtype="float32",
            shape=(512,) if "norm" in name else (64, 8),
            file=0,
            offset=at * 2048,
            nbytes=2048,
        )
        for at, name in enumerate(names)
    }
    return Checkpoint(path=Path("m"), files=(), tensors=tensors, config=config)


def kinds_and_names(layers: tuple[Layer, ...]) -> list[str]:
    return [f"{layer.kind} {layer.name}" for layer in layers]


NAMES = {
    "towers and projectors come before the language model": (
        [
            "lm_head.weight",
            "model.language_model.embed_tokens.weight",
            "model.language_model.layers.0.mlp.down_proj.weight",
            "model.language_model.norm.weight",
            "model.multi_modal_projector.linear_1.weight",
            "model.vision_tower.vision_model.embeddings.patch_embedding.weight",
            "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
            "model.vision_tower.vision_model.post_layernorm.weight",
        ],
        [
            "embedding model.vision_tower.vision_model.embeddings",
            "block model.vision_tower.vision_model.encoder.layers.0",
            "other model.vision_tower.vision_model.post_layernorm+model.multi_modal_projector",
            "embedding model.language_model.embed_tokens",
            "block model.language_model.layers.0",
            "head model.language_model.norm+lm_head",
        ],
    ),
    "a merger inside a tower follows the tower's blocks": (
        [
            "model.embed_tokens.weight",
            "model.layers.0.mlp.up_proj.weight",
            "visual.blocks.0.attn.qkv.weight",
            "visual.merger.mlp.0.weight",
            "visual.merger.mlp.2.weight",
            "visual.patch_embed.proj.weight",
        ],
        [
            "embedding visual.patch_embed",
            "block visual.blocks.0",
            "other visual.merger",
            "embedding model.embed_tokens",
            "block model.layers.0",
        ],
    ),
    "blocks stand in the order of numbers, and the extra one of DeepSeek-V3 last": (
        [f"model.layers.{at}.mlp.gate.weight" for at in (10, 61, 2, 0)],
        [f"block model.layers.{at}" for at in (0, 2, 10, 61)],
    ),
    "numbers within a block make no blocks": (
        [f"model.layers.0.mlp.experts.{at}.w1.weight" for at in range(3)],
        ["block model.layers.0"],
    ),
    "lists that are computed alternately are one stack": (
        [
            *(f"attentions.{at}.q_lin.weight" for at in range(2)),
            *(f"layer_norm1.{at}.weight" for at in range(2)),
            *(f"ffns.{at}.lin1.weight" for at in range(2)),
        ],
        ["block attentions.0", "block attentions.1"],
    ),
    "what belongs to no layer is delivered first": (
        ["model.layers.0.mlp.gate.weight", "logit_scale", "model.embed_tokens.weight"],
        ["other logit_scale", "embedding model.embed_tokens", "block model.layers.0"],
    ),
    "bare layers are blocks where there is nothing else": (
        ["embed.weight", "layers.0.weight", "layers.1.weight", "head.weight"],
        ["embedding embed", "block layers.0", "block layers.1", "head head"],
    ),
    "a sequence without names is blocks": (
        ["0.weight", "0.bias", "2.weight"],
        ["block 0", "block 2"],
    ),
    "a model without lists is one layer and its head": (
        ["up.weight", "down.weight", "head.weight"],
        ["other down+up", "head head"],
    ),
}


@pytest.mark.parametrize(("names", "expected"), NAMES.values(), ids=NAMES.keys())
def test_names_determine_the_order(names, expected):
    assert kinds_and_names(group_layers(checkpoint_of(names))) == expected


CAUSAL = {"architectures": ["SomeForCausalLM"], "vocab_size": 64}


@pytest.mark.parametrize(
    ("config", "head", "tied"),
    [
        pytest.param(None, [], False, id="no config.json"),
        pytest.param({"tie_word_embeddings": True}, [], True, id="the config says so"),
        pytest.param(
            {"text_config": {"tie_word_embeddings": True}}, [], True, id="the text config says so"
        ),
        pytest.param(CAUSAL, [], True, id="a language model without a head"),
        pytest.param(CAUSAL, ["lm_head.weight"], False, id="a language model with a head"),
        pytest.param(
            {**CAUSAL, "tie_word_embeddings": False}, [], False, id="the config denies it"
        ),
        pytest.param(
            {"architectures": ["SomeModel"], "tie_word_embeddings": True},
            [],
            False,
            id="a base model, which has no head to tie",
        ),
    ],
)
def test_the_config_and_the_names_determine_whether_embeddings_are_tied(config, head, tied):
    body = ["model.embed_tokens.weight", "model.layers.0.mlp.up.weight", "model.norm.weight"]
    layers = group_layers(checkpoint_of([*body, *head], config))
    assert ("model.embed_tokens.weight" in layers[-1].tensors) is tied


def test_tensors_of_a_layer_stand_in_the_order_of_the_files():
    names = ["layers.0.b.weight", "layers.0.a.weight", "layers.0.c.weight"]
    assert group_layers(checkpoint_of(names))[0].tensors == tuple(names)


PARTS = st.sampled_from(["0", "1", "10", "layers", "h", "embed", "norm", "head", "vision", "x", ""])


@given(st.lists(st.lists(PARTS, min_size=1, max_size=5).map(".".join), unique=True, max_size=12))
def test_whatever_the_names_each_tensor_is_in_one_layer_and_layer_names_are_unique(names):
    layers = group_layers(checkpoint_of(names))
    assert sorted(name for layer in layers for name in layer.tensors) == sorted(names)
    assert len({layer.name for layer in layers}) == len(layers)
