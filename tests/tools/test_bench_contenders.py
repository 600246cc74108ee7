"""Contenders of ``layerstream bench``: which can run, and why the others cannot."""

import argparse
from pathlib import Path

import pytest
from support.contenders import save_llama_server, save_program

from layerstream.tools.compare.contenders import PEER_NAMES, select_contenders


def arguments(**options: object) -> argparse.Namespace:
    defaults = {"python": [], "llama_cpp": None, "gguf": None, "memory_limit": None}
    return argparse.Namespace(**defaults | {"cold": False, "warm": False, "against": []} | options)


def test_contenders_that_are_not_installed_or_do_not_fit_are_named_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    bare = str(save_program(tmp_path / "bare", "print([False, False])".replace("F", "f")))
    python = [("accelerate", bare), ("airllm", bare)]
    args = arguments(against=list(PEER_NAMES), python=python)
    selection = select_contenders(args, files=[], model_bytes=2 << 30, free_bytes=1 << 30)
    assert [each.name for each in selection.contenders] == ["layerstream", "raw read"]
    why = {each.name: each.why for each in selection.left_out}
    assert "3 GiB are needed, 1 GiB are free" in why["transformers, all in memory"]
    assert f"{bare} -m pip install accelerate" in why["accelerate"]
    assert f"{bare} -m pip install airllm" in why["airllm"]
    assert "--llama-cpp FOLDER" in why["llama.cpp"]
    save_llama_server(tmp_path / "bin")
    selection = select_contenders(
        arguments(against=["llama.cpp"], llama_cpp=tmp_path / "bin", warm=True),
        files=[],
        model_bytes=1,
        free_bytes=8 << 30,
    )
    why = {each.name: each.why for each in selection.left_out}
    assert "--gguf FILE" in why["llama.cpp"]
    assert "past the page cache" in why["raw read"]


def test_with_a_memory_limit_accelerate_also_runs_with_its_memory_filled(tmp_path: Path) -> None:
    python = str(save_program(tmp_path / "python", "print('[true, true]')"))
    selection = select_contenders(
        arguments(against=["accelerate"], python=[("accelerate", python)], memory_limit=2 << 30),
        files=[],
        model_bytes=1 << 30,
        free_bytes=8 << 30,
    )
    limited = {each.name: each.limited for each in selection.contenders}
    assert limited["accelerate, all on disk"]
    assert limited["accelerate, memory filled"]
    assert limited["transformers, mapped"]
    assert not limited["transformers, all in memory"]
