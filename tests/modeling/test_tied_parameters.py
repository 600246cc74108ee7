"""Tied parameters of a streamed model are listed once, under the names that transformers lists."""

from pathlib import Path

import pytest
import transformers
from support.loop import run
from support.models import CASES, save_model
from support.streaming import SMALL

from layerstream.pipeline import StreamedModel


@pytest.mark.parametrize("case", ["llama", "llama-tied", "gpt2", "t5", "bert", "opt", "marian"])
def test_parameters_are_those_of_the_unstreamed_model(tmp_path: Path, case: str) -> None:
    folder = save_model(tmp_path / "model", case)
    reference = getattr(transformers, CASES[case].model).from_pretrained(folder)

    async def main() -> None:
        async with StreamedModel.open(folder, device="cpu", workload=SMALL, measure=False) as model:
            module = model.module
            assert module.num_parameters() == reference.num_parameters()
            for options in ({}, {"prefix": "a.b"}, {"recurse": False}, {"remove_duplicate": False}):
                names = [name for name, _ in module.named_parameters(**options)]
                assert sorted(names) == sorted(n for n, _ in reference.named_parameters(**options))

    run(main())
