"""An adapter's folder, and the base model that belongs to it: found from names and headers alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from layerstream.pipeline.checkpoint.adapter_folder import AdapterFolder, resolve_sources
from layerstream.stages.errors import CheckpointError


def adapter_in(folder: Path, base: object, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    save_file({"a": torch.zeros(3, 4, dtype=dtype)}, folder / "adapter_model.safetensors")
    return folder


def model_in(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    return folder


def test_a_model_alone_has_no_adapters(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    found = resolve_sources(model)
    assert (found.source, found.model, found.adapters, found.default) == (model, model, (), None)


def test_an_adapter_alone_names_its_base(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    adapter = adapter_in(tmp_path / "adapter", str(model))
    found = resolve_sources(adapter)
    assert (found.source, found.model, found.default) == (adapter, model, "default")
    assert [(each.name, each.path) for each in found.adapters] == [("default", adapter)]
    assert found.documents == (adapter, model)


def test_an_adapter_beside_a_model_belongs_to_that(tmp_path: Path) -> None:
    model = adapter_in(model_in(tmp_path / "model"), "org/another")
    found = resolve_sources(model)
    assert (found.model, found.default) == (model, "default")
    assert found.adapters[0].beside_model


def test_further_adapters_have_names_of_their_own(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    first = adapter_in(tmp_path / "first", str(model))
    second = adapter_in(tmp_path / "second", None)
    found = resolve_sources(model, adapters={"a": first, "b": second})
    assert [each.name for each in found.adapters] == ["a", "b"]
    assert found.default is None
    found = resolve_sources(first, adapters={"b": second})
    assert [each.name for each in found.adapters] == ["default", "b"]
    with pytest.raises(CheckpointError, match=r"'default' is the adapter in .*first itself"):
        resolve_sources(first, adapters={"default": second})
    with pytest.raises(CheckpointError, match="is no name of an adapter"):
        resolve_sources(model, adapters={" ": first})


def test_the_base_of_an_adapter_is_no_model_with_another_one(tmp_path: Path) -> None:
    model = adapter_in(model_in(tmp_path / "model"), None)
    adapter = adapter_in(tmp_path / "adapter", str(model))
    with pytest.raises(CheckpointError, match="which has an adapter of its own"):
        resolve_sources(adapter)


@pytest.mark.parametrize("content", ["[]", "{", "\ud800"])
def test_a_config_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    adapter = adapter_in(tmp_path / "adapter", None)
    (adapter / "adapter_config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        resolve_sources(adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_16_bits_are_planned_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = AdapterFolder.open(adapter_in(tmp_path / "adapter", None, dtype), name="a")
    assert adapter.float32_bytes == 3 * 4 * 4
