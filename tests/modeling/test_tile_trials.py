"""What was tried of products by tiles is kept for other processes, and tried again where anything that decides is different."""

import dataclasses
from pathlib import Path

import pytest
import torch

from layerstream.pipeline.modeling import tile_trials
from layerstream.pipeline.modeling.packed_rows import PackedRows, RowRun
from layerstream.pipeline.modeling.tile_trials import exact_tokens

ROWS = PackedRows(
    matrices=(),
    dtype=torch.bfloat16,
    rows=9216,
    columns=2048,
    runs=(RowRun(0, 0, 9216),),
    transposed=False,
    order=None,
)
SMALL = dataclasses.replace(ROWS, rows=640, columns=512, runs=(), order=torch.arange(640))


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """The shapes that are tried; each call of ``exact_tokens`` is as in a new process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []
    real = tile_trials._tried

    def counted(height, step, columns, dtype, **kwargs):
        found.append((height, columns))
        return real(height, step, columns, dtype, **kwargs)

    monkeypatch.setattr(tile_trials, "_tried", counted)
    return found


def tokens(rows):
    tile_trials._known_or_tried.cache_clear()
    return exact_tokens(rows)


def test_a_second_process_does_not_try_again(trials):
    first = tokens(SMALL)
    assert tokens(SMALL) == first
    assert trials == [(640, 512)]
    other = dataclasses.replace(SMALL, rows=768, order=torch.arange(768))
    tokens(other)
    tokens(dataclasses.replace(SMALL, dtype=torch.float32))
    assert tokens(SMALL) == first
    assert len(trials) == 3  # another shape, another dtype


def test_a_process_that_has_set_the_precision_of_products_tries_anew(trials):
    tokens(SMALL)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        tokens(SMALL)
    finally:
        matmul.fp32_precision = before
    assert len(trials) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2"),
        lambda patch: patch.setattr(tile_trials, "processor_features", lambda: "another"),
        lambda patch: patch.setattr(torch, "__version__", "9.9"),
        lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77),
    ],
    ids=["variable", "processor", "torch", "threads"],
)
def test_what_decides_the_order_of_sums_decides_whether_it_is_tried(trials, monkeypatch, change):
    tokens(SMALL)
    change(monkeypatch)
    tokens(SMALL)
    assert len(trials) == 2


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"a": 7}', '{"a": true}', '{"a": "1"}', "[" * 9999]
)
def test_a_damaged_file_is_replaced(trials, tmp_path: Path, content):
    first = tokens(SMALL)
    (kept,) = tmp_path.rglob("tiles-*.json")
    good = kept.read_text()
    kept.write_text(content)
    assert tokens(SMALL) == first
    assert len(trials) == 2
    assert kept.read_text() == good


def test_without_a_folder_it_is_tried_each_time(trials, monkeypatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tokens(SMALL) == tokens(SMALL)
    assert len(trials) == 2


def test_what_was_not_tried_for_want_of_memory_is_not_kept(trials, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tile_trials, "host_available_bytes", lambda: 1 << 20)
        assert tokens(ROWS) == 0
    assert not trials
    assert exact_tokens(ROWS) in {None, 0, 1, 2, 3, 5, 8}
    assert len(trials) == 1


def test_what_a_budget_leaves_bounds_the_trial(trials, monkeypatch):
    takes = []
    real = tile_trials._trial_bytes

    def noted(*args, **kwargs):
        takes.append(real(*args, **kwargs))
        return takes[-1]

    monkeypatch.setattr(tile_trials, "_trial_bytes", noted)
    assert exact_tokens(ROWS, most_bytes=0) == 0
    assert not trials
    assert exact_tokens(ROWS, most_bytes=takes[0] - 1) == 0
    assert not trials
    exact_tokens(ROWS, most_bytes=takes[0])
    assert trials == [(9216, 2048)]


def test_what_was_tried_with_more_memory_holds_with_less(trials, monkeypatch):
    tall = dataclasses.replace(SMALL, rows=16 * 512, order=torch.arange(16 * 512))
    monkeypatch.setattr(tile_trials, "tile_rows", lambda *_: 512)
    monkeypatch.setattr(tile_trials, "_TRIED_BYTES", 4 << 20)
    first = tokens(tall)
    assert trials == [(4096, 512)]
    assert exact_tokens(tall, most_bytes=0) == first
    assert len(trials) == 1
