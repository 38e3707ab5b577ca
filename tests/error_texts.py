"""Every sentence that this package raises, read out of its source: for tests that judge all of them."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

PACKAGE = Path(__file__).resolve().parents[1]
ROOMS = ("api", "app", "core", "engine", "extension", "gptq", "hub", "loaders", "ui")
HOLE = "…"  # in place of a value
_PATHS = {"folder", "path", "parent", "root", "directory", "cwd", "file"}
_BASES = ("GptqWebuiError", "Problem")


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for room in ROOMS:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def error_classes() -> set[str]:
    """Names of GptqWebuiError and every class below it, wherever it is defined."""
    bases = {
        node.name: {each.id for each in node.bases if isinstance(each, ast.Name)}
        for _path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = set(_BASES[:1])
    while more := {name for name, parents in bases.items() if parents & found} - found:
        found |= more
    return found


def sentences() -> Iterator[tuple[str, str, str]]:
    """(file:line, class, text) of every error made of a text that is written out, with HOLE for values."""
    classes = error_classes() | set(_BASES)
    for path, tree in trees():
        known = {  # texts of the module that sentences end with
            each.targets[0].id: each.value.value
            for each in tree.body
            if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name) and isinstance(each.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)) and node.args:
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                text = text_of(node.args[1 if name == "Problem" and len(node.args) > 1 else 0], known)
                if name in classes and text is not None and text.replace(HOLE, "").strip():
                    yield f"{path.relative_to(PACKAGE).as_posix()}:{node.lineno}", name, text


def paths() -> Iterator[str]:
    """'file: value' of every value in such a sentence that is named as a folder or a file is, and not its name alone."""
    classes = error_classes() | set(_BASES)
    for path, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", getattr(node.func, "attr", "")) not in classes:
                continue
            for hole in (each.value for each in ast.walk(node) if isinstance(each, ast.FormattedValue)):
                if (last := getattr(hole, "id", getattr(hole, "attr", ""))) in _PATHS or last.endswith(("_folder", "_path")):
                    yield f"{path.relative_to(PACKAGE).as_posix()}: {ast.unparse(hole)}"


def text_of(node: ast.expr, known: Mapping[str, object] = MappingProxyType({})) -> str | None:
    """The text of a literal, an f-string or a sum of them; None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(each.value) if isinstance(each, ast.Constant) else _value(each, known) for each in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left, known), text_of(node.right, known)
        return None if left is None and right is None else (left or HOLE) + (right or HOLE)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("rstrip", "strip"):
        return text_of(node.func.value, known)
    return None


def _value(hole: ast.expr, known: Mapping[str, object]) -> str:
    name = hole.value.id if isinstance(hole, ast.FormattedValue) and isinstance(hole.value, ast.Name) else ""
    return str(known[name]) if isinstance(known.get(name), str) else HOLE
