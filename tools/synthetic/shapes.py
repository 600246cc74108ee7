"""Names and shapes of the tensors in the public checkpoints of Llama-like models and mixtures of experts."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from layerstream.tools.synthetic.families import Config

__all__ = ["Tensor", "tensors_of"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    constant: float | None = None
    """Value of all elements; None for random weights."""
    dtype: str | None = None
    """Of a constant that has its own dtype, whatever that of the checkpoint is."""
    is_router: bool = False
    """Whether its rows stand for experts, and a token goes to those of the largest products with it."""

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)


def tensors_of(config: Config) -> Iterator[Tensor]:
    """Every tensor of the model that ``config`` describes, in execution order."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield Tensor("model.embed_tokens.weight", (vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield from _attention(config, f"{prefix}.self_attn")
        yield from _mlp(config, prefix, layer)
        for norm in _block_norms(config):
            yield _norm(config, f"{prefix}.{norm}", hidden)
    yield _norm(config, "model.norm", hidden)
    if not config["tie_word_embeddings"]:
        yield Tensor("lm_head.weight", (vocab, hidden))


def _norm(config: Config, module: str, size: int) -> Tensor:
    # Gemma's norms multiply by 1 + weight.
    return Tensor(f"{module}.weight", (size,), 0.0 if _is_gemma(config) else 1.0)


def _is_gemma(config: Config) -> bool:
    return str(config["model_type"]).startswith("gemma")


def _block_norms(config: Config) -> list[str]:
    around_mlp = ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    norms = ["input_layernorm", "post_attention_layernorm"]
    return norms + around_mlp if _is_gemma(config) else norms


def _attention(config: Config, module: str) -> Iterator[Tensor]:
    if "kv_lora_rank" in config:
        yield from _latent_attention(config, module)
        return
    hidden, head_dim, heads = (
        config["hidden_size"],
        config["head_dim"],
        config["num_attention_heads"],
    )
    keys = config["num_key_value_heads"] * head_dim
    shapes = {
        "q_proj": (heads * head_dim, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, heads * head_dim),
    }
    for name, shape in shapes.items():
        yield Tensor(f"{module}.{name}.weight", shape)
        if config.get("attention_bias"):
            yield Tensor(f"{module}.{name}.bias", shape[:1])
    if config["model_type"] in ("qwen3", "qwen3_moe", "gemma3_text"):
        yield _norm(config, f"{module}.q_norm", head_dim)
        yield _norm(config, f"{module}.k_norm", head_dim)
    if config["model_type"] == "gpt_oss":
        yield Tensor(f"{module}.sinks", (heads,))


def _latent_attention(config: Config, module: str) -> Iterator[Tensor]:
    """DeepSeek's, which caches a latent vector that keys and values are computed from."""
    hidden, heads, value = (
        config["hidden_size"],
        config["num_attention_heads"],
        config["v_head_dim"],
    )
    query_rank, rank = config["q_lora_rank"], config["kv_lora_rank"]
    plain, rotated = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    yield Tensor(f"{module}.q_a_proj.weight", (query_rank, hidden))
    yield _norm(config, f"{module}.q_a_layernorm", query_rank)
    yield Tensor(f"{module}.q_b_proj.weight", (heads * (plain + rotated), query_rank))
    yield Tensor(f"{module}.kv_a_proj_with_mqa.weight", (rank + rotated, hidden))
    yield _norm(config, f"{module}.kv_a_layernorm", rank)
    yield Tensor(f"{module}.kv_b_proj.weight", (heads * (plain + value), rank))
    yield Tensor(f"{module}.o_proj.weight", (hidden, heads * value))


def _mlp(config: Config, prefix: str, layer: int) -> Iterator[Tensor]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    module, names = f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj")
    match config["model_type"]:
        case "mixtral":
            module, names = f"{prefix}.block_sparse_moe", ("w1", "w3", "w2")
            experts = config["num_local_experts"]
        case "qwen3_moe":
            experts, inner = config["num_experts"], config["moe_intermediate_size"]
        case "deepseek_v3" if layer >= config["first_k_dense_replace"]:
            experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
            # Its own public checkpoint holds this one in float32 among tensors of fewer bits.
            bias = f"{module}.gate.e_score_correction_bias"
            yield Tensor(bias, (experts,), constant=0.0, dtype="float32")
            shared = config["n_shared_experts"] * inner
            yield from _gated(f"{module}.shared_experts", names, hidden, shared)
        case "gpt_oss":
            yield from _stacked_experts(config, module)
            return
        case _:
            yield from _gated(module, names, hidden, inner)
            return
    yield Tensor(f"{module}.gate.weight", (experts, hidden), is_router=True)
    for expert in range(experts):
        yield from _gated(f"{module}.experts.{expert}", names, hidden, inner)


def _gated(module: str, names: tuple[str, str, str], hidden: int, inner: int) -> Iterator[Tensor]:
    gate, up, down = names
    yield Tensor(f"{module}.{gate}.weight", (inner, hidden))
    yield Tensor(f"{module}.{up}.weight", (inner, hidden))
    yield Tensor(f"{module}.{down}.weight", (hidden, inner))


def _stacked_experts(config: Config, module: str) -> Iterator[Tensor]:
    """All experts of a layer in one tensor, transposed, gate and up fused, with biases: gpt-oss."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    experts = config["num_local_experts"]
    yield Tensor(f"{module}.router.weight", (experts, hidden), is_router=True)
    yield Tensor(f"{module}.router.bias", (experts,))
    yield Tensor(f"{module}.experts.gate_up_proj", (experts, hidden, 2 * inner))
    yield Tensor(f"{module}.experts.gate_up_proj_bias", (experts, 2 * inner))
    yield Tensor(f"{module}.experts.down_proj", (experts, inner, hidden))
    yield Tensor(f"{module}.experts.down_proj_bias", (experts, hidden))
