"""Every line that a model card of 2023 tells its reader to type, with gptq-webui for huggingface-cli; and what scripts get."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import model_card_repo
from gptq_webui.app.cli import main

REPO = model_card_repo.REPO
SCRIPT = Path(__file__).resolve().parent.parent / "script.py"
NAME = "Mistral-7B-Instruct-v0.2-GPTQ"
# the section "How to download from the command line" of the card, and its "More advanced" part
MODEL_CARD = (
    f"huggingface-cli download {REPO} --local-dir {NAME} --local-dir-use-symlinks False",
    f"huggingface-cli download {REPO} --revision gptq-4bit-32g-actorder_True --local-dir {NAME} --local-dir-use-symlinks False",
    f"HF_HUB_ENABLE_HF_TRANSFER=1 huggingface-cli download {REPO} --local-dir {NAME} --local-dir-use-symlinks False",
    f"huggingface-cli download {REPO} --local-dir {NAME}",
    f"HF_HOME=other huggingface-cli download {REPO}",
    f"huggingface-cli download {REPO} --cache-dir cache",
    f"huggingface-cli download {REPO} --revision gptq-4bit-32g-actorder_True --cache-dir cache --token hf_good --resume-download",
    f"huggingface-cli download {REPO} config.json tokenizer.json --local-dir . --local-dir-use-symlinks False",
    f"huggingface-cli download {REPO} --local-dir . --local-dir-use-symlinks False --include '*.json' --exclude 'config*'",
    f"huggingface-cli download https://huggingface.co/{REPO}/tree/gptq-4bit-32g-actorder_True --local-dir {NAME} --quiet",
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, hub_server, tiny_gptq):
    """An empty working folder, and the repository with small weights."""
    files = {path.name: path.read_bytes() for path in tiny_gptq.iterdir()}
    files |= {"README.md": model_card_repo.model_card(), "tokenizer.json": b"{}"}
    for branch, *_rest in model_card_repo.BRANCHES[:3]:
        hub_server.add(REPO, files, branch)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def type_line(line, monkeypatch):
    """As a shell would: settings before the command, then its words."""
    words = shlex.split(line)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    assert words.pop(0) == "huggingface-cli"
    return main(words)


@pytest.mark.parametrize("line", MODEL_CARD, ids=range(len(MODEL_CARD)))
def test_the_model_cards_lines_run(line, here, monkeypatch, capsys):
    assert type_line(line, monkeypatch) == 0
    said = capsys.readouterr()
    assert "Traceback" not in said.err and "unrecognized" not in said.err
    for words in ("--local-dir-use-symlinks", "HF_HUB_ENABLE_HF_TRANSFER", "--resume-download"):
        lines = [each for each in said.err.splitlines() if each.startswith(words)]
        assert len(lines) == (words in line) and all("ignored" in each for each in lines)
    assert "hf_good" not in said.err + said.out


def test_local_dir_holds_the_files_themselves(here, monkeypatch, capsys):
    (here / NAME).mkdir()  # the card's line before
    assert type_line(MODEL_CARD[1], monkeypatch) == 0
    assert {path.name for path in (here / NAME).iterdir()} >= {"model.safetensors", "config.json", "quantize_config.json"}
    assert not any(path.is_symlink() for path in (here / NAME).iterdir())
    assert capsys.readouterr().out.strip() == str(here / NAME)


def test_one_line_as_a_shell_runs_it(here, hub_server):
    line = f"mkdir {NAME}\n" + MODEL_CARD[2].replace("huggingface-cli", f"{sys.executable} {SCRIPT}")
    done = subprocess.run(["sh", "-ec", line], capture_output=True, text=True, env=os.environ | {"HF_ENDPOINT": hub_server.url})
    assert done.returncode == 0 and done.stdout.strip() == str(here / NAME), done.stderr
    assert any(line.startswith("100% ") for line in done.stderr.splitlines()), "a log gets plain lines"
    assert "\x1b" not in done.stderr


def test_cache_dir_is_a_cache_that_huggingface_hub_reads(here, monkeypatch):
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    assert type_line(MODEL_CARD[6], monkeypatch) == 0
    revision = "gptq-4bit-32g-actorder_True"
    found = try_to_load_from_cache(REPO, "model.safetensors", cache_dir=here / "cache", revision=revision)
    assert isinstance(found, str) and Path(found).is_file()
    folder = Path(snapshot_download(REPO, revision=revision, cache_dir=here / "cache", local_files_only=True))
    assert (folder / "quantize_config.json").is_file()


def test_files_patterns_and_exclusions_bring_exactly_that(here, monkeypatch):
    type_line(MODEL_CARD[7], monkeypatch)
    assert {path.name for path in here.glob("[!.]*")} == {"config.json", "tokenizer.json"}
    type_line(
        f"huggingface-cli download {REPO}:{model_card_repo.BRANCHES[1][0]} --include '*.json' --exclude 'c*' --local-dir b",
        monkeypatch,
    )
    assert {path.name for path in (here / "b").glob("[!.]*")} == {"quantize_config.json", "tokenizer.json"}


def test_a_name_that_is_not_there_is_reported_with_the_nearest(capsys):
    assert main(["download", REPO, "confg.json", "--local-dir", "x"]) == 6
    assert "Did you mean 'config.json'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--revision", "gptq-8bit"], 3, "has no branch"),
        (["--repo-type", "dataset"], 2, "models only"),
        (["--include", "*.onnx"], 6, "--include"),
        (["--max-workers", "x"], 2, "invalid int"),
    ],
)
def test_mistakes_have_their_exit_codes(arguments, code, says, capsys):
    try:
        assert main(["download", REPO, *arguments]) == code
    except SystemExit as exit:
        assert exit.code == code
    assert says in capsys.readouterr().err


def test_two_branches_at_once_are_a_question(capsys):
    assert main(["download", f"{REPO}:main2", "--revision", "other"]) == 2
    assert "Give one of them" in capsys.readouterr().err


def test_a_commit_is_a_revision_too(here, hub_server):
    commit = hub_server.repos[REPO].branches["main"]
    assert main(["download", REPO, "--revision", commit, "--local-dir", "c"]) == 0
    assert (here / "c" / "model.safetensors").exists()


def test_json_tells_what_came(here, capsys):
    assert main(["download", REPO, "--local-dir", "x", "--json", "--quiet"]) == 0
    said = capsys.readouterr()
    lines = json.loads(said.out)
    assert said.err == "" and lines["ref"] == REPO and lines["folder"] == str(here / "x")
    assert lines["received_bytes"] == lines["total_bytes"] and lines["files"]["model.safetensors"]["hash"].startswith("sha256:")
    assert main(["download", "Owner/No-GPTQ", "--json", "--quiet"]) == 3
    lines = json.loads(capsys.readouterr().out)
    assert (lines["kind"], lines["exit_code"]) == ("NoSuchRepository", 3) and "no model" in lines["error"]


def test_the_commands_of_the_library(here, capsys, hub_server):
    models = ["--models-dir", str(here)]
    assert main(["download", REPO, *models, "--quiet"]) == 0
    name = f"TheBloke_{NAME}"
    assert main(["models", "--json", *models]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["ref"], listed["bits"], listed["group_size"]) == (name, REPO, 4, 32)
    assert main(["verify", name, "--json", *models]) == 0 and json.loads(capsys.readouterr().out)["good"]
    with (here / name / "model.safetensors").open("r+b") as file:
        file.seek(60_000)
        file.write(b"\0\0\0\0")
    assert main(["verify", name, *models]) == 8 and "model.safetensors is not what the Hub says" in capsys.readouterr().err
    assert main(["repair", name, *models]) == 0 and main(["verify", name, *models]) == 0
    assert main(["update", name, *models]) == 0 and "has not changed" in capsys.readouterr().err
    files = hub_server.repos[REPO].commits[hub_server.repos[REPO].branches["main"]]
    hub_server.add(REPO, {path: blob.data for path, blob in files.items()} | {"tokenizer.json": b"{ }"})
    assert main(["update", name, "--download", *models]) == 0
    assert (here / name / "tokenizer.json").read_bytes() == b"{ }"
    (here / name / "quantize_config.json").unlink()
    assert main(["rescue", name, *models]) == 0 and (here / name / "quantize_config.json").exists()
    assert main(["convert", name, *models]) == 1 and "needs no conversion" in capsys.readouterr().err
    assert main(["remove", name, *models]) == 1 and "--yes" in capsys.readouterr().err
    assert main(["remove", name, "--yes", *models]) == 0 and not (here / name).exists()


def test_offline_the_library_works_and_the_rest_says_why(here, monkeypatch, capsys):
    models = ["--models-dir", str(here)]
    assert main(["download", REPO, *models, "--quiet"]) == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["models", *models]) == 0 and main(["verify", f"TheBloke_{NAME}", *models]) == 0
    for command in (["download", REPO, *models], ["branches", REPO, *models], ["update", f"TheBloke_{NAME}", *models]):
        capsys.readouterr()
        assert main(command) == 5 and "HF_HUB_OFFLINE is set" in capsys.readouterr().err


# branches


@pytest.mark.parametrize(
    ("memory", "best"), [("6", "main"), ("8", "gptq-4bit-32g-actorder_True"), ("12", "gptq-8bit-32g-actorder_True")]
)
def test_branches_shows_the_model_cards_table_and_the_advice(hub_server, tmp_path, capsys, memory, best):
    model_card_repo.add(hub_server, tmp_path)
    assert main(["branches", REPO, "--memory", memory]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[0].lstrip("*") or line.split()[1] for line in lines[:1]] == ["Branch"] and len(lines) == 7
    (marked,) = [line for line in lines if line.startswith("*")]
    assert marked.split()[1] == best
    for (branch, bits, group, size, text), line in zip(model_card_repo.BRANCHES, lines[1:], strict=True):
        cells = [branch, str(bits), "None" if group == -1 else str(group), "Yes", "4096", f"{size / 1e9:.2f}", "GB"]
        assert line[2:].split()[:7] == cells and line.endswith(text)
    assert f"To download it: gptq-webui download {REPO}" in said.err and f"your {memory} GB" in said.err
    assert main(["branches", REPO, "--memory", memory, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert lines["recommended"] == best and [each["size_bytes"] for each in lines["branches"]] == [
        row[3] for row in model_card_repo.BRANCHES
    ]
    assert {each["damp_percent"] for each in lines["branches"]} == {"0.1"}


def test_branches_of_a_gguf_repository_name_the_sister(hub_server, capsys):
    hub_server.add("TheBloke/M-GGUF", {"m.gguf": b"x"})
    hub_server.add("TheBloke/M-GPTQ", {"config.json": b"{}"})
    assert main(["branches", "TheBloke/M-GGUF"]) == 6
    assert "The same model as GPTQ: TheBloke/M-GPTQ." in capsys.readouterr().err
