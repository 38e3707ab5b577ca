"""`gptq-webui upload`: folders become branches of a repository, with the real huggingface-hub client and a Hub on loopback."""

import threading
from pathlib import Path
from typing import Any

import pytest
from test_quantize_command import SMALL, source  # noqa: F401 (a fixture)

from gptq_webui.app.cli import main
from gptq_webui.core.errors import BadParameter
from gptq_webui.core.model_ref import ModelRef
from gptq_webui.hub.library import Library
from gptq_webui.hub.upload import branches_of
from hub_server import Fault, HubServer

FOUR, EIGHT = "gptq-4bit-32g-actorder_True", "gptq-8bit--1g-actorder_False"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the Hub on loopback takes files as LFS only
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def run(capsys: Any, folder: Path, *arguments: str) -> tuple[int, str, str]:
    code = main([*arguments, "--models-dir", str(folder)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_what_was_made_is_uploaded_and_comes_back_equal(hub, source, tmp_path, capsys):  # noqa: F811
    models = source.parent
    code, _out, err = run(capsys, models, "quantize", str(source), *SMALL, "--branches", f"{FOUR},{EIGHT}")
    assert code == 0, err
    names = [f"tiny-16-GPTQ_{each}" for each in (FOUR, EIGHT)]
    code, out, err = run(capsys, models, "upload", *names, "--to", "me/tiny-16-GPTQ")
    assert code == 0, err
    assert out.strip() == f"{hub.url}/me/tiny-16-GPTQ" and f"{names[0]} → me/tiny-16-GPTQ:main" in err
    assert set(hub.repos["me/tiny-16-GPTQ"].branches) == {"main", FOUR, EIGHT}
    assert hub.put_requests == 2  # main and the first branch share their weights

    other = Library([tmp_path / "other"])
    for branch, name in ((FOUR, names[0]), (EIGHT, names[1]), ("main", names[0])):
        plan = other.plan(ModelRef.parse(f"me/tiny-16-GPTQ:{branch}"))
        list(other.fetch(plan, threading.Event()))
        for path in (models / name).iterdir():
            if not path.name.startswith("."):
                assert (plan.folder / path.name).read_bytes() == path.read_bytes(), path.name

    code, _out, err = run(capsys, models, "upload", *names, "--to", "me/tiny-16-GPTQ")  # again: nothing large is sent
    assert code == 0 and hub.put_requests == 2, err


def test_refusals_say_what_to_do_and_a_second_try_goes_on(hub, source, monkeypatch, capsys):  # noqa: F811
    models = source.parent
    hub.token_may_write = False
    code, _out, err = run(capsys, models, "upload", source.name, "--to", "them/tiny")
    assert code != 0
    assert "does not let your token write to them/tiny" in err
    hub.token_may_write = True
    hub.faults.append(Fault(400, {"X-Error-Message": "no such license"}, "write"))
    code, _out, err = run(capsys, models, "upload", source.name, "--to", "me/tiny")
    assert code != 0 and "refused the upload to me/tiny with status 400 (no such license)" in err
    code, _out, err = run(capsys, models, "upload", source.name, "--to", "not a name")
    assert code != 0 and "Write owner/name" in err
    code, _out, err = run(capsys, models, "upload", source.name, "--to", "me/tiny", "--private")
    assert code == 0 and hub.repos["me/tiny"].private, err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", str(models / "none"))
    code, _out, err = run(capsys, models, "upload", source.name, "--to", "me/tiny")
    assert code != 0 and "access token that may write" in err
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _out, err = run(capsys, models, "upload", source.name, "--to", "me/tiny")
    assert code != 0 and "cannot be reached" in err


def test_folders_that_would_be_one_branch(tmp_path):
    for name in ("a-GPTQ_gptq-4bit-32g-actorder_True", "b-GPTQ_gptq-4bit-32g-actorder_True", "c", "empty"):
        (tmp_path / name).mkdir()
        if name != "empty":
            (tmp_path / name / "config.json").write_text("{}")
    first, second, plain, empty = (tmp_path / each for each in sorted(path.name for path in tmp_path.iterdir()))
    assert [each.name for each in branches_of([first])] == ["main", "gptq-4bit-32g-actorder_True"]
    assert [each.name for each in branches_of([first, plain])] == ["gptq-4bit-32g-actorder_True", "main"]
    with pytest.raises(BadParameter, match="as another folder"):
        branches_of([first, second])
    with pytest.raises(BadParameter, match=r"no config\.json"):
        branches_of([empty])
