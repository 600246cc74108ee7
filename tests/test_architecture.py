"""The house: rooms, which of them may import which, and sizes that can be read at a sitting."""

import ast
from collections import Counter, defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = sorted(
    path for top in ("pipeline", "stages", "tools") for path in (ROOT / top).rglob("*.py")
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# What each room may import, by the first folder below pipeline/; "face" is what lies in pipeline/ itself.
ROOMS = {
    "stages": set(),
    "checkpoint": {"stages"},
    "machine": {"checkpoint", "stages"},
    "planning": {"machine", "checkpoint", "stages"},
    "report": {"planning", "machine", "checkpoint", "stages"},
    "streaming": {"planning", "machine", "checkpoint", "stages"},
    "modeling": {"planning", "machine", "checkpoint", "stages"},
    "scheduling": {"modeling", "streaming", "planning", "machine", "checkpoint", "stages"},
}
ROOMS["face"] = {*ROOMS}
ROOMS["tools"] = {*ROOMS}
# ``Plan.describe`` is public, and text is the report's: imported when it is called.
EXCEPTIONS = {("pipeline.planning.plan", "pipeline.report.plan_report")}


def module_of(path):
    """The module in ``path``, without ``layerstream.``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in CODE}


def imports_of(path):
    """The modules of ours that ``path`` imports anywhere: in functions and for type checkers, too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
            names.add(node.module)
    ours = {name.removeprefix("layerstream.") for name in names if name.startswith("layerstream.")}
    found = {name for name in ours if name in MODULES}
    # ``from package import module`` names both; only a package that is asked for by itself counts.
    return {
        name
        for name in found
        if not any(other.startswith(f"{name}.") for other in ours)
        or MODULES[name].name != "__init__.py"
    }


def room_of(module):
    top, _, rest = module.partition(".")
    if top != "pipeline":
        return top
    room = rest.partition(".")[0]
    return room if room in ROOMS else "face"


GRAPH = {module: imports_of(path) - {module} for module, path in MODULES.items()}


def test_rooms_import_in_one_direction():
    forbidden = [
        f"{module} must not import {other}"
        for module, others in GRAPH.items()
        for other in others
        if room_of(other) not in ROOMS[room_of(module)] | {room_of(module)}
        and (module, other) not in EXCEPTIONS
    ]
    assert forbidden == []


def test_no_modules_import_one_another_in_a_circle():
    graph = {
        module: {other for other in others if (module, other) not in EXCEPTIONS}
        for module, others in GRAPH.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_room_is_in_the_table():
    rooms = {path.parent.name for path in CODE if path.parent.parent == ROOT / "pipeline"}
    assert rooms | {"stages", "face", "tools"} == ROOMS.keys()


def too_long(path):
    """What in ``path``, and whether all of it, is too long to be read at a sitting."""
    text = path.read_text(encoding="utf-8")
    lines, file = text.splitlines(), path.relative_to(ROOT)
    most = 300 if file.parts[0] in {"pipeline", "stages"} else 350
    if len(lines) > most:
        yield f"{file} has {len(lines)} lines, and may have {most}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            reason = lines[first - 2].strip().startswith("# Longer than 60 lines: ")
            if not reason and node.end_lineno - node.lineno >= 60:
                yield f"{file}: {node.name} is longer than 60 lines; say why beside it"


def test_files_and_functions_can_be_read_at_a_sitting():
    assert [found for path in [*CODE, *TESTS] for found in too_long(path)] == []


def test_no_two_public_classes_have_one_name():
    names = Counter(
        node.name
        for path in CODE
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_ground_floors_hold_a_dozen_files_at_most():
    floors = defaultdict(list)
    for path in [*CODE, *TESTS]:
        floors[path.parent].append(path.name)
    for top in ("pipeline", "stages", "tools", "tests"):
        assert len(set(floors[ROOT / top]) - {"__init__.py"}) <= 12
