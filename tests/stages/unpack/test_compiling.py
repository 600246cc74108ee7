"""How kernels are compiled and kept: folders that cannot be used, processes without numba, threads."""

import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.packed import assert_equal_bits

from layerstream.stages.unpack import compiling
from layerstream.stages.unpack.gguf import GGUF_BLOCKS, GgufPacking

PACKING = GgufPacking(encoding="Q8_0", columns=64, arithmetic="float32")
PACKED = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (512, 68), dtype=np.uint8))


@pytest.fixture
def folder(kernel_folder, tmp_path):
    """A cache folder of the test's own; kernels compiled before are forgotten."""
    compiling.set_cache_folder(tmp_path / "kernels")
    yield tmp_path / "kernels"
    compiling.set_cache_folder(kernel_folder)


def unpacked(packed=PACKED):
    out = torch.empty(len(packed), 64)
    PACKING.unpack([packed], 0, out)
    return out


def in_a_fresh_interpreter(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()


def test_importing_and_describing_packings_neither_imports_numba_nor_compiles():
    code = """
import sys
from layerstream.stages.unpack import compiling, fp8, gguf, integers, mxfp4, packing
gguf.GgufPacking(encoding="Q8_0", columns=32, arithmetic="float32")
print("numba" in sys.modules, "llvmlite" in sys.modules)
"""
    assert in_a_fresh_interpreter(code) == ["False", "False"]


def test_without_numba_torch_unpacks_the_same_and_a_line_says_so():
    code = """
import sys
sys.modules["numba"] = None
import torch
from layerstream.stages.unpack import compiling, gguf
out = torch.empty(1, 32)
packed = torch.arange(34, dtype=torch.uint8)[None]
gguf.GgufPacking(encoding="Q8_0", columns=32, arithmetic="float32").unpack([packed], 0, out)
print(out[0, 5].item(), compiling.why_not_compiled())
"""
    number, *line = in_a_fresh_interpreter(code)
    scale = np.array([0, 1], np.uint8).view(np.float16).astype(np.float32)[0]
    assert float(number) == scale * 7
    assert " ".join(line) == (
        "Weights are unpacked by torch, which is slow: install numba to compile the kernels."
    )


def test_the_next_process_takes_compiled_kernels_from_the_folder(folder):
    unpacked()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.nb?")}
    assert {path.suffix for path in kept} == {".nbi", ".nbc"}
    compiling.set_cache_folder(folder)
    unpacked()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.nb?")} == kept


def test_kernels_that_different_processes_have_compiled_do_not_run_in_one_anothers_place(tmp_path):
    code = """
import sys
import torch
from layerstream.stages.unpack import compiling
from layerstream.stages.unpack.samples import sample
folder, *encodings = sys.argv[1:]
compiling.set_cache_folder(folder)
for encoding in encodings:
    packing, parts = sample(encoding, rows=2)
    parts[0].copy_(torch.arange(parts[0].numel()).view(parts[0].shape) % 59)
    plain, product = torch.empty(2, 4096), torch.empty(1, 2)
    packing.unpack(parts, 0, plain)
    packing.multiply(parts, 0, torch.ones(1, 4096), product)
    print((product - plain.sum(1)).abs().max() <= 1e-5 * plain.abs().sum(1).max())
    print(plain[0, :64].tolist())
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    encodings = "Q4_K", "Q8_0"
    alone = [subprocess.check_output([*command, each], text=True) for each in encodings]
    together = subprocess.check_output([*command, *encodings], text=True)
    assert together == "".join(alone)
    assert together.count("True") == 2


@pytest.mark.usefixtures("folder")
def test_a_folder_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "file").touch()
    expected = unpacked()
    compiling.set_cache_folder(tmp_path / "file" / "kernels")
    assert_equal_bits(unpacked(), expected)


def test_damaged_files_in_the_folder_are_done_without(folder, caplog):
    expected = unpacked()
    for path in folder.rglob("*.nb?"):
        path.write_bytes(b"damaged")
    compiling.set_cache_folder(folder)
    assert_equal_bits(unpacked(), expected)
    assert "not used for compiled kernels" in caplog.text


@pytest.mark.usefixtures("folder")
def test_the_seconds_that_compiling_takes_are_counted():
    unpacked()
    seconds = compiling.compile_seconds()["q8_0"]
    assert seconds > 0
    unpacked()
    assert compiling.compile_seconds()["q8_0"] == seconds


@pytest.mark.usefixtures("folder")
def test_threads_may_unpack_at_once_before_anything_is_compiled():
    expected = unpacked()
    compiling.set_cache_folder(None)
    results = []
    threads = [threading.Thread(target=lambda: results.append(unpacked())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        assert_equal_bits(result, expected)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("encoding", ["IQ4_NL", "MXFP4"])
def test_processors_without_a_byte_shuffle_choose_levels_bit_by_bit(encoding, monkeypatch):
    lanes = pytest.importorskip("layerstream.stages.unpack.kernels.lanes")
    nbytes = GGUF_BLOCKS[encoding].nbytes
    packed = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (99, nbytes), np.uint8))
    packing = GgufPacking(encoding=encoding, columns=32, arithmetic="float32")
    expected, values = torch.empty(99, 32), torch.empty(99, 32)
    packing.unpack([packed], 0, expected)
    monkeypatch.setattr(lanes, "platform", SimpleNamespace(machine=lambda: "another"))
    compiling.set_cache_folder(None)
    packing.unpack([packed], 0, values)
    assert_equal_bits(values, expected)
