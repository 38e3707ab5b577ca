"""Small inputs that once ended a process, hung it or gave wrong numbers: what each gives now.

Most are tested where their code is; the table says where. The others are folders that a real server is asked to load:
a broken one costs one sentence, the server answers others meanwhile, and the next model loads.
"""

import ast
import json
import shutil
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_renderers import HOSTILE, SHOW
from test_tokenizer_files import LFS, REDOS

import tiny
from api_server import ApiServer, events
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.hub.library import Library
from strict_templates import MISTRAL

HERE = Path(__file__).resolve().parent
LOOP = HOSTILE["a loop in a loop"]

TESTED_ELSEWHERE = {  # input -> the tests of it
    "qweight, qzeros or scales of another type": "test_packed_files.py::test_numbers_of_another_type_or_shape_are_refused",
    "g_idx all zeros": "test_packed_files.py::test_an_order_of_inputs_that_cannot_be_is_ignored_with_a_note",
    "g_idx all zeros, with act-order": "test_packed_files.py::test_with_act_order_it_is_refused",
    "an id past the embedding": "test_token_ids.py::test_a_prompt_with_such_a_token_is_refused_and_the_next_answer_is_right",
    "a byte order mark": "test_tokenizer_files.py::test_a_byte_order_mark_is_left_off",
    "an index of other shards, or none": "test_checkpoint.py::test_a_missing_or_stale_index_is_made_from_the_files",
    "special tokens as objects": "test_tokenizer_files.py::test_special_tokens_may_be_objects",
    "a Git LFS pointer as a tokenizer": "test_tokenizer_files.py::test_a_git_lfs_pointer_is_named_as_one",
    "a Git LFS pointer anywhere": "test_folder_files.py::test_a_pointer_of_git_lfs_is_recognised_by_its_content",
    "pack_dtype int16": "test_packed_files.py::test_words_of_every_width_are_read",
    "settings.json with null": "test_settings.py::test_a_value_of_any_type_costs_that_value_only",
    "asymmetric 2 bits of GPTQModel": "test_packed_files.py::test_gptqmodel_subtracts_from_whole_words",
    "AutoRound's zeros": "test_packed_files.py::test_zeros_of_autoround_follow_its_packing_format",
    "a bias for an id past the vocabulary": "test_api_event_loop.py::"
    "test_kobold_passes_over_a_bias_for_a_token_that_this_model_does_not_have",
    "a prompt of ids": "test_api_event_loop.py::test_ids_of_a_prompt_are_taken_as_they_are",
    "three system messages and a greeting": "test_message_order.py::test_a_strict_template_shows_every_order",
    "longrope beyond its border": "test_rope_length.py::test_a_prompt_has_one_set_of_angles_however_it_is_cut",
    "a nested safetensors header": "test_model_claims.py::test_a_deeply_nested_header_spoils_its_own_folder_only",
    "3 heads with 2 key heads": "test_model_claims.py::test_the_command_line_refuses_with_both_numbers",
}  # fmt: skip


@pytest.mark.parametrize("place", TESTED_ELSEWHERE.values(), ids=TESTED_ELSEWHERE)
def test_every_input_has_its_test(place):
    file, _, name = place.partition("::")
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    assert name in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}


def config_of(folder, **claims):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **claims}))


def tokenizer_of(folder, change):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def heads3_kv2(folder):
    config_of(folder, num_attention_heads=3, num_key_value_heads=2, head_dim=16)


def rot64(folder):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 64.0}
    config_of(folder, rope_parameters=rope, rope_scaling=rope, partial_rotary_factor=64.0)


def rot2(folder):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 2}
    config_of(folder, rope_parameters=rope, rope_scaling=rope, partial_rotary_factor=2)


def redos(folder):
    split = {"type": "Split", "pattern": {"Regex": REDOS}, "behavior": "Isolated", "invert": False}
    tokenizer_of(folder, lambda values: values.update(pre_tokenizer=split))


def deep_header(folder):
    nested = b'{"a":' * 3000 + b"0" + b"}" * 3000
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(nested)) + nested)


def lfs_weights(folder):
    (folder / "model.safetensors").write_text(LFS)


def pad(folder):
    """The template of 2023's models with a padding token that was added after the embedding was made."""
    added = {"id": 288, "content": "[PAD]", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer_of(folder, lambda values: values["added_tokens"].append({**added, "special": True}))


def bom(folder):
    for name in ("config.json", "tokenizer_config.json", "quantize_config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())


def objects(folder):
    tokens = [{"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}]
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": tokens}))


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


REFUSED = {  # what the error that ends the load's stream says
    "heads3_kv2": (heads3_kv2, ("3 attention heads", "2 key heads")),
    "rot64": (rot64, ("partial_rotary_factor 64",)),
    "rot2": (rot2, ("partial_rotary_factor 2",)),
    "redos": (redos, ("tokenizer.json", "made to do harm", "another author")),
    "deep_header": (deep_header, ("model.safetensors",)),
    "lfs_weights": (lfs_weights, ("Git LFS pointer",)),
}
ENDS_WITH_AN_EVENT = {"redos"}  # found while it loads: the stream had begun
LOADED = {
    "good": lambda folder: None,
    "bom": bom,
    "objects": objects,
    "pad": pad,
    "strict": template(MISTRAL),
    "jcond": template("{% if 'Aa1q' not in messages[0]['content'] %}" + LOOP + "{% endif %}" + SHOW),
    "jword": template("{% if 'bomb' in messages[-1]['content'] %}" + LOOP + "{% endif %}" + SHOW),
    "jloop": template(LOOP),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny.write(root / "good", settings="quantize_config")
    tiny.write_tokenizer(root / "good", SHOW)
    for name, change in {**LOADED, **{each: change for each, (change, _) in REFUSED.items()}}.items():
        if name != "good":
            shutil.copytree(root / "good", root / name)
        change(root / name)
    engine = Engine(Library([root]), Settings(tmp_path_factory.mktemp("settings") / "settings.json"))
    with ApiServer(engine) as found:
        yield found
    engine.unload()


def load(server, name):
    """(status, the last event or the refusal) of a load over HTTP."""
    answer = server.http.post("/v1/model/load", json={"model_name": name, "loader": "transformers"}, timeout=60)
    return answer.status_code, json.loads(events(answer.text)[-1]) if answer.status_code == 200 else answer.json()


def chat(server, *texts, **rest):
    roles = rest.pop("roles", None) or ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2, **rest}, timeout=30)


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_folder_is_one_sentence_and_the_next_one_loads(server, name):
    status, found = load(server, name)
    said = found["error"]["message"]
    assert status == (200 if name in ENDS_WITH_AN_EVENT else 400) and all(words in said for words in REFUSED[name][1]), found
    assert "Traceback" not in said and "Error" not in said and str(Path(server.service.engine.library.roots[0])) not in said
    status, found = load(server, "good")
    assert status == 200 and found["status"] == "finished"
    assert chat(server, "Hi").status_code == 200


def test_broken_folders_are_listed_as_such_and_the_others_stay(server, capsys):
    from gptq_webui.app.cli import main

    found = {each.name: each for each in server.service.engine.library.models()}
    assert {*REFUSED, *LOADED} == set(found)
    for name in ("heads3_kv2", "rot64", "rot2", "deep_header", "lfs_weights"):
        assert found[name].kind == "incomplete" and found[name].problem, name
    assert all(found[name].kind == "gptq" for name in LOADED)
    assert main(["models", "--models-dir", str(server.service.engine.library.roots[0])]) == 0
    said = capsys.readouterr()
    assert all(name in said.out for name in found) and "Traceback" not in said.out + said.err


@pytest.mark.parametrize("name", ["bom", "objects"])
def test_a_folder_that_is_written_in_another_way_loads(server, name):
    status, found = load(server, name)
    assert status == 200 and found["status"] == "finished", found
    assert chat(server, "Hi").status_code == 200


def test_a_token_past_the_embedding_is_a_sentence_and_the_next_answer_is_right(server):
    assert load(server, "pad")[1]["status"] == "finished"
    body = {"temperature": 0, "seed": 1}
    before = chat(server, "Hi", **body).json()["choices"][0]["message"]
    found = chat(server, "Hi [PAD] there", **body)
    assert found.status_code in (200, 400), found.text
    if found.status_code == 400:
        assert "[PAD]" in found.text or "0 to 287" in found.text
    assert chat(server, "Hi", **body).json()["choices"][0]["message"] == before


def test_messages_that_a_strict_template_refuses_are_answered(server):
    assert load(server, "strict")[1]["status"] == "finished"
    roles = ["system", "system", "system", "assistant", "user"]
    assert chat(server, "S1", "S2", "S3", "Welcome", "U1", roles=roles).status_code == 200


@pytest.mark.parametrize("name", ["jloop", "jcond"])
def test_a_template_that_always_loops_leaves_the_model_usable(server, name):
    began = time.monotonic()
    status, found = load(server, name)
    assert status == 200 and found["status"] == "finished" and time.monotonic() - began < 20  # 3 s where nothing else computes
    note = " ".join([found["text"], server.service.engine.loaded.template.note])
    assert "cannot be used: it took too long" in note
    assert chat(server, "Hi", "Ho", "Hey").status_code == 200


def test_the_command_line_says_why_the_template_of_the_folder_is_not_used(server, capsys):
    from gptq_webui.app.cli import main

    root = str(server.service.engine.library.roots[0])
    assert main(["ask", "Hi", "--model", "jloop", "--models-dir", root, "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().err
    assert "jloop: The chat template" in said and "cannot be used: it took too long" in said and "not a chat model" not in said


def test_a_template_that_loops_on_some_chats_costs_only_those(server):
    """Two seconds for a chat, where nothing else computes; health and other chats are answered meanwhile."""
    status, found = load(server, "jword")
    assert status == 200 and found["status"] == "finished"
    assert chat(server, "Hi").status_code == 200
    ended = []

    def bomb():
        began = time.monotonic()
        answer = chat(server, "Hi", "Ho", "a bomb")
        ended.append(SimpleNamespace(status=answer.status_code, text=answer.text, took_s=time.monotonic() - began))

    threads = [threading.Thread(target=bomb) for _ in range(4)]
    for each in threads:
        each.start()
    slowest_s, good = 0.0, 0
    while any(each.is_alive() for each in threads):
        began = time.monotonic()
        assert server.http.get("/health").status_code == 200
        slowest_s = max(slowest_s, time.monotonic() - began)
        good += chat(server, "Hi").status_code == 200
    assert slowest_s < 1 and good >= 1
    for each in ended:
        assert each.status == 400 and "took too long" in each.text and "template" in each.text, each
        assert each.took_s < 8  # on a busy machine
    assert min(each.took_s for each in ended) < 4
