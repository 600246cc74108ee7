"""Layers whose modules have names that the library uses, too."""

from pathlib import Path
from typing import Any

import torch
import transformers
from support.loop import run
from support.streaming import SMALL
from torch import nn

from layerstream.pipeline import StreamedModel


class Doubling(transformers.PreTrainedModel):
    """Computes with a module called ``shared``, and with a parameter that belongs to no module of its own."""

    config_class = transformers.LlamaConfig

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        self.shared = nn.Linear(32, 32)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32)) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(32))
        self.post_init()

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        hidden: Any = self.shared(inputs_embeds)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden * self.scale + self.shared(inputs_embeds)


def test_a_module_called_shared_does_not_lose_its_layer_to_the_weights_that_belong_to_none(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = Doubling(transformers.LlamaConfig(hidden_size=32, num_hidden_layers=3))
    nn.init.normal_(model.scale)
    model.save_pretrained(tmp_path)
    inputs = torch.randn(1, 4, 32)
    expected = model(inputs)

    async def main() -> torch.Tensor:
        options = {"device": "cpu", "workload": SMALL, "measure": False, "model_class": Doubling}
        async with StreamedModel.open(tmp_path, **options) as streamed:
            output: torch.Tensor = await streamed.forward(inputs_embeds=inputs)
            return output

    assert torch.equal(run(main()), expected)
