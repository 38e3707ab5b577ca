"""The documents are true where a test can tell: their links, the files and commands they name, and the length of the README."""

import re
import shlex
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
from test_floors import FLOORS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"))
    if path.name != "CHANGELOG.md"  # speaks of earlier versions
)
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)

# Files that the documents name and that are not in this repository: a model's, the user's, the host's.
OTHERS = {
    "modules/LoRA.py", "modules/training.py",
    "README.md", "config.json", "quantize_config.json", "preprocessor_config.json", "model.safetensors",
    "gptq_model-4bit-128g.safetensors", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", "settings.yaml", "settings.json", "gptq_webui.zip", "CMD_FLAGS.txt",
    ".gptq-webui.json", "user_data/CMD_FLAGS.txt", "cmd_linux.sh", "server.py", "extensions/", "user_data/extensions/",
}  # fmt: skip
# Sources of other programs that docstrings name.
OTHERS_SOURCES = {
    "architecture.py", "generator/dynamic.py", "module.py", "awq/modules/linear/gemm.py", "gemm.py", "inference/backend.py",
    "modelling_llama.py", "modules/chat.py", "modules/sampler_hijack.py", "utils/model.py", "utils/planar_packing.py",
}  # fmt: skip
# Files that the reader of docs/contributing/ makes.
MADE = {
    "../echo-loader/pyproject.toml",
    "../echo-loader/test_echo_loader.py",
    "tests/test_cuda_gelu.py",
    "tests/test_notes_tab.py",
    "ui/notes_tab.py",
    "tests/test_api_plain.py",
    "api/plain.py",
    "training.json",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return {each for each in listed.split("\0") if each}


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of the headings of a file."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def named_files(text: str) -> list[str]:
    """The files and folders of this repository in backticks: `core/params.py`, `gptq/cuda/`, `loaders/choose.py:ORDER`."""
    found = re.findall(r"`([\w.\-/<>]+?)(?:[:#][\w.]+)?(?:\(\))?`", FENCE.sub("", text))
    endings = r"\w\.(py|cu|md|toml|json|txt|yaml|zip|sh|png|jinja|safetensors)$"
    return [each for each in found if re.search(endings, each) or re.fullmatch(r"[\w.\-/]+/", each)]


def commands(text: str) -> list[str]:
    """The lines of blocks of code, and what is in backticks, that begin with our command."""
    blocks = FENCE.findall(text) + re.findall(r"^ {4,}(.+)$", text, re.M)
    lines = [line.strip() for block in blocks for line in re.split(r"\n|&&", block)] + re.findall(r"`([^`\n]+)`", text)
    return [line for line in lines if re.match(r"gptq-webui( |$)", line)]


def test_docstrings_and_comments_name_files_that_are_there():
    """A name misleads once the file has another one. Files of other programs are listed above."""
    own = [each for each in tracked() if each.endswith(".py")]
    ends = {"/".join(each.split("/")[-depth:]) for each in own for depth in range(1, each.count("/") + 2)}
    wrong = []
    for each in own:
        for line in (ROOT / each).read_text(encoding="utf-8").splitlines():
            comment = re.search(r"(?:^\s*\"\"\"|^\s*#|  # |^[A-Z`]).*", line)
            for file in re.findall(r"(?<![\w`'\"/.*<>{}-])((?:\w+/)*[a-z]\w+\.py)(?![\w`'\"])", comment[0] if comment else ""):
                if file not in ends:
                    wrong.append(f"{each}: {file}")
    assert not [each for each in wrong if each.split(": ")[1] not in OTHERS_SOURCES]


def test_every_test_file_is_in_the_table_of_tests():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    patterns = [each.replace("*", r"\w*") for each in re.findall(r"`(test_[\w*]+\.py)`", text)]
    files = {Path(each).name for each in tracked() if each.startswith("tests/test_")}
    assert not sorted(each for each in files if not any(re.fullmatch(pattern, each) for pattern in patterns))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text(encoding="utf-8"))):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = unquote(link).partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_files_that_are_named_exist(path):
    files = tracked()
    known = files | {f"{parent.as_posix()}/" for each in files for parent in Path(each).parents}
    named = [each for each in named_files(path.read_text(encoding="utf-8")) if each not in OTHERS | MADE and "<" not in each]
    # A bare name is enough: no two files have one.
    missing = [each for each in named if each not in known and not any(file.endswith(f"/{each}") for file in known)]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_commands_are_understood(path, capsys):
    from gptq_webui.app.cli import parsers
    from gptq_webui.app.command_parser import parse

    for line in commands(path.read_text(encoding="utf-8")):
        words = [each for each in shlex.split(line, comments=True)[1:] if each not in ("…", "|")]
        if words and words[0] == "COMMAND":
            words[0] = "serve"
        try:
            parse(*parsers(), words)
        except SystemExit as end:
            assert not end.code, f"{line}: {capsys.readouterr().err}"


def test_the_map_names_every_file():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    files = [each for each in tracked() if each.split("/")[0] in FLOORS and each.endswith((".py", ".cu"))]
    missing = [each for each in files if not each.endswith("__init__.py") and f"`{each}`" not in text]
    assert sorted(missing) == [], "give it a place in a table of ARCHITECTURE.md"


def test_the_rules_find_what_they_look_for():
    assert named_files("`core/params.py` and `gptq/cuda/`, `loaders/choose.py:ORDER`, `model.generate()`, `owner/name`") == [
        "core/params.py",
        "gptq/cuda/",
        "loaders/choose.py",
    ]
    assert commands("    gptq-webui ask x\n\n`gptq-webui doctor`\n\n```\npip install x && gptq-webui --demo\n```\n") == [
        "gptq-webui --demo",
        "gptq-webui ask x",
        "gptq-webui doctor",
    ]
    assert "what-loads" in anchors(ROOT / "README.md")
