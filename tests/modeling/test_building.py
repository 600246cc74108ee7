"""Opening a model changes nothing that another thread computes with, and leaves the process as it was."""

import gc
import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.loop import run
from support.models import CASES, inputs_for, save_model
from support.selection import covering
from support.streaming import open_streaming
from transformers import initialization, modeling_utils
from transformers.integrations import moe

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.building import building_alone
from layerstream.pipeline.modeling.tracing import load_config, trace_model


def what_a_thread_sees() -> list[Any]:
    """Dtypes and functions that a computation may depend on."""
    one = torch.arange(3)
    return [
        torch.get_default_dtype(),
        torch.zeros(1).dtype,
        torch.tensor(0.1).item(),
        (one / 3).tolist(),
        (one * 0.1).tolist(),
        torch.full((1,), 0.1).item(),
        torch.where(one > 1, 0.1, 0.2).dtype,
        torch.linspace(0, 1, 3, device="meta").device.type,
        torch.linspace(0, 1, 3).dtype,
        torch.nn.Linear(1, 1).weight.dtype,
        modeling_utils.local_torch_dtype(torch.float16).func.__module__,
        transformers.PreTrainedModel.tie_weights(transformers.BertModel(SMALL_BERT)),
    ]


SMALL_BERT = transformers.BertConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=10
)


def while_building(monkeypatch: pytest.MonkeyPatch, look: Callable[[], Any], folder: Path) -> Any:
    """What ``look`` sees in another thread, while this one is in the constructor of a bfloat16 model."""
    seen: list[Any] = []
    inside: list[torch.dtype] = []
    construct = transformers.LlamaForCausalLM.__init__

    def slow(self: Any, *args: Any, **kwargs: Any) -> None:
        inside.append(torch.get_default_dtype())
        thread = threading.Thread(target=lambda: seen.append(look()))
        thread.start()
        thread.join(30)
        construct(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", slow)
    checkpoint = Checkpoint.open(folder)
    config, _ = load_config(folder)
    traced = trace_model(checkpoint, config=config, model_class=transformers.LlamaForCausalLM)
    assert inside == [torch.bfloat16]
    assert traced.module.lm_head.weight.dtype is torch.bfloat16
    return seen[0]


def test_another_thread_sees_nothing_of_a_model_that_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model", "llama", torch.bfloat16)
    expected = what_a_thread_sees()
    assert while_building(monkeypatch, what_a_thread_sees, folder) == expected
    assert what_a_thread_sees() == expected


def test_a_computation_has_the_same_bits_while_a_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model", "llama", torch.bfloat16)
    torch.manual_seed(0)
    # Its sinusoidal positions are made anew for longer prompts, in the default dtype.
    config = transformers.MusicgenDecoderConfig(
        hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=20,
        max_position_embeddings=8, num_codebooks=1, pad_token_id=0, bos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(1, 20, (1, 40))

    def logits() -> torch.Tensor:
        torch.manual_seed(0)
        model = transformers.MusicgenForCausalLM(config).eval()
        with torch.no_grad():
            return model(input_ids=ids).logits

    expected = logits()
    found = while_building(monkeypatch, logits, folder)
    assert found.dtype is torch.float32
    assert torch.equal(found, expected)


def models_built(case: str, dtype: torch.dtype) -> list[Any]:
    """The model of ``case`` without weights, as transformers builds it, and as it is built alone."""
    name, config, settings = CASES[case]
    kind = getattr(transformers, name)

    def build() -> Any:
        built = getattr(transformers, config)(**settings)
        with modeling_utils.ContextManagers(kind.get_init_context(dtype, False, False, None)):
            return kind(built)

    with building_alone():
        alone = build()
    return [build(), alone]


@covering(case=list(CASES), dtype=[torch.bfloat16, torch.float16])
def test_a_model_built_alone_has_the_dtypes_of_transformers(case: str, dtype: torch.dtype) -> None:
    found = []
    for model in models_built(case, dtype):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        found.append({name: (each.dtype, each.device, each.shape) for name, each in tensors})
    assert found[0] == found[1]


def state_of_the_process() -> dict[str, Any]:
    """What opening a model might change, and must not."""
    tables = {
        "PreTrainedModel": transformers.PreTrainedModel,
        "torch.nn.init": torch.nn.init,
        "initialization": initialization,
        "modeling_utils": modeling_utils,
        "pytorch_utils": transformers.pytorch_utils,
        "torch": torch,
    }
    functions = {
        (table, name): value
        for table, owner in tables.items()
        for name, value in vars(owner).items()
        if callable(value)
    }
    hooks = torch.nn.modules.module
    return {
        **functions,
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "function modes": torch.overrides._len_torch_function_stack(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "denormal": torch.tensor(1e-40).mul(1).item(),
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32),
        "random": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state()],  # noqa: NPY002 - the global one
        "torch random": torch.get_rng_state().tolist(),
        "warnings": list(warnings.filters),
        "levels": {
            name: logging.getLogger(name).level
            for name in ("", "transformers", "torch", "layerstream", "huggingface_hub")
        },
        "environment": dict(os.environ),
        "hooks": [dict(vars(hooks)[name]) for name in vars(hooks) if name.startswith("_global_")
                  and isinstance(vars(hooks)[name], dict)],
        "attention": list(modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys()),
        "experts": list(moe.ALL_EXPERTS_FUNCTIONS.valid_keys()),
        "exceptions": (sys.excepthook, threading.excepthook, sys.unraisablehook),
        "switching": sys.getswitchinterval(),
        "collector": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
    }  # fmt: skip


@pytest.mark.parametrize("case", ["llama", "qwen3-moe", "gpt-oss", "marian", "wav2vec2"])
def test_opening_and_closing_leave_the_process_as_it_was(case: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", case, torch.bfloat16)
    inputs = inputs_for(case, torch.bfloat16)

    async def main() -> None:
        async with await open_streaming(folder) as model:
            await model.forward(**inputs)

    run(main())  # what is loaded and registered once stays
    before = state_of_the_process()
    run(main())
    after = state_of_the_process()
    assert after.keys() == before.keys()
    assert [key for key in before if before[key] != after[key]] == []


def test_weights_that_no_checkpoint_has_are_drawn_as_from_pretrained_draws_them(
    tmp_path: Path,
) -> None:
    folder = save_model(tmp_path / "model", "bert", model="BertForSequenceClassification")
    kind = transformers.BertForSequenceClassification

    def load() -> Any:
        settings: dict[str, Any] = {"num_labels": 7, "ignore_mismatched_sizes": True}
        torch.manual_seed(3)
        expected = kind.from_pretrained(folder, **settings)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        config, _ = load_config(folder, settings={"num_labels": 7})
        traced = trace_model(
            Checkpoint.open(folder), config=config, model_class=kind, ignore_mismatched_sizes=True
        )
        assert torch.equal(torch.get_rng_state(), before)
        return expected, traced.module

    expected, found = load()
    assert torch.equal(found.classifier.weight, expected.classifier.weight)


def test_the_first_model_registers_nothing_that_others_use(tmp_path: Path) -> None:
    """Names of implementations are added to the registries of transformers, and none is replaced."""
    folder = save_model(tmp_path / "model", "qwen3-moe")
    registries = [modeling_utils.ALL_ATTENTION_FUNCTIONS, moe.ALL_EXPERTS_FUNCTIONS]
    before = [{name: each[name] for name in each.valid_keys()} for each in registries]

    async def main() -> None:
        async with await open_streaming(folder):
            for each, known in zip(registries, before, strict=True):
                assert {name: each[name] for name in known} == known

    run(main())
