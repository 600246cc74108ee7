"""Mutated config.json files through the command: each run ends with one line of an error, or with tokens.

    python -m layerstream.tools.benchmarks.fuzz_configs --runs 5000

Each run takes the config of a tiny model, changes one to three of its values, and plans or generates. Whatever is not refused in one
line (a traceback, a run of more than a minute) is printed with the seed that repeats it, and the exit code is 1.
"""

import argparse
import contextlib
import copy
import faulthandler
import io
import json
import random
import resource
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerstream.tools.cli import main as command

__all__ = ["MODELS", "failure_of", "mutated", "save_model"]

_TEXT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}

MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_TEXT, "intermediate_size": 32}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    ),
    "bert": ("BertModel", "BertConfig", {**_TEXT, "intermediate_size": 32}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_TEXT, "head_dim": 8, "intermediate_size": 32},
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_TEXT, **_ROUTED, "head_dim": 8}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2},
    ),
}
"""For each model its class, the class of its config, and the settings that make it tiny."""

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, 7, 64, 1000, 10**6, 2**31, 2**63, 1e308, 0.5, -0.5),
    *("", "x", "float16", "int8", "cuda", "\ud800", "relu", "a" * 5000, [], [None], [1, 2], ["x"]),
    *({}, {"a": 1}, {"rope_type": "yarn"}, {"type": "linear", "factor": 0}, [[]] * 3),
)
# Names that some configs have and that decide much.
_NAMES = (
    *("architectures", "model_type", "dtype", "torch_dtype", "quantization_config", "text_config"),
    *("rope_scaling", "rope_parameters", "layer_types", "auto_map", "sliding_window", "head_dim"),
    *("tie_word_embeddings", "is_encoder_decoder", "use_cache", "num_key_value_heads"),
    *("kv_lora_rank", "state_size", "hidden_act", "num_local_experts", "attn_implementation"),
)
_SHARE_NESTED, _SHARE_REMOVED, _SHARE_CUT = 0.5, 0.15, 0.1


def save_model(folder: Path, model: str) -> Path:
    """Write the tiny model of that name with random weights."""
    import transformers

    kind, config, settings = MODELS[model]
    built = getattr(transformers, kind)(getattr(transformers, config)(**settings))
    built.save_pretrained(folder)
    return folder


def mutated(config: Mapping[str, Any], seed: int) -> bytes:
    """The text of ``config`` with one to three changes, which are decided by ``seed``."""
    rng = random.Random(seed)
    changed: Any = copy.deepcopy(dict(config))
    for _ in range(rng.randint(1, 3)):
        owner = changed
        while nested := [value for value in owner.values() if isinstance(value, dict) and value]:
            if rng.random() > _SHARE_NESTED:
                break
            owner = rng.choice(nested)
        name = rng.choice([*owner, rng.choice(_NAMES)])
        if rng.random() < _SHARE_REMOVED:
            owner.pop(name, None)
        else:
            # A copy, or later changes would be made to what other seeds choose from, or put a value into itself.
            owner[name] = copy.deepcopy(rng.choice([*_VALUES, *owner.values()]))
    text = json.dumps(changed).encode()
    if rng.random() < _SHARE_CUT:
        at = rng.randrange(len(text))
        text = text[:at] + rng.randbytes(rng.randint(0, 3)) + text[at + rng.randint(0, 3) :]
    return text


def failure_of(folder: Path, *arguments: str) -> str | None:
    """Run the command on ``folder``; returns what is wrong about how it ended, or None."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command([arguments[0], str(folder), *arguments[1:]])
        except Exception:  # noqa: BLE001 - that any escapes is what this is for
            return traceback.format_exc()
    errors = [line for line in err.getvalue().splitlines() if line.startswith("layerstream: error")]
    if "Traceback" in err.getvalue() or "fault of layerstream" in err.getvalue():
        return err.getvalue()
    if code not in {0, 1} or len(errors) != code:
        return f"exit code {code} and {len(errors)} lines of errors: {err.getvalue()}"
    return None


ARGUMENTS = {
    "plan": ("plan", "--device", "cpu", "--disk-bandwidth", "1GB/s"),
    "generate": ("generate", "--device", "cpu", "--prompt-ids", "3,4", "--max-new-tokens", "2"),
}
"""What the command is run with, beside the folder."""


def main() -> int:
    """Run mutations, and print what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=60, help="of one run, at most (default: 60)")
    args = parser.parse_args()
    # What a config asks for is refused before it takes the machine's memory.
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, resource.RLIM_INFINITY))
    failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: save_model(Path(temporary, name), name) for name in MODELS}
        configs = {
            name: json.loads((at / "config.json").read_bytes()) for name, at in folders.items()
        }
        for seed in range(args.first_seed, args.first_seed + args.runs):
            name = list(MODELS)[seed % len(MODELS)]
            print(f"seed {seed}", end="\r", flush=True)
            (folders[name] / "config.json").write_bytes(mutated(configs[name], seed))
            for arguments in ARGUMENTS.values():
                # What takes longer is shown with the stacks of all threads, and ends the run.
                faulthandler.dump_traceback_later(args.seconds, exit=True)
                failure = failure_of(folders[name], *arguments)
                faulthandler.cancel_dump_traceback_later()
                if failure:
                    failures += 1
                    print(f"seed {seed}, {name}, {arguments[0]}: {failure}", flush=True)
    print(f"{args.runs} mutated configs, each planned and run: {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
