"""Rows gathered from the file are the table's rows; other uses read a small table whole, and raise for a large one."""

import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerstream.pipeline.checkpoint.formats.format import WeightFile
from layerstream.pipeline.modeling import gathered_table
from layerstream.pipeline.modeling.gathered_table import GatheredTable
from layerstream.pipeline.modeling.table_source import FileSpan, TableSource
from layerstream.stages.batch import Extent
from layerstream.stages.errors import ClosedError, ModelError, ReadError

ROWS, WIDTH, OFFSET = 50, 16, 13  # the offset has no alignment, as in real files
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def write_table(path: Path, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Write a table between other bytes, and return it."""
    table = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    path.write_bytes(bytes(OFFSET) + table.view(torch.uint8).numpy().tobytes() + bytes(7))
    return table


def source_of(*paths: Path) -> TableSource:
    return TableSource(
        {
            number: WeightFile(name=path.name, path=path, size_bytes=path.stat().st_size)
            for number, path in enumerate(paths)
        }
    )


def whole(dtype: torch.dtype = torch.bfloat16, offset: int = OFFSET) -> tuple[Extent, ...]:
    return (Extent(file=0, offset=offset, nbytes=ROWS * WIDTH * dtype.itemsize),)


def gathered(
    source: TableSource, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> GatheredTable:
    return GatheredTable(
        source,
        extents=whole(dtype),
        shape=(ROWS, WIDTH),
        dtype=dtype,
        device=torch.device(device),
    )


@pytest.fixture
def table(tmp_path: Path) -> torch.Tensor:
    return write_table(tmp_path / "table")


@pytest.fixture
def source(tmp_path: Path, table: torch.Tensor) -> Iterator[TableSource]:  # noqa: ARG001
    with source_of(tmp_path / "table") as source:
        yield source


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_gathered_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    table = write_table(tmp_path / "table", dtype)
    with source_of(tmp_path / "table") as source:
        indices = torch.tensor([[0, 49, 3], [3, 4, 5]])
        found = torch.nn.functional.embedding(indices, gathered(source, dtype))
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), table[indices].view(torch.uint8))


@given(st.lists(st.integers(0, ROWS - 1)), st.integers(1, 5 * WIDTH * 2))
def test_any_indices_in_any_order_are_found_with_any_scratch(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[int], scratch_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("table") / "table"
    table = write_table(path)
    indices = torch.tensor(wanted, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch, source_of(path) as source:
        patch.setattr(gathered_table, "_SCRATCH_BYTES", scratch_bytes)
        found = torch.nn.functional.embedding(indices, gathered(source))
    assert torch.equal(found, table[indices])


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_indices_of_any_shape_give_rows_of_that_shape(
    source: TableSource, table: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    indices = torch.randint(0, ROWS, shape, dtype=dtype)
    found = torch.nn.functional.embedding(indices, gathered(source), padding_idx=-1)
    assert torch.equal(found, torch.nn.functional.embedding(indices, table))
    with torch.inference_mode():
        assert torch.equal(torch.embedding(gathered(source), indices), found)


@pytest.mark.parametrize("index", [-1, ROWS])
def test_an_index_out_of_range_raises_what_torch_raises(
    source: TableSource, table: torch.Tensor, index: int
) -> None:
    indices = torch.tensor([0, index])
    for weight in (table, gathered(source)):
        with pytest.raises(IndexError, match="index out of range in self"):
            torch.nn.functional.embedding(indices, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
def test_indices_of_another_dtype_raise_what_torch_raises(
    source: TableSource, table: torch.Tensor, dtype: torch.dtype
) -> None:
    for weight in (table, gathered(source)):
        with pytest.raises(RuntimeError, match="scalar types: Long, Int"):
            torch.nn.functional.embedding(torch.ones(2, dtype=dtype), weight)


def test_adjacent_rows_are_read_at_once(
    source: TableSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans: list[tuple[int, int]] = []
    read_into = source.read_into

    def read(requested: list[FileSpan]) -> None:
        spans.extend((span.offset, len(span.buffer)) for span in requested)
        read_into(requested)

    monkeypatch.setattr(source, "read_into", read)
    torch.nn.functional.embedding(torch.tensor([6, 5, 9, 5, 7]), gathered(source))
    row = WIDTH * 2
    assert spans == [(OFFSET + 5 * row, 3 * row), (OFFSET + 9 * row, row)]


def test_a_table_behaves_like_a_parameter(source: TableSource, table: torch.Tensor) -> None:
    weight = gathered(source)
    module = torch.nn.Embedding(ROWS, WIDTH, _weight=table.clone())
    module.weight = weight
    module.eval().requires_grad_(requires_grad=False).to("cpu").to(torch.bfloat16)
    assert module.weight is weight
    assert dict(module.named_parameters())["weight"] is weight
    assert isinstance(module.state_dict()["weight"], GatheredTable)
    assert weight.shape == weight.size() == table.shape
    assert weight.dtype == table.dtype
    assert weight.device == table.device
    assert (weight.dim(), weight.numel(), weight.element_size()) == (2, ROWS * WIDTH, 2)
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert "table" in repr(weight)


REFUSED: dict[str, Callable[[GatheredTable], Any]] = {
    "linear": lambda table: torch.nn.functional.linear(torch.ones(1, WIDTH).bfloat16(), table),
    "row": lambda table: table[0],
    "transpose": lambda table: table.T,
    "sum": torch.sum,
    "cast": lambda table: table.float(),
    "move": lambda table: table.to("meta"),
    "clone": lambda table: table.clone(),
    "dlpack": torch.from_dlpack,
    "share": GatheredTable.share_memory_,
    "renormalise": lambda table: torch.nn.functional.embedding(
        torch.tensor([1]), table, max_norm=1.0
    ),
    "write": torch.nn.init.zeros_,
}


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_any_other_use_of_a_large_table_raises(
    source: TableSource, use: Callable[[GatheredTable], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathered_table, "SMALL_WEIGHT_BYTES", 0)
    with pytest.raises(ModelError, match=r"takes the whole table.*let the table stream"):
        use(gathered(source))


def test_a_table_is_not_pickled(source: TableSource) -> None:
    with pytest.raises(ModelError, match="that streams cannot be copied or pickled"):
        pickle.dumps(gathered(source))


def test_a_small_table_may_be_read_whole_but_not_written(
    source: TableSource, table: torch.Tensor
) -> None:
    small = gathered(source)
    assert torch.equal(small[3:].t(), table[3:].t())
    with pytest.raises(ModelError, match="zero_"):
        torch.nn.init.zeros_(small)


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_table_read_whole_lies_in_memory_as_with_transformers(
    tmp_path: Path, *, is_copied: bool
) -> None:
    table = write_table(tmp_path / "table", torch.float32)
    (tmp_path / "table").write_bytes(bytes(20) + table.numpy().tobytes())
    with source_of(tmp_path / "table") as source:
        small = GatheredTable(
            source,
            extents=whole(torch.float32, offset=20),
            shape=(ROWS, WIDTH),
            dtype=torch.float32,
            device=torch.device("cpu"),
            is_copied=is_copied,
        )
        assert small.t().data_ptr() % 64 == (0 if is_copied else 20)


def test_a_table_has_two_dimensions(source: TableSource) -> None:
    with pytest.raises(ModelError, match=r"not the shape \(3,\)"):
        GatheredTable(
            source, extents=whole(), shape=(3,), dtype=torch.bfloat16, device=torch.device("cpu")
        )


def test_a_file_that_shrinks_is_an_error_not_zeros(source: TableSource) -> None:
    os.truncate(source.path(0), OFFSET + 9 * WIDTH * 2 + 1)
    for row in (8, 9):  # before the end, and behind it
        with pytest.raises(ReadError, match=r"table.* 302 bytes"):
            torch.nn.functional.embedding(torch.tensor([row]), gathered(source))


def test_a_file_that_was_written_to_is_an_error(source: TableSource) -> None:
    with source.path(0).open("r+b") as stream:
        stream.write(b"\1")
    with pytest.raises(ReadError, match="table: was written to"):
        torch.nn.functional.embedding(torch.tensor([8]), gathered(source))


def test_short_reads_are_continued(
    source: TableSource, table: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:5]], offset)
    )
    found = torch.nn.functional.embedding(torch.tensor([1, 2, 30]), gathered(source))
    assert torch.equal(found, table[[1, 2, 30]])


def test_a_missing_file_and_a_failing_disk_are_read_errors(
    tmp_path: Path, source: TableSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = WeightFile(name="nowhere", path=tmp_path / "nowhere", size_bytes=1)
    with pytest.raises(ReadError, match=r"nowhere: cannot be opened: No such file"):
        TableSource({0: nowhere})

    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ReadError, match=r"table: reading at offset 45 failed: Input/output error"):
        torch.nn.functional.embedding(torch.tensor([1]), gathered(source))


def test_a_closed_source_is_not_read(source: TableSource) -> None:
    source.close()
    source.close()
    with pytest.raises(ClosedError, match=r"table was closed"):
        torch.nn.functional.embedding(torch.tensor([1]), gathered(source))


def test_closing_lets_a_read_in_progress_end(
    source: TableSource, table: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, closed = threading.Event(), threading.Event()
    preadv = os.preadv
    descriptors = []

    def slow(file: int, buffers: Any, offset: int) -> int:
        descriptors.append(file)
        reading.set()
        assert closed.wait(10)
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    found = []
    weight = gathered(source)
    thread = threading.Thread(
        target=lambda: found.append(torch.nn.functional.embedding(torch.tensor([4]), weight))
    )
    thread.start()
    assert reading.wait(10)
    source.close()
    closed.set()
    thread.join(10)
    assert torch.equal(found[0], table[[4]])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])


def test_many_threads_may_look_up_at_once(source: TableSource, table: torch.Tensor) -> None:
    weight = gathered(source)
    wrong = []

    def look_up(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            indices = torch.randint(0, ROWS, (9,), generator=generator)
            if not torch.equal(torch.nn.functional.embedding(indices, weight), table[indices]):
                wrong.append(indices)

    threads = [threading.Thread(target=look_up, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_come_out_on_the_device_of_the_indices(
    source: TableSource, table: torch.Tensor
) -> None:
    indices = torch.randint(0, ROWS, (3, 4))
    weight = gathered(source, device="cuda:0")
    assert weight.is_cuda
    found = torch.nn.functional.embedding(indices.to("cuda:0"), weight)
    assert found.is_cuda
    assert torch.equal(found.cpu(), table[indices])
