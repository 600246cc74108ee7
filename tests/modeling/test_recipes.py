"""Recipes follow any chain of operations exactly."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.traced import equal_with_strides, join_pieces

from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.tracer_tensor import Tracer
from layerstream.stages.errors import ModelError

OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transpose": lambda tensor: tensor.transpose(0, -1),
    "contiguous": lambda tensor: tensor.contiguous(),
    "clone": lambda tensor: tensor.clone(),
    "flatten": lambda tensor: tensor.flatten(),
    "fold": lambda tensor: tensor.reshape(2, -1),
    "unsqueeze": lambda tensor: tensor.unsqueeze(-1),
    "squeeze": lambda tensor: tensor.squeeze(),
    "rows": lambda tensor: tensor[1:],
    "columns": lambda tensor: tensor[..., :-1],
    "every other": lambda tensor: tensor[::2],
    "last": lambda tensor: tensor[-1],
    "halves swapped": lambda tensor: torch.cat(tensor.chunk(2)[::-1]),
    "columns swapped": lambda tensor: torch.cat(tensor.chunk(2, -1)[::-1], -1),
    "stacked inside": lambda tensor: torch.stack([tensor, tensor], -1),
    "stacked": lambda tensor: torch.stack([tensor, tensor.detach()]),
    "unbound": lambda tensor: torch.cat(tensor.unbind()[::-1]) if tensor.dim() > 1 else tensor,
    "padded": lambda tensor: torch.nn.functional.pad(tensor, (0, 1)),
    "unpadded": lambda tensor: torch.nn.functional.pad(tensor, (0, 0)),
    "cast": lambda tensor: tensor.to(torch.float64),
    "bytes": lambda tensor: tensor.contiguous().view(torch.int16),
    "doubled": lambda tensor: tensor * 2,
    "expanded": lambda tensor: tensor.unsqueeze(0).expand(2, *tensor.shape),
    "permuted": lambda tensor: tensor[torch.arange(tensor.shape[0]).flip(0)],
}


@given(st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=6))
def test_any_chain_of_operations_is_followed_exactly(names: list[str]) -> None:
    source = torch.arange(48, dtype=torch.float32).reshape(4, 3, 4)
    tensor: torch.Tensor = source
    tracer: torch.Tensor = Tracer.source("x", shape=source.shape, dtype=source.dtype)
    for name in names:
        try:
            result = OPERATIONS[name](tensor)
        except (RuntimeError, IndexError):
            continue  # torch refuses it for both
        if result.dim():
            tensor, tracer = result, OPERATIONS[name](tracer)
    assert isinstance(tracer, Tracer)
    recipe = Recipe.of("y", tracer)
    assert equal_with_strides(recipe.replay({"x": source}), tensor)
    if recipe.pieces is not None:
        assert equal_with_strides(join_pieces(recipe, {"x": source}), tensor)


def test_a_tensor_of_too_many_runs_is_replayed() -> None:
    tracer = Tracer.source("x", shape=(5000, 2), dtype=torch.float32)
    recipe = Recipe.of("y", torch.cat([tracer[:, 1:], tracer[:, :1]], 1))
    assert recipe.pieces is None


def test_a_tensor_that_is_changed_in_place_is_changed_in_a_copy() -> None:
    tracer = Tracer.source("x", shape=(4,), dtype=torch.float32)
    before = tracer + 0
    tracer[1:].zero_()
    stored = torch.ones(4)
    assert Recipe.of("y", tracer).replay({"x": stored}).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert Recipe.of("y", before).replay({"x": stored}).tolist() == [1.0] * 4
    assert stored.tolist() == [1.0] * 4


@pytest.mark.parametrize("index", [-1, (slice(1, None), 0), ...])
def test_a_number_that_is_assigned_to_a_part_is_in_the_recipe(index: object) -> None:
    stored = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    expected = stored.clone()
    tracer = Tracer.source("x", shape=stored.shape, dtype=stored.dtype)
    for each in (expected, tracer):
        each[index] = -1.0  # type: ignore[index]
    assert torch.equal(Recipe.of("y", tracer).replay({"x": stored}), expected)


def test_a_tensor_that_is_filled_with_random_numbers_has_no_recipe() -> None:
    tracer = Tracer.source("x", shape=(4,), dtype=torch.float32)
    tracer[1:].normal_()
    with pytest.raises(ModelError, match="random numbers into y"):
        Recipe.of("y", tracer)


def test_a_tensor_whose_data_is_set_is_made_from_the_new_data() -> None:
    tracer = Tracer.source("x", shape=(4,), dtype=torch.float32)
    tracer.data = tracer.data * 3
    assert Recipe.of("y", tracer).replay({"x": torch.ones(4)}).tolist() == [3.0] * 4
