"""The real huggingface-hub client against a Hub on loopback: lists, and a sentence for every refusal."""

import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from gptq_webui.core.errors import AccessDenied, HubError, HubUnreachable, NoSuchBranch, NoSuchRepository
from gptq_webui.core.model_ref import ModelRef
from gptq_webui.hub import hub_request
from gptq_webui.hub.repository import Hub, is_safe_path

REPO = "TheBloke/Mistral-7B-Instruct-v0.2-GPTQ"
BRANCH = "gptq-4bit-32g-actorder_True"
FILES = {"config.json": b'{"a": 1}', "model.safetensors": b"w" * 5000, "README.md": b"# card"}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_request, "PAUSES_S", (0.01, 0.02, 0.04))


@pytest.fixture
def hub(hub_server: Any) -> Hub:
    hub_server.add(REPO, FILES)
    hub_server.add(REPO, {**FILES, "config.json": b'{"a": 2}'}, branch=BRANCH)
    return Hub()


def refused(kind: type[HubError], hub: Hub, ref: str) -> str:
    with pytest.raises(kind) as caught:
        hub.listing(ModelRef.parse(ref))
    assert type(caught.value) is kind
    assert "hf_" not in str(caught.value)
    return str(caught.value)


def test_listing_gives_sizes_and_hashes_at_one_commit(hub: Hub, hub_server: Any) -> None:
    listing = hub.listing(ModelRef(REPO, BRANCH))
    assert listing.commit == hub_server.repos[REPO].branches[BRANCH]
    found = {file.path: file for file in listing.files}
    assert found["model.safetensors"].size_bytes == 5000
    blob = hub_server.repos[REPO].commits[listing.commit]["model.safetensors"]
    assert found["model.safetensors"].sha256 == blob.sha256
    assert found["config.json"].sha256 is None
    assert found["config.json"].blob_id == hub_server.repos[REPO].commits[listing.commit]["config.json"].git_sha1


def test_a_branch_with_a_slash_is_listed(hub: Hub, hub_server: Any) -> None:
    commit = hub_server.add(REPO, FILES, branch="refs/odd")
    assert hub.listing(ModelRef(REPO, "refs/odd")).commit == commit


def test_branches_start_with_main(hub: Hub, hub_server: Any) -> None:
    hub_server.repos[REPO].branches = {BRANCH: "x", "main": "y", "b": "z"}
    assert hub.branches(REPO) == ["main", BRANCH, "b"]


def test_small_file_is_read_at_the_listed_commit(hub: Hub, hub_server: Any) -> None:
    listing = hub.listing(ModelRef(REPO))
    hub_server.add(REPO, {"config.json": b"moved"})
    assert hub.small_file(listing, "config.json") == b'{"a": 1}'
    assert hub.small_file(listing, "quantize_config.json") is None


def test_small_file_outlives_a_busy_hub(hub: Hub, hub_server: Any) -> None:
    from hub_server import Fault

    listing = hub.listing(ModelRef(REPO))
    hub_server.faults = [Fault(500), Fault(503)]
    assert hub.small_file(listing, "config.json") == b'{"a": 1}'


def test_no_such_repository_says_both_things_it_may_be(hub: Hub) -> None:
    text = refused(NoSuchRepository, hub, "TheBloke/Nothing-GPTQ")
    assert "no model TheBloke/Nothing-GPTQ" in text and "private" in text and "HF_TOKEN" in text and "hf auth login" in text


def test_no_such_repository_with_a_token_does_not_ask_for_one(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    text = refused(NoSuchRepository, hub, "TheBloke/Nothing-GPTQ")
    assert "private" in text and "HF_TOKEN" not in text


def test_no_such_branch_names_those_there_are(hub: Hub) -> None:
    text = refused(NoSuchBranch, hub, f"{REPO}:gptq-4bit-32g-actorder_true")
    assert f"Did you mean '{BRANCH}'?" in text and f"Choose one of main, {BRANCH}." in text


def test_private_repository_opens_with_the_token_from_the_environment(
    hub: Hub, hub_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.add("me/secret", FILES, private=True)
    refused(NoSuchRepository, hub, "me/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert len(hub.listing(ModelRef("me/secret")).files) == 3


def test_a_refused_token_is_said_to_be_refused_and_not_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    text = refused(AccessDenied, hub, REPO)
    assert "does not accept your token" in text and "hf auth login" in text


def test_gated_files_say_where_to_accept_and_how_to_log_in(hub: Hub, hub_server: Any) -> None:
    hub_server.add("meta/gated", FILES, gated="manual")
    listing = hub.listing(ModelRef("meta/gated"))
    assert listing.gated == "manual"
    with pytest.raises(AccessDenied) as caught:
        hub.small_file(listing, "config.json")
    assert f"{hub_server.url}/meta/gated" in str(caught.value) and "hf auth login" in str(caught.value)


def test_gated_files_with_a_token_say_that_the_account_has_no_access(
    hub: Hub, hub_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.add("meta/gated", FILES, gated="auto")
    hub_server.token_has_access = False
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    with pytest.raises(AccessDenied, match="account of your token has no access"):
        hub.small_file(hub.listing(ModelRef("meta/gated")), "config.json")


def test_no_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    text = refused(HubUnreachable, Hub(), REPO)
    assert "cannot be reached" in text and "HF_ENDPOINT is set" in text and "\n" not in text


def test_offline_switch_is_read_at_each_call_and_named(hub: Hub, hub_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = hub.listing(ModelRef(REPO))
    asked = len(hub_server.seen)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in refused(HubUnreachable, hub, REPO)
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE"):
        hub.small_file(listing, "config.json")
    assert len(hub_server.seen) == asked


def test_a_hub_in_trouble_is_distinguished_from_no_network(hub: Hub, hub_server: Any) -> None:
    hub_server.down = True
    assert "status 503" in refused(HubUnreachable, hub, REPO)


def test_endpoint_is_read_at_each_call(hub_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.delenv("HF_ENDPOINT")
    assert hub.endpoint == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url + "/")
    assert hub.endpoint == hub_server.url


def test_a_renamed_repository_is_followed(hub: Hub, hub_server: Any) -> None:
    hub_server.add("old/name", FILES)
    hub_server.repos["old/name"].moved_to = REPO
    listing = hub.listing(ModelRef("old/name"))
    assert hub.small_file(listing, "config.json") == b'{"a": 1}'


def test_user_agent_names_this_program(hub: Hub, hub_server: Any) -> None:
    listing = hub.listing(ModelRef(REPO))
    hub.small_file(listing, "config.json")
    assert all("gptq-webui/" in seen.user_agent for seen in hub_server.seen)


def test_importing_the_hub_floor_imports_no_client() -> None:
    import subprocess
    import sys

    script = Path(__file__).parent.parent / "script.py"
    code = (
        f"import importlib.util, sys; spec = importlib.util.spec_from_file_location('door', {str(script)!r})\n"
        "door = importlib.util.module_from_spec(spec); spec.loader.exec_module(door); door.register()\n"
        "import gptq_webui.hub.library\n"
        "print([name for name in ('httpx', 'httpx2', 'requests', 'huggingface_hub') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "safe"),
    [
        ("config.json", True),
        ("additional_chat_templates/tool_use.jinja", True),
        ("name with spaces & ünïcode.json", True),
        ("../x.json", False),
        ("a/../../x.json", False),
        ("/etc/passwd", False),
        ("a//b.json", False),
        ("./x.json", False),
        ("C:\\x.json", False),
        ("c:x.json", False),
        ("a\\..\\x.json", False),
        ("x.json\n", False),
        ("x\0.json", False),
        ("nul", False),
        ("COM1.json", False),
        ("x.json.", False),
        ("x.json ", False),
        ("", False),
        ("x" * 250 + ".json", False),
        ("/".join(["deep"] * 100), False),
    ],
)
def test_names_that_would_leave_the_folder_are_unsafe(path: str, safe: bool) -> None:
    assert is_safe_path(path) is safe


def test_the_real_client_reads_every_list_of_the_server(hub_server: Any, tmp_path: Path) -> None:
    """So that the server can be trusted: tree, paths-info, refs and a download by huggingface-hub itself."""
    hub_server.add(REPO, FILES)
    api = HfApi(endpoint=hub_server.url)
    assert {each.path for each in api.list_repo_tree(REPO, recursive=True)} == set(FILES)
    (info,) = api.get_paths_info(REPO, "model.safetensors")
    assert info.lfs is not None and info.lfs.size == 5000
    assert api.list_repo_refs(REPO).branches[0].name == "main"
    for name, content in FILES.items():
        path = api.hf_hub_download(REPO, name, local_dir=tmp_path)
        assert Path(path).read_bytes() == content


def test_half_a_character_in_a_name_is_not_safe():
    assert not is_safe_path("a\ud800.json") and is_safe_path("ünïcode 🙂.json")
