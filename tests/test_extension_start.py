"""The extension at the start of the stand-in host: settings.yaml, the log, the launcher, and packages that are missing."""

import json
import subprocess
import sys

import pytest
from host_process import ROOT, Host, host, one, place, put

__all__ = ["host", "one", "place"]  # fixtures


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
    assert done.returncode == 2 and "is not the folder of text-generation-webui" in done.stderr


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


def lines_with(host, text):
    return [line for line in host.said().splitlines() if text in line]


def test_our_log_is_seen_once_although_the_host_discards_it(one):
    host = one("--settings", json.dumps({"gptq_webui-autoload_model": "tiny-2023"}))
    host("restart")
    assert len(lines_with(host, "loaded tiny-2023 with transformers")) == 1
    host("load", name="tiny-config")
    assert len(lines_with(host, "loaded tiny-config with transformers")) == 1


def test_an_error_at_the_start_is_seen_once(one, place):
    (place / "user_data" / "models" / "tiny-2023" / "config.json").write_text("{broken")
    host = one("--settings", json.dumps({"gptq_webui-autoload_model": "tiny-2023"}))
    host("restart")
    assert len(lines_with(host, "tiny-2023 could not be loaded at the start.")) == 1


def test_a_wrong_name_in_settings_yaml_is_seen_once_with_the_right_one(one):
    host = one(
        "--settings",
        json.dumps({"gptq_webui-contxt_tokens": 128, "gptq_webui-nonsense": 1, "other_extension-context": 1, "context": 2}),
    )
    host("restart")
    assert len(lines_with(host, "gptq_webui-contxt_tokens in settings.yaml is not a setting")) == 1
    assert "Did you mean gptq_webui-context_tokens?" in host.said()
    assert len(lines_with(host, "gptq_webui-nonsense in settings.yaml is not a setting")) == 1
    assert "other_extension" not in host.said()


def test_the_launcher_prints_every_line_once(place):
    put(place, "user_data/extensions")
    through_us = (str(ROOT / "script.py"), "host", "--")
    host = Host(place, "--model", "tiny-2023", "--extensions", "gptq_webui", start=through_us)
    host("load", name="tiny-config")
    assert len(lines_with(host, "loaded tiny-2023 with transformers")) == 1
    assert len(lines_with(host, "loaded tiny-config with transformers")) == 1
    assert len(lines_with(host, "CONTEXT LENGTH")) == 2
    host.close()


def test_restarting_is_no_start(place):
    put(place, "user_data/extensions")
    host = Host(place, "--extensions", "gptq_webui", "--settings", json.dumps({"gptq_webui-autoload_model": "tiny-2023"}))
    assert host("state")["name"] == "tiny-2023"
    host("unload")
    host("restart")
    assert host("state")["model"] == "NoneType"
    host.close()


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


def test_without_platformdirs_the_extension_works(one, tmp_path):
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(_WITHOUT.format(names=("platformdirs",)))
    host = one(environment={"PYTHONPATH": str(tmp_path / "without")})
    assert host("load", name="tiny-2023")["said"][-1].startswith("Successfully loaded")


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
