"""Rows of tables are read from any number of parts, in any number of files, of the version that was opened."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerstream.pipeline.checkpoint.formats.format import WeightFile
from layerstream.pipeline.modeling.gathered_table import GatheredTable
from layerstream.pipeline.modeling.table_source import TableSource
from layerstream.stages.batch import Extent
from layerstream.stages.errors import ReadError
from layerstream.stages.readers.files import FileVersion

ROWS, WIDTH = 50, 16


def weight_file(path: Path, version: FileVersion | None = None) -> WeightFile:
    return WeightFile(name=path.name, path=path, size_bytes=path.stat().st_size, version=version)


@given(
    st.lists(st.integers(0, ROWS - 1)),
    st.sets(st.integers(1, ROWS - 1)),
    st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS),
    st.randoms(),
)
def test_rows_in_any_number_of_parts_and_files_are_found_and_read_once(
    tmp_path_factory: pytest.TempPathFactory,
    wanted: list[int],
    cuts: set[int],
    gaps: list[int],
    random: Any,
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    table = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    parts = list(itertools.pairwise([0, *sorted(cuts), ROWS]))
    written = {0: b"", 1: b""}
    extents: dict[int, Extent] = {}
    for number in random.sample(range(len(parts)), len(parts)):  # in any order in the files
        begin, end = parts[number]
        file = random.choice([0, 1])
        written[file] += bytes(gaps[number])
        data = table[begin:end].numpy().tobytes()
        extents[number] = Extent(file=file, offset=len(written[file]), nbytes=len(data))
        written[file] += data
    paths = [folder / "0", folder / "1"]
    for file, path in enumerate(paths):
        path.write_bytes(written[file])
    read: list[int] = []
    with (
        TableSource({0: weight_file(paths[0]), 1: weight_file(paths[1])}) as source,
        pytest.MonkeyPatch.context() as patch,
    ):
        weight = GatheredTable(
            source,
            extents=[extents[number] for number in range(len(parts))],
            shape=(ROWS, WIDTH),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        read_into = source.read_into
        patch.setattr(
            source,
            "read_into",
            lambda spans: (read.extend(len(span.buffer) for span in spans), read_into(spans)),
        )
        indices = torch.tensor(wanted, dtype=torch.int64)
        assert torch.equal(torch.nn.functional.embedding(indices, weight), table[indices])
        assert sum(read) == len(set(wanted)) * WIDTH * 4
        assert torch.equal(weight + 0, table)


def test_a_file_that_was_replaced_since_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_bytes(bytes(100))
    version = FileVersion.of(path.stat())
    path.rename(tmp_path / "old")
    path.write_bytes(bytes(100))
    with pytest.raises(ReadError, match="replaced by another file"):
        TableSource({3: weight_file(path, version)})
