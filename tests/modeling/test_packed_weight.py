"""Tiles are shared by computations, and packed weights fail as plain ones do."""

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loop import run
from support.quantized import save_quantised
from torch.utils._python_dispatch import TorchDispatchMode

from layerstream.pipeline import StreamedModel
from layerstream.pipeline.modeling.packed_rows import PackedMatrix, PackedRows, RowRun
from layerstream.pipeline.modeling.packed_tiles import Tiles
from layerstream.pipeline.modeling.packed_weight import PackedWeight, exact_tile_bytes
from layerstream.pipeline.modeling.tile_trials import exact_tokens
from layerstream.stages.unpack.integers import IntPacking


def test_as_many_computations_as_there_are_tiles_run_at_once_and_others_wait() -> None:
    tiles = Tiles(nbytes=64, count=2)
    began, go_on = [threading.Event() for _ in range(3)], threading.Event()

    def compute(number: int) -> None:
        with tiles.tile() as memory:
            assert memory.numel() == 64
            began[number].set()
            go_on.wait(10)

    threads = [threading.Thread(target=compute, args=(number,)) for number in range(3)]
    for thread in threads[:2]:
        thread.start()
    assert all(event.wait(10) for event in began[:2])
    threads[2].start()
    assert not began[2].wait(0.05)
    go_on.set()
    assert began[2].wait(10)
    for thread in threads:
        thread.join(10)
    tiles.close()


def test_a_thread_that_has_the_only_tile_gets_another_instead_of_waiting_for_itself() -> None:
    tiles = Tiles(nbytes=64, count=1)
    with tiles.tile() as one, tiles.tile() as other:
        assert one.data_ptr() != other.data_ptr()
    with tiles.tile() as again:
        assert again.data_ptr() == one.data_ptr()
    tiles.close()


@pytest.mark.parametrize("kernels", ["exact", "fused"])
def test_inputs_that_do_not_fit_are_refused_as_by_a_plain_weight(
    tmp_path: Path, kernels: str
) -> None:
    folder = save_quantised(tmp_path / "model", "llama", "fp8-blocks")
    seen = []

    async def main() -> None:
        async with StreamedModel.open(folder, kernels=kernels) as model:
            layer = model.module.model.layers[1].mlp

            def look(module: torch.nn.Module, _inputs: object) -> None:
                for inputs in (torch.ones(1, 64).bfloat16(), torch.ones(1, 32)):
                    with pytest.raises(RuntimeError):  # twice the columns; another dtype
                        module.up_proj(inputs)
                    seen.append(inputs)

            layer.register_forward_pre_hook(look)
            await model.forward(input_ids=torch.tensor([[5]]))

    run(main())
    assert len(seen) == 2


def test_the_time_of_unpacking_is_counted_tile_by_tile() -> None:
    tiles = Tiles(nbytes=64, count=1)
    began = time.perf_counter()
    for nbytes in (7, 9):
        with tiles.unpacking(nbytes):
            pass
    times = tiles.times()
    assert (times.items, times.bytes) == (2, 16)
    assert began <= times.spans[0].start_seconds <= times.spans[1].stop_seconds
    tiles.close()


def cancelling_weight(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    *,
    is_scattered: bool,
    requires_grad: bool = False,
) -> tuple[PackedWeight, torch.Tensor, torch.Tensor]:
    """A weight whose halves are each other's negative, in another order; its numbers, and that order."""
    generator = torch.Generator().manual_seed(1)
    half = torch.randint(-127, 128, (rows, columns // 2), generator=generator)
    order = torch.randperm(columns // 2, generator=generator)
    places = torch.randperm(rows, generator=generator) if is_scattered else None
    numbers = torch.cat([half, -half[:, order]], dim=1) + 128
    parts = {"w": numbers.to(torch.uint8).view(torch.int32), "s": torch.ones(rows, 1).bfloat16()}
    packing = IntPacking(bits=8, columns=columns)
    packed_rows = PackedRows(
        matrices=(PackedMatrix(packing=packing, parts=("w", "s"), rows=rows, columns=columns),),
        dtype=dtype,
        rows=rows,
        columns=columns,
        runs=() if is_scattered else (RowRun(0, 0, rows),),
        transposed=False,
        order=places,
    )
    packed_rows = dataclasses.replace(packed_rows, exact_tokens=exact_tokens(packed_rows))
    tiles = Tiles(nbytes=exact_tile_bytes(packed_rows), count=1)
    weight = PackedWeight(
        packed_rows,
        parts,
        shape=(rows, columns),
        requires_grad=requires_grad,
        tiles=tiles,
    )
    numbers = numbers - 128
    return weight, numbers if places is None else numbers[places], order


@pytest.mark.parametrize("is_scattered", [False, True], ids=["in order", "scattered"])
@pytest.mark.parametrize(("rows", "columns"), [(9216, 2048), (640, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_with_packed_weights_have_the_bits_of_plain_ones_for_any_number_of_tokens(
    dtype: torch.dtype, rows: int, columns: int, *, is_scattered: bool
) -> None:
    """Terms cancel, so that sums in another order differ nearly everywhere: on processors with AMX, those of tiles do."""
    weight, numbers, order = cancelling_weight(rows, columns, dtype, is_scattered=is_scattered)
    generator = torch.Generator().manual_seed(2)
    plain = weight.unpacked()
    assert torch.equal(plain, numbers.to(dtype))
    some = torch.randn((300, columns // 2), generator=generator)
    inputs = torch.cat([some, some[:, order]], dim=1).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    with torch.inference_mode():
        for count in (1, 2, 7, 8, 9, 24, 33, 200, 300):
            expected = torch.nn.functional.linear(inputs[:count], plain)
            found = torch.nn.functional.linear(inputs[:count], weight)
            assert torch.equal(found, expected), count
        expected = torch.nn.functional.linear(inputs[:2], plain, bias)
        assert torch.equal(torch.nn.functional.linear(inputs[:2], weight, bias), expected)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("rows", [9216, 640], ids=["tiles", "whole"])
def test_products_take_the_way_of_a_plain_parameter(rows: int, *, requires_grad: bool) -> None:
    """For the last token of a prompt, torch copies a weight that requires no gradients, and no other."""
    weight, _, _ = cancelling_weight(
        rows, 512, torch.bfloat16, is_scattered=False, requires_grad=requires_grad
    )
    plain = torch.nn.Parameter(weight.unpacked(), requires_grad=requires_grad)
    last = torch.ones(1, 5, 512).bfloat16()[:, -1:, :]
    with torch.no_grad():
        assert ("bmm" in operations(last, plain)) is not requires_grad
        assert operations(last, plain) <= operations(last, weight)
        assert ("bmm" in operations(last, weight)) is not requires_grad


def operations(inputs: torch.Tensor, weight: torch.Tensor) -> set[str]:
    found: set[str] = set()

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Operations():
        torch.nn.functional.linear(inputs, weight)
    return found
