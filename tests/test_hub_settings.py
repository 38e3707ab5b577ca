"""engine/hub_settings.py: a mirror and a token, set in the page; the token is never shown, and sent to one place only."""

import os
import stat

import pytest

from gptq_webui.core.errors import BadParameter
from gptq_webui.core.model_ref import ModelRef
from gptq_webui.engine.hub_settings import HubSettings
from gptq_webui.engine.settings import Settings
from gptq_webui.hub.repository import Hub
from hub_server import HubServer

SECRET = "hf_good"
FILES = {"config.json": b"{}"}


@pytest.fixture
def hub():
    return Hub()


@pytest.fixture
def settings(hub):
    return HubSettings(hub, Settings())


def seen_tokens(server):
    return {seen.authorization for seen in server.seen}


def test_a_token_is_used_and_survives_a_restart(hub, settings, hub_server):
    hub_server.add("me/secret", FILES, private=True)
    settings.set_token(f" {SECRET}\n")
    assert len(hub.listing(ModelRef("me/secret")).files) == 1
    again = Hub()
    assert HubSettings(again, Settings()).has_token and again.token() == SECRET
    settings.set_token("")
    assert not settings.has_token and hub.token() is None and not settings._path.exists()


def test_the_file_may_only_be_read_by_its_user(settings, hub_server):
    settings.set_token(SECRET)
    if os.name != "nt":
        assert stat.S_IMODE(settings._path.stat().st_mode) == 0o600
    assert SECRET not in Settings().path.read_text() if Settings().path.exists() else True


def test_no_sentence_and_no_log_holds_the_token(settings, hub_server, caplog):
    caplog.set_level("DEBUG")
    settings.set_token(SECRET)
    for bad in ("hf_with space", "hf_ünï"):
        with pytest.raises(BadParameter) as caught:
            settings.set_token(bad)
        assert bad not in str(caught.value)
    assert SECRET not in settings.text + caplog.text + repr(vars(settings)["_settings"].__dict__)


def test_a_mirror_gets_its_own_token_and_never_another_places(hub, settings, hub_server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_login")
    settings.set_token(SECRET)
    with HubServer() as mirror:
        mirror.add("Owner/M-GPTQ", FILES)
        settings.set_endpoint(mirror.url + "/")
        assert hub.endpoint == mirror.url and not settings.has_token
        hub.listing(ModelRef("Owner/M-GPTQ"))
        hub.small_file(hub.listing(ModelRef("Owner/M-GPTQ")), "config.json")
        assert seen_tokens(mirror) == {""}
        settings.set_endpoint("")
        assert hub.endpoint == hub_server.url and hub.token() == SECRET


def test_what_is_no_address_is_refused_and_changes_nothing(hub, settings, hub_server):
    for bad in ("hf-mirror.com", "ftp://x", "https://", "https://user:pass@host", "https://host?x=1"):
        with pytest.raises(BadParameter):
            settings.set_endpoint(bad)
    assert hub.endpoint == hub_server.url


def test_offline_is_said(settings, hub_server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in settings.text and "Models on disk work" in settings.text
