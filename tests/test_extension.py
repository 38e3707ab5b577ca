"""The extension in a stand-in for text-generation-webui (tests/host): both ways in, and no way to hurt it."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
from host_process import ROOT, Host, host, one, place, put

__all__ = ["host", "one", "place"]  # fixtures


@pytest.mark.parametrize("name", ["tiny-config", "tiny-2023", "tiny-random-in-the-host"])
def test_what_fails_in_the_host_today_loads_and_answers(host, name):
    assert host("load", name=name)["said"][-1] == f"Successfully loaded `{name}`. Its context is 256 tokens."
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


def test_the_hosts_collection_before_every_reply_passes_over_what_the_load_made(one):
    host = one()
    assert host("state")["frozen"] == 0
    host("load", name="tiny-2023")
    assert host("state")["frozen"] > 50_000
    host("free")
    assert host("state")["frozen"] > 50_000, "memory that is freed beside a model brings nothing back"
    host("unload")
    assert host("state")["frozen"] == 0


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


def test_the_hosts_log_and_ctx_size_agree_with_what_was_loaded(one):
    host = one("--settings", json.dumps({"gptq_webui-context_tokens": 128}))
    said = host("load", name="tiny-2023")["said"][-1]
    state = host("state")
    assert "128 tokens" in said and (state["truncation"], state["ctx_size"]) == (128, 128)
    assert [line for line in host.said().splitlines() if "CONTEXT LENGTH" in line] == ["HOST CONTEXT LENGTH: 128"]
    host("load", name="plain")
    assert host("state")["ctx_size"] == 8192  # the host's own value comes back with the host's own model


def test_the_host_says_loaded_when_it_has_the_model_and_not_before(one):
    host = one()
    host("use fake", options={"load_s": 1.5})
    host("our tab loads", name="tiny-2023")
    during = host("choose", name="tiny-2023")["said"][-1]
    assert during.startswith("tiny-2023 is being loaded") and "Successfully" not in during
    pressed = host("load", name="tiny-2023")["said"][-1]
    assert pressed.startswith("tiny-2023 is being loaded") and "Traceback" not in pressed
    statuses = host("wait for our tab")["statuses"]
    assert [phase for phase, _in_host in statuses if phase == "ready"] == ["ready"]
    assert all(in_host for phase, in_host in statuses if phase == "ready")
    assert host("choose", name="tiny-2023")["said"][-1].startswith("Successfully loaded `tiny-2023`.")
    assert "Click" in host("choose", name="tiny-config")["said"][-1]


def test_a_load_of_the_host_is_ready_in_our_tab_when_it_ends(one):
    host = one()
    host("load", name="tiny-2023")
    assert host("our status") == {"phase": "ready", "name": "tiny-2023"}


def test_a_failed_load_of_our_tab_says_why_and_knows_the_way_back(one):
    host = one()
    host("load", name="tiny-config")
    host("use fake", options={"fail": "boom"})
    host("our tab loads", name="tiny-2023")
    assert host("wait for our tab")["statuses"][-1][0] == "empty"
    assert host("our status")["phase"] == "empty" and host("state")["name"] == "None"


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
