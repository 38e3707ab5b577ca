"""The house: imports go strictly down, rooms on one floor are strangers, and there is one way in."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"core": 0, "hub": 1, "gptq": 1, "loaders": 2, "engine": 3, "ui": 4, "api": 4, "extension": 5, "app": 6}
FILES = sorted(path for room in FLOORS for path in (ROOT / room).rglob("*.py"))


def problems(source: str, room: str, depth: int) -> list[str]:
    """What a file in `room`, `depth` folders below the root, imports against the rules."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.ImportFrom):
            if node.level <= depth:
                continue  # its own room
            if node.level > depth + 1:
                found.append(f"line {node.lineno}: leaves the package")
                continue
            target = (node.module or "").split(".")[0]
            for other in [target] if target else [alias.name for alias in node.names]:
                if other in FLOORS and FLOORS[other] >= FLOORS[room]:
                    found.append(f"line {node.lineno}: {room} imports {other}, which is not below it")
            continue
        else:
            continue
        for name in names:
            if name.split(".")[0] in (*FLOORS, "gptq_webui", "script") and name.split(".")[0] not in ("api",):
                found.append(f"line {node.lineno}: imports {name} by another name than its relative one")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_strictly_down(path):
    parts = path.relative_to(ROOT).parts
    assert problems(path.read_text(encoding="utf-8"), parts[0], len(parts) - 1) == []


@pytest.mark.parametrize(
    ("source", "room"),
    [
        ("from ..engine import engine", "loaders"),
        ("from ..gptq import pack", "hub"),
        ("from .. import engine", "core"),
        ("import core", "hub"),
        ("from gptq_webui.core import refs", "hub"),
        ("from ...outside import x", "hub"),
    ],
)
def test_the_rule_finds_what_it_forbids(source, room):
    assert problems(source, room, 1)


def test_the_root_has_no_other_module_and_its_init_no_import():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "script.py"}
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def test_core_needs_the_standard_library_only():
    import sys

    for path in (ROOT / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in names:
                assert name.split(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
