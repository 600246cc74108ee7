"""Models, budgets and devices that cannot be used are refused with the reason, and leave nothing behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import save_model

from layerstream.pipeline import (
    Budget,
    CheckpointError,
    DeviceError,
    ModelError,
    PlanError,
    StreamedModel,
)


def lacks_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def has_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors")


def has_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def has_an_unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')


def has_a_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lacks_a_tensor, r"lacks 1 .*model\.layers\.1\.mlp\.up_proj\.weight"),
        (has_another_shape, r"model\.norm\.weight .*\(32,\).*\(7,\)"),
        (has_no_config, r"config\.json"),
        (has_an_unknown_type, "no-such-model"),
        (has_a_broken_config, r"config\.json"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_model_that_does_not_match_its_files_is_refused(
    damage: Any, message: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    damage(folder)

    async def main() -> None:
        async with StreamedModel.open(folder, device="cpu"):
            pass

    with nothing_left_behind(), pytest.raises((ModelError, CheckpointError), match=message):
        run(main())


def test_the_error_for_a_small_budget_says_what_is_there_and_needed_and_how_to_solve_it(
    tmp_path: Path,
) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with StreamedModel.open(folder, device="cpu", budget=Budget(host="1MiB")):
            pass

    with nothing_left_behind(), pytest.raises(PlanError, match=r"1 MiB .* needed .* raise the"):
        run(main())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_missing_device_is_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with StreamedModel.open(folder, device="cuda:0"):
            pass

    with nothing_left_behind(), pytest.raises(DeviceError, match="cuda:0 was asked for"):
        run(main())
