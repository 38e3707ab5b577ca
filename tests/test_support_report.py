"""engine/support_report.py: everything that is asked for where help is asked for, and nothing private."""

import getpass
from pathlib import Path

import pytest

from fake_library import Folder
from gptq_webui.core.errors import LoadFailed
from gptq_webui.core.models import LocalModel
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.engine.support_report import report, without_secrets
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.loaders.machine.gpus import GpuInfo


class FakeLibrary(Folder):
    def get(self, name):
        return LocalModel(Path.home() / "models" / name, "gptq", None, 10, 2048, "LlamaForCausalLM")


@pytest.fixture
def engine(tmp_path):
    engine = Engine(FakeLibrary(tmp_path), Settings(), [FakeLoader()])
    yield engine
    engine.unload()


def test_versions_gpu_driver_loaders_and_the_model_are_there(engine, monkeypatch):
    monkeypatch.setattr(
        "gptq_webui.engine.support_report.gpus", lambda: [GpuInfo("NVIDIA H200", 150 * 10**9, 140 * 10**9, "580.1", "9.0")]
    )
    engine.load("one", options={"context_tokens": 77})
    text = report(engine)
    for part in ("gptq-webui ", "Python 3.", "torch ", "NVIDIA H200", "580.1", "fake: can", "model: one", "context_tokens=77"):
        assert part in text


def test_the_last_error_is_there_without_token_name_or_path(engine, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setenv("MY_API_KEY", "open-sesame-1234")
    home = Path.home()
    secret = f"could not open {home}/models/x with hf_abcdefghijklmnop, hf_qwertyuiopasdfgh, open-sesame-1234"
    with pytest.raises(LoadFailed):
        engine.load("one", options={"fail": secret})
    text = report(engine)
    assert "RuntimeError" in text and "~/models/x with (secret), (secret), (secret)" in text
    for private in (str(home), "hf_abcd", "hf_qwer", "open-sesame", str(Path(__file__).parents[1])):
        assert private not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (r"C:\Users\Anna Lena\models", r"C:\Users\(user)\models"),
        ("/home/anna/x and /Users/anna/x", "/home/(user)/x and /Users/(user)/x"),
        ("https://anna:geheim@proxy:8080/", "https://(secret)@proxy:8080/"),
        ("Authorization: Bearer abcdef.123456789", "Authorization: (secret)"),
        ("sk-proj-abcdefghijk", "(secret)"),
    ],
)
def test_what_is_private_is_recognised_by_its_shape(text, shown):
    assert without_secrets(text) == shown


def test_the_name_of_the_user_is_taken_out(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "annalena")
    assert without_secrets("D:/models/annalena/x annalenas") == "D:/models/(user)/x annalenas"
