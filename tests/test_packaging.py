"""The package as it is declared, and the rules that its imports keep."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from layerstream import pipeline
from layerstream.stages import errors

ROOT = Path(__file__).parent.parent
FOLDERS = {"pipeline": 1, "stages": 0, "tools": 2}  # a folder may import from those not above it
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

PUBLIC = [
    "Budget",
    "Checkpoint",
    "Hardware",
    "Pipeline",
    "Plan",
    "StageUse",
    "Stats",
    "StreamedModel",
    "Workload",
    "load_streamed",
    "make_plan",
]


def imported(path):
    """The full names of the modules, and of what is taken out of them, that ``path`` imports."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def in_a_fresh_interpreter(code):
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_every_folder_with_modules_is_packaged_under_its_name():
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in MODULES}
    assert set(setuptools["packages"]) == {
        ".".join(("layerstream", *folder.parts)) for folder in folders
    }
    assert setuptools["package-dir"] == {f"layerstream.{name}": name for name in FOLDERS}


@pytest.mark.parametrize("name", FOLDERS)
def test_types_are_shipped(name):
    assert (ROOT / name / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][f"layerstream.{name}"]


def test_the_core_needs_five_packages_and_no_more():
    names = {requirement.partition(">=")[0] for requirement in PROJECT["project"]["dependencies"]}
    assert names == {"aiofiles", "numpy", "psutil", "safetensors", "torch"}


def test_every_requirement_is_pinned_for_the_tests():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = {
        requirement.partition(">=")[0]
        for requirements in (PROJECT["project"]["dependencies"], *extras)
        for requirement in requirements
        if not requirement.startswith("layerstream[")
    }
    assert wanted <= set(pins)
    assert all(version[0].isdigit() for version in pins.values())


def test_the_public_names_are_these():
    assert sorted(pipeline.__all__) == sorted([*PUBLIC, *errors.__all__])
    assert all(hasattr(pipeline, name) for name in pipeline.__all__)


def test_importing_the_library_does_not_import_transformers():
    code = "import sys, layerstream.pipeline; print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in in_a_fresh_interpreter(code)}
    assert "torch" in loaded
    assert loaded.isdisjoint({"transformers", "huggingface_hub", "rich", "accelerate"})


def test_imports_run_from_tools_to_pipeline_to_stages():
    for path in MODULES:
        own = FOLDERS[path.relative_to(ROOT).parts[0]]
        for name in imported(path):
            parts = name.split(".")
            assert parts[0] not in FOLDERS, f"{path}: the package is called layerstream.{parts[0]}"
            if parts[0] == "layerstream":
                assert FOLDERS[parts[1]] <= own, f"{path} must not import {name}"


def test_only_devices_touches_cuda():
    # Benchmarks measure the GPU itself, beside the library: a floor taken through it would hide its faults.
    exempt = {ROOT / "stages" / "devices", ROOT / "tools" / "benchmarks"}
    for path in MODULES:
        if path.parent not in exempt:
            attributes = [
                node
                for node in ast.walk(ast.parse(path.read_bytes()))
                if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.cuda")
            ]
            assert not attributes, path
            assert not [name for name in imported(path) if name.startswith("torch.cuda")], path
