"""The floors: imports go strictly down, rooms on one floor are strangers, and no files import each other in a circle."""

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"core": 0, "hub": 1, "gptq": 1, "loaders": 2, "engine": 3, "ui": 4, "api": 4, "extension": 5, "app": 6}
FILES = sorted(path for room in FLOORS for path in (ROOT / room).rglob("*.py"))
CODE = sorted(
    path
    for folder in (*FLOORS, "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cu") and "tests/host" not in path.as_posix()  # text-generation-webui's own file names
)

# Rooms (folders and files) inside a folder, lowest first; rooms of one number are strangers.
ROOMS = {
    "loaders": {
        "machine": 0, "text": 0, "contract": 1, "pretrained": 2,
        "transformers": 3, "exllamav2": 3, "autogptq": 3, "remote": 3, "choose": 4,
    },
    "gptq": {"families": 0, "cpu": 1, "cuda": 1, "parallel": 2},
}  # fmt: skip
# A file over 300 lines asks to be two. Those that stay one, with the reason.
MOST_LINES = 300
LONG = {
    "benchmarks/soak.py": "one client with all its attacks, and what is counted of them",
    "benchmarks/tune.py": "one tool, with a flag for each group of kernels",
    "core/params.py": "one table, a row for each sampling parameter",
    "api/service.py": "one description of the server, from which every protocol reads",
    "gptq/cpu/cpu_step.py": "one record of arguments, filled for every kind of pass",
    "gptq/cuda/attention.cu": "one kernel with its phases, which share its shared memory",
    "gptq/cuda/cluster_batch.cu": "one kernel with its phases, which share its shared memory",
    "gptq/cuda/kernel_arguments.py": "one list: what every kernel is given",
    "gptq/cuda/kernel_source.py": "one list: the variants of every kernel, and the text that names them",
    "gptq/cuda/sample.cu": "one kernel with its phases: every filter reads the same short list and row",
    "gptq/cuda/wide_batch.cu": "one kernel with its phases, which share its shared memory",
    "hub/file_selection.py": "one list of rules: which files of a repository, and which kinds",
    "gptq/transformers_stepper.py": "one forward for every architecture, however it keeps its state",
    "loaders/text/chat_template.py": "every source of a template, in the order in which they are tried",
    "loaders/contract/base.py": "the contract: the two classes that every back-end fills in",
    "tests/hub_server.py": "one server: the Hub's routes, its faults and its figures share one state",
    "tests/test_api_bad_requests.py": "one list of bad requests for every protocol",
    "tests/test_api_clients.py": "one server for the real clients of every protocol",
    "tests/test_page_gate.py": "one house with a login for everything that a visitor may send to it",
    "tests/test_api_guard.py": "one server for everything that is checked before a request",
    "tests/test_chat_service.py": "one engine and one store for everything that is asked",
    "tests/test_tool_calls.py": "one list of answers for every format",
    "tests/test_tool_calls_split.py": "one writer for each format, tried in the same ways",
    "tests/test_cpu.py": "every kernel, compared on the same models",
    "tests/test_cuda_layers.py": "every kernel for layers of other architectures, compared in the same way",
    "tests/test_download.py": "every fault of a download, against one hub",
    "tests/test_load_fallback.py": "every way in which a load fails, on one engine",
    "tests/test_ui_chats.py": "one browser and one page for every feature of the chat",
    "tests/test_ui_models.py": "one browser and one Hub for every box of the Model tab",
    "tests/test_ui_page.py": "one browser and one page for all of its tests",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


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
        for imported in names:
            if imported.split(".")[0] in (*FLOORS, "gptq_webui", "script") and imported.split(".")[0] not in ("api",):
                found.append(f"line {node.lineno}: imports {imported} by another name than its relative one")
    return found


def imported_files(path: Path, source: str) -> Iterator[Path]:
    """The files of this package that a file imports: at its head, inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        target = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        if target.with_suffix(".py").is_file():
            yield target.with_suffix(".py")
            continue
        for alias in node.names:
            choices = target / f"{alias.name}.py", target / alias.name / "__init__.py", target / "__init__.py"
            yield next(each for each in choices if each.is_file())


def circles(imports: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """Groups of files that reach each other (Tarjan's strongly connected components of more than one file)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found: list[set[str]] = []

    def visit(at: str) -> None:
        order[at] = lowest[at] = len(order)
        path.append(at)
        for target in imports.get(at, ()):
            if target not in order:
                visit(target)
                lowest[at] = min(lowest[at], lowest[target])
            elif target in path:
                lowest[at] = min(lowest[at], order[target])
        if lowest[at] == order[at]:
            start = path.index(at)
            if len(path) - start > 1 or at in imports.get(at, ()):
                found.append(set(path[start:]))
            del path[start:]

    for each in imports:
        if each not in order:
            visit(each)
    return found


def graph() -> dict[str, set[str]]:
    return {name(path): {name(each) for each in imported_files(path, path.read_text(encoding="utf-8"))} for path in FILES}


def room_of(file: str) -> tuple[str, str]:
    """('loaders', 'text') for loaders/text/tokenizer.py, ('loaders', 'choose') for loaders/choose.py."""
    folder, *rest = file.split("/")
    return folder, rest[0].removesuffix(".py") if rest else ""


def crossings(imports: Mapping[str, Iterable[str]]) -> set[str]:
    """Imports between the rooms of one folder that do not go down."""
    found = set()
    for file, targets in imports.items():
        folder, inside = room_of(file)
        rooms = ROOMS.get(folder, {})
        for target in targets:
            other_folder, other = room_of(target)
            if (
                folder == other_folder
                and inside != other
                and inside in rooms
                and other in rooms
                and rooms[other] >= rooms[inside]
            ):
                found.add(f"{file}: {folder}/{other}")
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
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


def test_no_files_import_each_other_in_a_circle():
    assert circles(graph()) == []


def test_a_circle_is_found_under_type_checking_and_inside_functions():
    under = ROOT / "engine/engine.py"
    source = "if TYPE_CHECKING:\n    from .settings import Settings\ndef f():\n    from . import advice\n"
    assert {name(each) for each in imported_files(under, source)} == {"engine/settings.py", "engine/advice.py"}
    assert circles({"a": ["b"], "b": ["c"], "c": ["b", "d"], "d": []}) == [{"b", "c"}]
    assert circles({"a": ["a"]}) == [{"a"}] and circles({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_rooms_inside_a_folder_import_downwards_and_strangers_do_not_meet():
    assert crossings(graph()) == set()


@pytest.mark.parametrize(
    ("file", "target"),
    [
        ("gptq/cpu/forward.py", "gptq/cuda/nvrtc.py"),
        ("loaders/contract/fake_loader.py", "loaders/choose.py"),
        ("loaders/text/tokenizer.py", "loaders/contract/base.py"),
        ("loaders/remote/remote_loader.py", "loaders/exllamav2/exllamav2_loader.py"),
        ("loaders/contract/base.py", "loaders/choose.py"),
    ],
)
def test_the_rule_of_the_rooms_finds_what_it_forbids(file, target):
    assert crossings({file: [target]})


def test_the_rooms_named_here_are_those_there_are():
    for folder, rooms in ROOMS.items():
        found = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
        assert set(rooms) - found == set()
        assert {path.name for path in (ROOT / folder).iterdir() if (path / "__init__.py").is_file()} <= set(rooms)


def test_loaders_are_few_rooms_with_few_arrows():
    """A new back-end adds one room and at most five arrows: raise the figures with it."""
    arrows: dict[str, set[str]] = {}
    for file, targets in graph().items():
        folder, inside = room_of(file)
        if folder == "loaders" and inside != "__init__":
            others = {other for other_folder, other in map(room_of, targets) if other_folder == folder}
            arrows.setdefault(inside, set()).update(others - {inside})
    floors: dict[str, int] = {}
    while left := set(arrows) - set(floors):
        ready = {each for each in left if arrows[each] <= set(floors)}
        assert ready, f"a circle of rooms: {left}"
        floors.update({each: 1 + max((floors[other] for other in arrows[each]), default=0) for each in ready})
    found = len(arrows), max(floors.values()), sum(map(len, arrows.values()))
    print("loaders/: {} rooms, {} floors, {} arrows".format(*found))
    assert all(each <= most for each, most in zip(found, (10, 5, 27), strict=True)), found


def test_a_file_over_300_lines_has_its_reason():
    long = {name(path) for path in CODE if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES}
    assert long - set(LONG) == set(), "split it, or give the reason in LONG"
    assert set(LONG) - long == set(), "no longer over 300 lines: take it out of LONG"


def test_no_two_files_have_one_name():
    """But for a CUDA source and the Python file that launches it."""
    by_name: dict[str, list[str]] = {}
    for path in CODE:
        if path.stem != "__init__" and not (path.suffix == ".cu" and path.with_suffix(".py").is_file()):
            by_name.setdefault(path.stem, []).append(name(path))
    assert {stem: files for stem, files in by_name.items() if len(files) > 1} == {}


def test_the_root_has_no_other_module_and_its_init_no_import():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "script.py"}
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def test_core_needs_the_standard_library_only():
    for path in (ROOT / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for imported in names:
                assert imported.split(".")[0] in sys.stdlib_module_names, f"{path.name} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
