"""Mutated files of torch.save are refused in one sentence, or read exactly as torch.load(weights_only=True) reads them."""

import random
import warnings
import zipfile

import pytest
import torch
from support.mutations import assert_refused_or_read, mutated
from support.torch_files import assert_same, write_archive

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Files, each as the entries of its archive."""
    folder = tmp_path_factory.mktemp("originals")
    whole = torch.arange(60.0).view(5, 12)
    states = [
        {"a": whole, "b": whole.T, "c": whole[1:3, 2:5]},
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).state_dict(),
        {"w": torch.nn.Parameter(torch.ones(3)), "f": torch.ones(4).to(torch.float8_e4m3fn), "i": torch.tensor(7)},
    ]  # fmt: skip
    found = []
    for state in states:
        torch.save(state, folder / "original.bin")
        with zipfile.ZipFile(folder / "original.bin") as archive:
            found.append({name: archive.read(name) for name in archive.namelist()})
    return found


def check(path, checkpoint):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(checkpoint, torch.load(path, weights_only=True, map_location="cpu"))


def test_mutated_files_are_refused_or_read_as_they_are(tmp_path, originals, mutations):
    """Half of them are whole archives with valid checksums around another pickle, half have other bytes anywhere."""
    source = random.Random(14)
    path = tmp_path / "m.bin"
    read = 0
    for number in range(mutations):
        entries = originals[number % len(originals)]
        pickle = next(name for name in entries if name.endswith("data.pkl"))
        if number % 2:
            changed = mutated(entries[pickle], source, header_bytes=10_000)
            write_archive(path, {**entries, pickle: changed})
        else:
            write_archive(path, entries)
            content = path.read_bytes()
            path.write_bytes(mutated(content, source, header_bytes=len(content)))
        read += assert_refused_or_read(path, Checkpoint.open, check)
    assert mutations * 0.05 < read < mutations * 0.8
