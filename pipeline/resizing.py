"""``resize_token_embeddings`` of a streamed model: its tables and head become resident weights, with rows as transformers makes them."""

import functools
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from torch import nn

from layerstream.pipeline.checkpoint.source_reader import SourceReader
from layerstream.pipeline.modeling.edits import streams
from layerstream.pipeline.modeling.weight_sources import read_weight, reading_bytes
from layerstream.pipeline.opening import Opening
from layerstream.pipeline.scheduling.engine import Engine

__all__ = ["resizing_method"]

_FLOAT32_BYTES = 4


def resizing_method(kind: type[Any], opening: Opening, engine: Engine) -> Callable[..., nn.Module]:
    """``resize_token_embeddings`` of ``kind``, transformers' class, for the model that ``engine`` runs."""
    traced, checkpoint = opening.assembly.traced, opening.checkpoint

    @functools.wraps(kind.resize_token_embeddings)
    def resize_token_embeddings(
        self: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        def resize() -> nn.Module:
            resized: nn.Module = kind.resize_token_embeddings(
                self, new_num_tokens, pad_to_multiple_of, mean_resizing
            )
            return resized

        if new_num_tokens is None and pad_to_multiple_of is None:
            return resize()
        engine.passes.refuse_on_loop()
        modules = {
            id(each): each
            for each in (self.get_input_embeddings(), self.get_output_embeddings())
            if each
        }
        paths = {path: each for path, each in self.named_modules() if id(each) in modules}
        streamed = {
            traced.aliases.get(name, name): (owner, leaf)
            for path, owner in paths.items()
            for leaf, parameter in owner.named_parameters(recurse=False)
            if streams(parameter)
            for name in [f"{path}.{leaf}"]
        }
        recipes = {name: traced.recipes[name] for name in streamed}
        rows = new_num_tokens or 0
        needed = sum(reading_bytes(recipe, checkpoint) for recipe in recipes.values())
        needed += sum(_resizing_bytes(owner.weight, rows) for owner in paths.values())
        with engine.requests.borrowed("resize_token_embeddings", needed):
            with closing(SourceReader(checkpoint, guard=engine.requests.guard)) as reader:
                for name, (owner, leaf) in streamed.items():
                    place = getattr(owner, leaf)
                    place.data = read_weight(recipes[name], reader).to(place.device)
            head = self.get_output_embeddings()
            embeddings = resize()
            _keep_module(self, head)
            for owner in paths.values():
                table = owner._parameters  # noqa: SLF001
                for leaf in table:
                    opening.assembly.edits.found((table, leaf))
        return embeddings

    return resize_token_embeddings


def _resizing_bytes(weight: torch.Tensor, rows: int) -> int:
    """What transformers takes to make ``weight`` a table of so many rows, which it draws as the old ones are distributed."""
    old_rows, width = weight.shape
    new = max(rows, old_rows) * width * weight.element_size()
    return new + 3 * old_rows * width * _FLOAT32_BYTES + 4 * width * width * _FLOAT32_BYTES


def _keep_module(model: Any, head: nn.Module | None) -> None:
    """Have the new weights of the head in the module that was there: hooks, and clones of requests under way, know that one."""
    new = model.get_output_embeddings()
    if head is None or new is head:
        return
    for leaf, parameter in new.named_parameters(recurse=False):
        setattr(head, leaf, parameter)
    head.out_features = new.out_features
    model.set_output_embeddings(head)
