"""A request's own generator: found where it samples, and in no one's way where it does not."""

from pathlib import Path
from typing import Any

import torch
from support.loop import run
from support.models import inputs_for, save_model
from support.streaming import SMALL
from torch.overrides import _get_current_function_mode_stack as modes

from layerstream.pipeline import StreamedModel
from layerstream.pipeline.scheduling.sampling_rng import SamplingGenerator


def test_no_mode_is_active_while_a_forward_pass_computes(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    in_layers, between = [], []

    def count_between(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        between.append(len(modes()))
        return scores

    async def main() -> None:
        async with StreamedModel.open(folder, device="cpu", workload=SMALL, measure=False) as model:
            mlp = model.module.model.layers[1].mlp
            mlp.register_forward_hook(lambda *_: in_layers.append(len(modes())))
            options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 4}
            await model.generate(
                **inputs_for("llama"),
                **options,
                generator=torch.Generator(),
                logits_processor=[count_between],
            )

    run(main())
    assert (in_layers, between) == ([0] * 4, [1] * 4)


def test_a_pass_that_an_interrupt_left_leaves_no_mode_behind() -> None:
    with SamplingGenerator(torch.Generator()) as sampling:
        sampling.pause()
    sampling.resume()
    assert modes() == []


def test_under_another_mode_it_stays() -> None:
    with SamplingGenerator(torch.Generator()) as sampling:
        with torch.device("cpu"):
            sampling.pause()
            assert len(modes()) == 2
            sampling.resume()
        assert len(modes()) == 1
    assert modes() == []
