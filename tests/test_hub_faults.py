"""Everything a Hub, a mirror or the road to it can answer: the outcome, the sentence, the exit code of the command.

One table. The server is tests/hub_server.py, the client the real huggingface-hub; nothing is left half done.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gptq_webui.app.cli import main
from gptq_webui.hub import file_download, hub_request
from hub_server import Fault, HubServer

NAME = "Owner/M-GPTQ"
FILES = {
    "config.json": b"{}",
    "quantize_config.json": b'{"bits": 4, "group_size": 128, "desc_act": true}',
    "tokenizer.json": b"{}" * 500,
    "model.safetensors": bytes(range(256)) * 2000,
}


@dataclass(frozen=True)
class Case:
    name: str
    prepare: Callable[[HubServer], Any]
    code: int
    says: tuple[str, ...] = ()
    token: str = ""
    ref: str = NAME
    takes_s: float = 0.0  # at least
    never: tuple[str, ...] = field(default=("Traceback", "hf_wrong", "hf_good", "X-Signature"))


def gate(server: HubServer) -> None:
    server.repos[NAME].gated = "manual"


def lists(*entries: dict[str, Any]) -> Callable[[HubServer], None]:
    return lambda server: server.lists_also.extend(entries)


def faults(*answers: Fault) -> Callable[[HubServer], None]:
    return lambda server: server.faults.extend(answers)


def nothing(_server: HubServer) -> None:
    pass


def truncate(server: HubServer) -> None:
    server.truncates_json = True


def expire(server: HubServer) -> None:
    server.links_used_once, server.cut_every_bytes = True, 200_000


CASES = (
    Case("plain", nothing, 0, ("Done: ",)),
    Case("401: a wrong token", nothing, 4, ("does not accept your token", "hf auth login"), token="hf_wrong"),
    Case("401: no such repository, or private", nothing, 3, ("There is no model Owner/No-GPTQ", "private"), ref="Owner/No-GPTQ"),
    Case("403: gated, without a token", gate, 4, ("is gated", "accept", "hf auth login")),
    Case("404: repository, with a token", nothing, 3, ("There is no model", "spelling"), token="hf_good", ref="Owner/No-GPTQ"),
    Case("404: branch", nothing, 3, ("has no branch 'gptq-4bit'", "Did you mean 'gptq-4bit-32g'?"), ref=f"{NAME}:gptq-4bit"),
    Case("429 with Retry-After 2, for a file", faults(Fault(429, {"Retry-After": "2"})), 0, ("Done: ",), takes_s=2),
    Case("429 with Retry-After 2, for the list", faults(Fault(429, {"Retry-After": "2"}, "api")), 0, ("Done: ",), takes_s=2),
    Case("429 for longer than anybody waits", faults(Fault(429, {"Retry-After": "3600"}, "api")), 5, ("asks to wait", "429")),
    Case("500 three times, then fine, for a file", faults(*[Fault(500, host="cdn")] * 3), 0, ("Done: ",)),
    Case("500 three times, then fine, for the list", faults(*[Fault(500, host="api")] * 3), 0, ("Done: ",)),
    Case("500 for ever", faults(*[Fault(500, host="api")] * 99), 5, ("has a problem of its own", "500")),
    Case("a redirect to another host", nothing, 0, ("Done: ",), token="hf_good"),
    Case("a signed link that expires on the way", expire, 0, ("Done: ",)),
    Case("truncated JSON", truncate, 5, ("cannot be read", "cut short")),
    Case("a name that climbs", lists({"rfilename": "../evil.json", "size": 2, "blobId": "0" * 40}), 0, ("Done: ",)),
    Case("a name that climbs, as a template", lists({"rfilename": "additional_chat_templates/../../e.json", "size": 2}), 6,
         ("would not stay in its own folder", "Nothing was downloaded")),
    Case("a 300-character name", lists({"rfilename": "n" * 295 + ".json", "size": 2, "blobId": "0" * 40}), 6,
         ("cannot exist on every system", "nnn…")),
    Case("no network", lambda server: server.__exit__(), 5, ("cannot be reached",)),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_the_hub_may_answer(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(file_download, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(hub_request, "PAUSES_S", (0.01, 0.02, 0.04))
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.add(NAME, FILES)
        server.add(NAME, FILES, "gptq-4bit-32g")
        case.prepare(server)
        began_s = time.monotonic()
        token = ["--token", case.token] if case.token else []
        code = main(["download", case.ref, "--models-dir", str(tmp_path), *token])
        said = capsys.readouterr()
        assert time.monotonic() - began_s >= case.takes_s
        assert code == case.code, said.err
        assert all(words in said.err for words in case.says), said.err
        assert not any(words in said.err + said.out for words in case.never)
        assert {seen.authorization for seen in server.requests("cdn")} <= {""}, "the token left the Hub"
        found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
        complete = {f"Owner_M-GPTQ/{name}" for name in (*FILES, ".gptq-webui.json")}
        assert found == (complete if code == 0 else set())


def test_a_link_in_the_repository_arrives_as_the_text_that_git_stores_for_it(tmp_path: Path, hub_server: Any) -> None:
    hub_server.add(NAME, {**FILES, "special_tokens_map.json": b"../../../etc/passwd"})
    assert main(["download", NAME, "--models-dir", str(tmp_path)]) == 0
    path = tmp_path / "Owner_M-GPTQ" / "special_tokens_map.json"
    assert not path.is_symlink() and path.read_bytes() == b"../../../etc/passwd"
