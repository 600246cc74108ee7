"""Names and shapes of the tensors in the public checkpoints of Llama-like models."""

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
        yield from _attention(config, prefix)
        yield from _mlp(config, prefix)
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


def _attention(config: Config, prefix: str) -> Iterator[Tensor]:
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    yield Tensor(f"{prefix}.self_attn.q_proj.weight", (queries, hidden))
    yield Tensor(f"{prefix}.self_attn.k_proj.weight", (keys, hidden))
    yield Tensor(f"{prefix}.self_attn.v_proj.weight", (keys, hidden))
    yield Tensor(f"{prefix}.self_attn.o_proj.weight", (hidden, queries))
    if config["model_type"] in ("qwen3", "qwen3_moe", "gemma3_text"):
        yield _norm(config, f"{prefix}.self_attn.q_norm", head_dim)
        yield _norm(config, f"{prefix}.self_attn.k_norm", head_dim)


def _mlp(config: Config, prefix: str) -> Iterator[Tensor]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    match config["model_type"]:
        case "mixtral":
            module, experts = f"{prefix}.block_sparse_moe", config["num_local_experts"]
            names = ("w1", "w3", "w2")
        case "qwen3_moe":
            module, experts = f"{prefix}.mlp", config["num_experts"]
            names, inner = ("gate_proj", "up_proj", "down_proj"), config["moe_intermediate_size"]
        case _:
            yield from _gated(f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj"), hidden, inner)
            return
    yield Tensor(f"{module}.gate.weight", (experts, hidden))
    for expert in range(experts):
        yield from _gated(f"{module}.experts.{expert}", names, hidden, inner)


def _gated(module: str, names: tuple[str, str, str], hidden: int, inner: int) -> Iterator[Tensor]:
    gate, up, down = names
    yield Tensor(f"{module}.{gate}.weight", (inner, hidden))
    yield Tensor(f"{module}.{up}.weight", (inner, hidden))
    yield Tensor(f"{module}.{down}.weight", (hidden, inner))
