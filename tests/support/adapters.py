"""Adapters as PEFT saves them, with random weights that change what the model computes."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

__all__ = ["load_with_peft", "lora", "save_adapter"]


def lora(**settings: Any) -> Any:
    """The config of a LoRA whose weights are random from the beginning."""
    return LoraConfig(
        **{"r": 4, "target_modules": "all-linear", **settings}, init_lora_weights=False
    )


def save_adapter(
    base: Path, folder: Path, config: Any, *, model_class: Any, seed: int = 0, safe: bool = True
) -> Path:
    """Write an adapter of the model in ``base`` to ``folder``; all of its weights are random."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # PEFT's own, of what it is told, and of its use of transformers
        model = get_peft_model(model_class.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, safe_serialization=safe)
    return folder


def load_with_peft(base: Path, folder: Path, *, model_class: Any, **settings: Any) -> Any:
    """The model in ``base`` with the adapter in ``folder``, all in memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(model_class.from_pretrained(base), folder, **settings)
    return model.eval()
