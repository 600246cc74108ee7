"""Tiny random models of many architectures, written to disk as transformers writes them."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

__all__ = ["CACHE", "CASES", "Case", "inputs_for", "save_model"]

# What the installed transformers calls the KV cache of a text model, in arguments and outputs.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in transformers.modeling_outputs.CausalLMOutputWithPast.__annotations__
)

BLOCK = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {**BLOCK, "vocab_size": 100}
GROUPED = {**TEXT, "num_key_value_heads": 2}
ROUTED = {**GROUPED, "num_local_experts": 4}
VISION = {**BLOCK, "image_size": 32, "patch_size": 8}
SHORT = {"hidden_size": 32, "vocab_size": 100}
SPEECH = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 100,
}
DEEPSEEK = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
HYBRID = {
    "num_experts": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "use_mamba_kernels": False,
}
LINEAR = {
    "head_dim": 8,
    "num_hidden_layers": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
NGRAMS = {
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [2],
    "ngram_vocab_size_base": 500,
    "split_ngram_parts": 8,
    "eos_token_id": 99,
}
LISTENING = {
    "conv_dim": (32, 32),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


class Case(NamedTuple):
    """A tiny model: its class, its config's class and the settings of the config."""

    model: str
    config: str
    settings: dict[str, Any]


CASES = {
    "llama": Case("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "llama-tied": Case("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": Case("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "qwen3-moe": Case(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "mixtral": Case("MixtralForCausalLM", "MixtralConfig", ROUTED),
    "phimoe": Case("PhimoeForCausalLM", "PhimoeConfig", ROUTED),
    "gpt-oss": Case("GptOssForCausalLM", "GptOssConfig", {**ROUTED, "head_dim": 8}),
    "deepseek-v3": Case(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**TEXT, **DEEPSEEK, "num_key_value_heads": 4},
    ),
    "jamba": Case("JambaForCausalLM", "JambaConfig", {**GROUPED, **HYBRID}),
    "gemma3": Case("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 8}),
    "gpt2": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64},
    ),
    "bert": Case("BertForMaskedLM", "BertConfig", TEXT),
    "t5": Case(
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
        | {"decoder_start_token_id": 0},
    ),
    "falcon": Case(
        "FalconForCausalLM",
        "FalconConfig",
        {**SHORT, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "falcon-new": Case(
        "FalconForCausalLM",
        "FalconConfig",
        {**SHORT, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2}
        | {"new_decoder_architecture": True},
    ),
    "mpt": Case(
        "MptForCausalLM",
        "MptConfig",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 100, "max_seq_len": 128},
    ),
    "bloom": Case("BloomForCausalLM", "BloomConfig", {**SHORT, "n_layer": 2, "n_head": 4}),
    "opt": Case(
        "OPTForCausalLM",
        "OPTConfig",
        {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    ),
    "mamba": Case("MambaForCausalLM", "MambaConfig", {**SHORT, "num_hidden_layers": 2}),
    "vit": Case("ViTForImageClassification", "ViTConfig", VISION),
    "clip": Case("CLIPModel", "CLIPConfig", {"text_config": TEXT, "vision_config": VISION}),
    "llava": Case(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
        },
    ),
    "whisper": Case(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**SPEECH, "max_source_positions": 32, "max_target_positions": 32, "num_mel_bins": 8}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    ),
    # Initialising it overwrites a weight that weight_norm computes from loaded ones.
    "wav2vec2": Case("Wav2Vec2ForCTC", "Wav2Vec2Config", {**TEXT, **LISTENING}),
    "qwen3-next": Case(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**GROUPED, **LINEAR, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "mamba2": Case(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {**SHORT, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1}
        | {"state_size": 8, "chunk_size": 4},
    ),
    "resnet": Case(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2]},
    ),
    # Its embeddings return a view of a weight, and its head uses the table of its embeddings.
    "perceiver": Case(
        "PerceiverForMaskedLM",
        "PerceiverConfig",
        {"d_latents": 32, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 2}
        | {"num_latents": 8, "num_self_attention_heads": 4, "num_cross_attention_heads": 4}
        | {"vocab_size": 100, "max_position_embeddings": 64},
    ),
    # Modules outside its blocks are used at different times.
    "canine": Case(
        "CanineForSequenceClassification",
        "CanineConfig",
        {**BLOCK, "max_position_embeddings": 64, "num_hash_buckets": 64},
    ),
    "aimv2": Case(
        "Aimv2Model",
        "Aimv2Config",
        {"text_config": {**TEXT, "eos_token_id": 99}, "vision_config": VISION},
    ),
    # Loading it overwrites a row of a table that it has just loaded.
    "chinese-clip": Case(
        "ChineseCLIPModel", "ChineseCLIPConfig", {"text_config": TEXT, "vision_config": VISION}
    ),
    # It computes with weights of modules that it does not call.
    "layoutlmv3": Case(
        "LayoutLMv3ForSequenceClassification",
        "LayoutLMv3Config",
        {**TEXT, "input_size": 32, "patch_size": 8},
    ),
    "encodec": Case(
        "EncodecModel",
        "EncodecConfig",
        {"hidden_size": 16, "num_filters": 4, "upsampling_ratios": [4, 2], "codebook_size": 16}
        | {"num_lstm_layers": 1},
    ),
    # It adds weights to activations in place.
    "convbert": Case("ConvBertForMaskedLM", "ConvBertConfig", {**TEXT, "embedding_size": 32}),
    # Its n-gram table is in eight tensors.
    "qwen4-exp": Case(
        "Qwen4ExpForCausalLM",
        "Qwen4ExpTextConfig",
        {**GROUPED, **LINEAR, "num_experts": 4, "num_experts_per_tok": 2, **NGRAMS},
    ),
    # Sinusoidal positions are parameters that no checkpoint stores.
    "marian": Case(
        "MarianMTModel",
        "MarianConfig",
        {**SPEECH, "pad_token_id": 0, "decoder_start_token_id": 0},
    ),
}


def save_model(
    folder: Path,
    case: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    model: str = "",
    max_shard_size: str | int = "50GB",
    **settings: Any,
) -> Path:
    """Save a tiny random model of ``case`` in ``folder`` as transformers does."""
    name, config, defaults = CASES[case]
    torch.manual_seed(0)
    built = getattr(transformers, model or name)(
        getattr(transformers, config)(**{**defaults, **settings})
    ).to(dtype)
    for parameter in built.parameters():  # zeros and ones would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    built.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def inputs_for(case: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Inputs of a forward pass of ``case``."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (1, 7), generator=generator)
    images = torch.randn((1, 3, 32, 32), generator=generator).to(dtype)
    inputs = {"input_ids": ids}
    if case in {"t5", "marian", "bart"}:
        inputs["decoder_input_ids"] = ids[:, :4]
    elif case in {"vit", "resnet", "layoutlmv3"}:
        inputs = {"pixel_values": images}
    elif case == "encodec":
        inputs = {"input_values": torch.randn((1, 1, 640), generator=generator).to(dtype)}
    elif case in {"clip", "chinese-clip", "aimv2"}:
        inputs["pixel_values"] = images
    elif case == "whisper":
        features = torch.randn((1, 8, 64), generator=generator).to(dtype)
        inputs = {"input_features": features, "decoder_input_ids": ids[:, :4]}
    elif case == "wav2vec2":
        inputs = {"input_values": torch.randn((1, 800), generator=generator).to(dtype)}
    return inputs
