"""The extension in a stand-in for text-generation-webui (tests/host): both ways in, and no way to hurt it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

import tiny
from gptq_webui.loaders.text.built_in_templates import CHATML

ROOT = Path(__file__).resolve().parents[1]


class Host:
    """A running stand-in that obeys one command a line."""

    def __init__(self, folder: Path, *arguments: str, environment=None, start=("server.py",)):
        self.folder = folder
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, *start, *arguments],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.ready = self._read()

    def __call__(self, do: str, **command):
        self.process.stdin.write(json.dumps({"do": do, **command}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def said(self) -> str:
        return (self.folder / "log").read_text()

    def close(self):
        self.process.stdin.close()
        try:
            assert self.process.wait(20) == 0, self.said()
        finally:
            self.process.kill()

    def _read(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else None


@pytest.fixture
def place(tmp_path):
    """The stand-in's folder, with a GPTQ model of each kind that fails in the host today, and a plain one."""
    folder = tmp_path / "text-generation-webui"
    shutil.copytree(ROOT / "tests" / "host", folder)
    models = folder / "user_data" / "models"
    for name, options in (
        ("tiny-config", {"settings": "config"}),
        ("tiny-2023", {"weights": "gptq_model-4bit-32g"}),
        ("tiny-random-in-the-host", {"weights": "model"}),
    ):
        tiny.write(models / name, **options)
        tiny.write_tokenizer(models / name, "{{ bos_token }}" + CHATML)
    plain = tiny.dense_model("llama")
    plain.save_pretrained(models / "plain")
    tiny.write_tokenizer(models / "plain", "{{ bos_token }}" + CHATML)
    return folder


def put(folder: Path, where: str, name: str = "gptq_webui") -> None:
    (folder / where).mkdir(parents=True, exist_ok=True)
    (folder / where / name).symlink_to(ROOT)


@pytest.fixture(params=["extensions/gptq_webui", "user_data/extensions/GPTQ-main"])
def host(request, place):
    where, name = request.param.rsplit("/", 1)
    put(place, where, name)
    running = Host(place, "--extensions", name)
    yield running
    running.close()


@pytest.fixture
def one(place):
    """In `extensions/`, started by the test with what it wants."""
    put(place, "extensions")
    started = []

    def start(*arguments, **options):
        started.append(Host(place, "--extensions", "gptq_webui", *arguments, **options))
        return started[-1]

    yield start
    for running in started:
        running.close()


@pytest.mark.parametrize("name", ["tiny-config", "tiny-2023", "tiny-random-in-the-host"])
def test_what_fails_in_the_host_today_loads_and_answers(host, name):
    assert host("load", name=name)["said"][-1] == f"Successfully loaded `{name}`."
    assert "HOST LOADER" not in host.said()
    state = host("state")
    assert state["model"] == "LlamaForCausalLM" and state["truncation"] == 256 and not state["custom"]
    assert host("ask", text="Hello")["texts"] > 5


def test_any_loader_of_the_menu_and_the_api_come_to_us(one):
    host = one()
    assert "Successfully" in host("load", name="tiny-2023", loader="ExLlamav3")["said"][-1]
    assert host("api load", name="tiny-config") == {}
    assert host("state")["name"] == "tiny-config"
    assert "Successfully" in host("load", name="tiny-2023", loader="llama.cpp")["said"][-1]


def test_what_is_not_gptq_is_left_to_the_host(one):
    host = one()
    assert "Successfully" in host("load", name="plain")["said"][-1]
    assert "HOST LOADER plain" in host.said()
    assert host("ask", text="Hello")["texts"] > 5


def test_unloading_frees_the_weights_and_the_thread(one):
    host = one()
    before = host("state")["weights"]
    host("load", name="tiny-2023")
    host("ask", text="Hello")
    assert host("state")["weights"] > before and host("state")["threads"] == 1
    host("unload")
    assert host("state")["weights"] == before and host("state")["threads"] == 0


def test_unloading_in_the_middle_of_an_answer_ends_it(one):
    host = one()
    host("load", name="tiny-2023")
    done = host("ask and unload", text="Hello")
    assert done["texts"] < 240 and host("state")["threads"] == 0
    host("load", name="tiny-2023")
    assert host("ask", text="Hello")["texts"] > 5


def test_idle_unload_and_the_reload_on_use(one):
    host = one("--idle-timeout", "1")
    host("load", name="tiny-2023")
    first = host("ask", text="Hello")
    host("idle")
    assert host("state")["model"] == "NoneType"
    assert host("ask", text="Hello") == first


NEIGHBOUR = """
from modules.models import unload_model

params = {"display_name": "Neighbour"}


def ui():
    pass
"""


@pytest.mark.parametrize("command", ["neighbour unloads", "drop"])
def test_a_model_that_goes_by_another_way_is_freed_too(place, command):
    put(place, "extensions")
    (place / "extensions" / "neighbour").mkdir()
    (place / "extensions" / "neighbour" / "script.py").write_text(NEIGHBOUR)
    host = Host(place, "--extensions", "neighbour", "gptq_webui")
    host("load", name="tiny-2023")
    assert host("ask", text="Hello")["texts"] > 5 and host("state")["threads"] == 1
    host(command)
    host("load", name="plain")
    assert host("state")["threads"] == 0
    host("load", name="tiny-2023")
    assert host("ask", text="Hello")["texts"] > 5 and host("state")["threads"] == 1
    host.close()


def test_a_model_without_a_transformers_face_answers_by_our_hook_while_it_is_loaded(one):
    host = one()
    host("use fake", options={"answer": "The capital of France is Paris."})
    assert "Successfully" in host("load", name="tiny-2023")["said"][-1]
    assert host("state")["custom"]
    assert host("ask", text="What is the capital of France?")["answer"] == "The capital of France is Paris."
    host("restart")
    assert host("state")["custom"]
    host("load", name="plain")
    assert not host("state")["custom"] and host("state")["threads"] == 0
    assert host("ask", text="Hello")["texts"] > 5


def test_stop_and_unload_end_an_answer_of_the_hook(one):
    host = one()
    host("use fake", options={"answer": "word " * 400, "tokens_per_s": 40})
    host("load", name="tiny-2023")
    host("stop soon")
    assert 1 < host("ask", text="Hello", tokens=400)["texts"] < 80
    assert host("ask and unload", text="Hello")["texts"] < 80
    assert host("state")["threads"] == 0 and not host("state")["custom"]


def test_another_model_takes_the_place_of_the_first(one):
    host = one()
    host("load", name="tiny-2023")
    weights = host("state")["weights"]
    host("ask", text="Hello")
    host("load", name="tiny-config")
    host("ask", text="Hello")
    assert host("state")["weights"] == weights and host("state")["threads"] == 1


def test_two_chats_at_once_are_both_right(one):
    host = one()
    host("load", name="tiny-2023")
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    alone = host("ask", text=prompt, tokens=12)["answer"]
    for _ in range(3):
        found = host("two at once", text="Hi", prompt=prompt)
        assert found["host"] == alone
        assert found["ours"].strip() == alone.strip()


def test_apply_and_restart_twice_changes_nothing(host):
    host("load", name="tiny-2023")
    first = host("ask", text="Hello")
    for _ in range(2):
        assert host("restart") == {}
    assert host("ask", text="Hello") == first
    assert "Successfully" in host("load", name="tiny-config")["said"][-1]
    assert host("ask", text="Hello")["texts"] > 5 and host("state")["threads"] == 1


def test_a_folder_whose_tensors_do_not_fit_says_why_in_words(one, place):
    from safetensors.torch import load_file, save_file

    path = place / "user_data" / "models" / "tiny-2023" / "gptq_model-4bit-32g.safetensors"
    state = load_file(path)
    state["model.layers.0.mlp.up_proj.qweights"] = state.pop("model.layers.0.mlp.up_proj.qweight")
    save_file(state, path, metadata={"format": "pt"})
    host = one()
    said = host("load", name="tiny-2023")["said"][-1]
    assert "has no qweight" in said and "Traceback" not in said
    state = host("state")
    assert state["model"] == "NoneType" and state["name"] == "None"
    assert "Successfully" in host("load", name="tiny-config")["said"][-1]


def test_started_through_us_the_hosts_own_model_may_be_gptq(place):
    put(place, "user_data/extensions")
    through_us = (str(ROOT / "script.py"), "host", "--")
    host = Host(place, "--model", "tiny-2023", "--extensions", "gptq_webui", start=through_us)
    assert host("state")["name"] == "tiny-2023" and "HOST LOADER" not in host.said()
    assert host("ask", text="Hello")["texts"] > 5
    host("restart")
    host("unload")
    assert host("state")["threads"] == 0
    host.close()


def test_the_launcher_says_where_it_must_be_started(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "script.py"), "host"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "is not the folder of text-generation-webui" in done.stderr


def test_a_model_of_settings_yaml_is_loaded_at_the_start(one):
    host = one("--settings", json.dumps({"gptq_webui-autoload_model": "tiny-2023", "gptq_webui-context_tokens": 128}))
    state = host("state")
    assert state["name"] == "tiny-2023" and state["truncation"] == 128


def test_the_options_of_every_loader_can_stand_in_settings_yaml(one):
    host = one(
        "--settings",
        json.dumps({"gptq_webui-dtype": "bf16", "gptq_webui-context_tokens": "many", "gptq_webui-loader": "transformers"}),
    )
    assert "Successfully" in host("load", name="tiny-2023")["said"][-1]
    options = host("options")
    assert options["dtype"] == "bf16" and options["device"] == "cpu" and options["context_tokens"] == 0
    assert "context_tokens in settings.yaml should be" in host.said()


def test_an_unknown_loader_in_settings_yaml_gives_a_message(one):
    host = one("--settings", json.dumps({"gptq_webui-loader": "exllama"}))
    said = host("load", name="tiny-2023")["said"][-1]
    assert said.startswith("There is no loader called 'exllama'")


def test_restarting_is_no_start(place):
    put(place, "user_data/extensions")
    host = Host(place, "--extensions", "gptq_webui", "--settings", json.dumps({"gptq_webui-autoload_model": "tiny-2023"}))
    assert host("state")["name"] == "tiny-2023"
    host("unload")
    host("restart")
    assert host("state")["model"] == "NoneType"
    host.close()


def test_a_folder_without_a_chat_template_gets_ours_in_the_hosts_chat(one, place):
    models = place / "user_data" / "models"
    for name in ("TheBloke_vicuna-7B-v1.5-GPTQ", "TheBloke_Llama-2-7B-GPTQ"):
        shutil.copytree(models / "tiny-2023", models / name)
        tokenizer = json.loads((models / name / "tokenizer_config.json").read_text())
        tokenizer.pop("chat_template", None)
        (models / name / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        (models / name / "chat_template.jinja").unlink(missing_ok=True)
    host = one()

    def template(name, **user_config):
        return host("metadata", name=name, user_config=user_config)["instruction_template_str"]

    assert "USER: " in template("TheBloke_vicuna-7B-v1.5-GPTQ")
    assert (
        template("TheBloke_vicuna-7B-v1.5-GPTQ", vicuna={}, **{".*vicuna": {"instruction_template": "Alpaca"}})
        == "alpaca's jinja"
    )
    assert template("TheBloke_Llama-2-7B-GPTQ") == "alpaca's jinja"  # no chat model: the host's own choice
    own = template("tiny-2023")
    assert "<|im_start|>" in own and own == template("plain")
    host("save template", name="tiny-2023", template="Vicuna")
    assert "USER: " in template("tiny-2023")


def test_without_a_page_the_hosts_page_is_not_imported(one):
    host = one("--nowebui")
    assert host("api load", name="tiny-2023") == {} and host("ask", text="Hello")["texts"] > 5
    assert not host("state")["menu"]


def test_a_model_of_the_start_that_is_gone_does_not_stop_the_host(one):
    host = one("--settings", json.dumps({"gptq_webui-autoload_model": "nobody"}))
    assert host.ready == {"ready": True} and "nobody" in host.said()
    assert "Successfully" in host("load", name="tiny-2023")["said"][-1]


_WITHOUT = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in {names!r} else find(name, path, target)
PathFinder.find_spec = find_spec
"""


@pytest.mark.parametrize("names", [("torch",), ("transformers",), ("safetensors",)], ids=str)
def test_a_package_that_is_missing_never_stops_the_host(names, one, tmp_path):
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(_WITHOUT.format(names=names))
    host = one(environment={"PYTHONPATH": str(tmp_path / "without")})
    assert host.ready == {"ready": True}
    if names == ("torch",):
        assert "portable" in host.said()


def test_a_package_that_is_too_old_gives_a_message_and_is_harmless(one, tmp_path):
    package, version = "torch", "2.2.1+cu121"
    (tmp_path / "old").mkdir()
    lines = ["import importlib.metadata as metadata", "real = metadata.version"]
    lines.append(f"metadata.version = lambda name: {version!r} if name == {package!r} else real(name)")
    (tmp_path / "old" / "sitecustomize.py").write_text("\n".join(lines))
    host = one(environment={"PYTHONPATH": str(tmp_path / "old")})
    assert host.ready == {"ready": True}
    assert f"found {version}. Update text-generation-webui." in host.said()


def test_another_copy_of_the_package_gives_a_message_and_is_harmless(one, tmp_path):
    (tmp_path / "other").mkdir()
    lines = ["import sys, types", "copy = types.ModuleType('gptq_webui')", "copy.__file__ = '/elsewhere/__init__.py'"]
    lines.append("sys.modules['gptq_webui'] = copy")
    (tmp_path / "other" / "sitecustomize.py").write_text("\n".join(lines))
    host = one(environment={"PYTHONPATH": str(tmp_path / "other")})
    assert host.ready == {"ready": True} and "Two copies" in host.said()


def test_nothing_is_written_into_the_hosts_files_or_ours(one, place):
    ours = {path: path.stat().st_mtime_ns for path in ROOT.rglob("*.py")}
    before = {path.relative_to(place) for path in (place / "user_data").rglob("*")}
    host = one()
    host("load", name="tiny-2023")
    host("ask", text="Hello")
    assert {path.relative_to(place) for path in (place / "user_data").rglob("*")} == before
    assert {path: path.stat().st_mtime_ns for path in ROOT.rglob("*.py")} == ours


def test_the_zip_unpacks_to_a_working_extension(place, tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("the ZIP is made from what git tracks")
    done = subprocess.run([sys.executable, ROOT / ".ci" / "extension_zip.py", tmp_path], capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "gptq_webui.zip"), done.stderr
    (place / "user_data" / "extensions").mkdir()
    with zipfile.ZipFile(tmp_path / "gptq_webui.zip") as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"gptq_webui"}
        assert not [name for name in archive.namelist() if name.split("/")[1] in ("tests", "docs", ".ci")]
        archive.extractall(place / "user_data" / "extensions")
    host = Host(place, "--extensions", "gptq_webui")
    assert "Successfully" in host("load", name="tiny-2023")["said"][-1]
    assert host("ask", text="Hello")["texts"] > 5
    host.close()
    shutil.rmtree(place / "user_data" / "extensions" / "gptq_webui")
    without = Host(place, "--extensions")
    assert "Successfully" in without("load", name="plain")["said"][-1]
    without.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def require_gradio_4() -> None:
    import gradio

    if int(gradio.__version__.split(".")[0]) != 4:
        pytest.skip("the host's page is drawn by Gradio 4")


@pytest.mark.browser
def test_visitors_of_a_host_for_several_users_choose_no_model(place):
    require_gradio_4()
    put(place, "extensions")
    port = free_port()
    host = Host(place, "--extensions", "gptq_webui", "--multi-user", "--listen-port", str(port))
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/config").read().decode()
    assert "its visitors choose no model" in page and '"elem_id":"gw-models"' not in page
    host.close()


@pytest.mark.browser
def test_our_tab_in_the_hosts_page(place):
    require_gradio_4()
    from browser import chromium

    put(place, "extensions")
    port = free_port()
    host = Host(place, "--extensions", "gptq_webui", "--listen-port", str(port))
    assert host.ready == {"ready": True}, host.said()
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(20_000)
        page.goto(f"http://127.0.0.1:{port}")
        page.get_by_role("tab", name="GPTQ").click()
        page.click("#gw-models input")
        page.get_by_role("option", name="tiny-2023").click()
        page.wait_for_selector("#gw-model-status:has-text('Ready')")
        assert "32 weights share a scale" in page.inner_text("#gw-facts")
        assert host("state")["name"] == "tiny-2023"
        assert page.inner_text("#gw-idle-box button >> nth=0").startswith("Report")  # the idle unload is the host's own
        page.get_by_role("tab", name="Model", exact=True).click()
        page.wait_for_selector("#host-status:has-text('Successfully loaded')")
        assert page.input_value("#host-menu input") == "tiny-2023"
        assert "Successfully" in host("load", name="tiny-random-in-the-host")["said"][-1]  # by the host meanwhile
        page.get_by_role("tab", name="GPTQ").click()
        page.wait_for_function("document.querySelector('#gw-models input').value.startsWith('tiny-random-in-the-host')")
        page.click("text=When the web UI starts")
        page.click("#gw-autoload input")
        page.get_by_role("option", name="tiny-config").click()
        page.wait_for_selector("text=tiny-config is loaded when the web UI starts")
        page.click("#gw-unload")
        page.wait_for_selector("#gw-model-status:has-text('Unloaded')")
        assert host("state")["model"] == "NoneType"
    host.close()
    again = Host(place, "--extensions", "gptq_webui")
    assert again("state")["name"] == "tiny-config"
    again.close()
