"""Every field of every protocol's requests changes something, is refused in words, or is named in docs/api.md as without effect.

A field changes something if the engine gets another prompt or other parameters, or the answer looks different. Values are
tried one after the other until one does.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from api_server import ApiServer
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.api import kobold, lollms, ollama, openai_models, tgi_models, tgwui_routes
from gptq_webui.core.params import GenerationParams, obeyed_by
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader, FakeModel

DOCS = Path(__file__).resolve().parents[1] / "docs" / "api.md"
CHAT = {"messages": [{"role": "user", "content": "Hi you"}]}
TEXTS = ["a b c d e"] * 3
PATHS = {
    "OpenAI chat": ("/v1/chat/completions", CHAT, openai_models.ChatCompletionRequest),
    "OpenAI completions": ("/v1/completions", {"prompt": "Hi you"}, openai_models.CompletionRequest),
    "KoboldAI": ("/api/v1/generate", {"prompt": "Hi you"}, kobold.GenerateRequest),
    "TGI": ("/generate", {"inputs": "Hi you", "parameters": {"details": False}}, tgi_models.Parameters),
    "LoLLMS": ("/lollms_generate", {"prompt": "Hi you"}, lollms.GenerateRequest),
    "Ollama chat": ("/api/chat", CHAT | {"model": MISTRAL, "stream": False}, ollama.OllamaChat),
    "Ollama generate": ("/api/generate", {"prompt": "Hi you", "model": MISTRAL, "stream": False}, ollama.OllamaGenerate),
    "text-generation-webui": ("/api/v1/chat", {"user_input": "Hi you"}, tgwui_routes.OldChatRequest),
}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}}
VALUES = {  # where the type does not say what would change something
    "messages": [[{"role": "user", "content": "Other words"}]],
    "prompt": ["Other words"],
    "inputs": ["Other words"],
    "user_input": ["Other words"],
    "history": [{"internal": [["Hello", "World"]]}],
    "model": ["another", "gpt-4"],
    "logit_bias": [{"1": 5}],
    "response_format": [{"type": "json_object"}],
    "grammar": ['root ::= "a"', {"type": "regex", "value": "a+"}],
    "format": ["json"],
    "options": [{"temperature": 0.3}],
    "structured_outputs": [{"regex": "a+"}],
    "guided_json": [{"type": "object"}],
    "json_schema": [{"type": "object"}],
    "tools": [[{"type": "function", "function": FUNCTION}]],
    "functions": [[FUNCTION]],
    "tool_choice": ["required", "f"],
    "function_call": [{"name": "f"}],
    "mirostat": [2],
    "sampler_order": [[6, 0, 1, 3, 4, 2, 5]],
    "stream_options": [{"include_usage": True}],
    "suffix": [" end"],
    "seed": [7],
    "sampler_seed": [7],
    "stop": [["x"], "x"],
    "reasoning_effort": ["low"],
}
TOGETHER = {  # fields that say something about another one
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
    "parallel_tool_calls": {"tools": VALUES["tools"][0], "tool_choice": "required"},
    "tool_choice": {"tools": VALUES["tools"][0]},
    "function_call": {"functions": VALUES["functions"][0]},
    "dynatemp_low": {"dynamic_temperature": True, "dynatemp_high": 2},
    "dynatemp_high": {"dynamic_temperature": True, "dynatemp_low": 0.5},
    "dynamic_temperature": {"dynatemp_low": 0.5, "dynatemp_high": 2.0},
    "min_temp": {"max_temp": 2},
    "max_temp": {"min_temp": 0.5},
    "include_stop_str_in_output": {"stop": ["France"]},
    "trim_stop": {"stop_sequence": ["France"]},
    "best_of": {"do_sample": True},
    "echo": {"logprobs": 1},
}


class Model(FakeModel):
    can = obeyed_by("own")

    def check(self, params):
        """Grammars are not compiled here."""

    def _scores(self, ids, top, cancel):
        from gptq_webui.core.chat import Finish, Step

        yield from (Step(id, -1.0 if at else None) for at, id in enumerate(ids))
        yield Finish("length", prompt_tokens=len(ids))


class Loader(FakeLoader):
    def load(self, model, options, progress):
        return Model(model, options)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [Loader()])
    engine.load(MISTRAL)
    seen = []
    answer = engine.answer

    def noted(prompt, params, cancel):
        seen.append((prompt.text, prompt.calls, params))
        return answer(prompt, params, cancel)

    engine.answer = noted
    with ApiServer(engine) as server:
        yield SimpleNamespace(server=server, http=server.http, seen=seen)
    engine.unload()


def call(house, name, changed):
    """(status, what there is to see of the call: what the engine was asked, what was answered)."""
    path, base, _model = PATHS[name]
    body = base | changed if name != "TGI" else base | {"parameters": base["parameters"] | changed}
    house.seen.clear()
    answer = house.http.post(path, json=body)
    said = re.sub(r'"(id|created|created_at|\w+_duration)": ?("[^"]*"|\d+)', "", answer.text)
    if answer.status_code >= 400:
        assert answer.status_code in (400, 404, 422), (name, changed, answer.text)
    return answer.status_code, (said, [(text, calls, params) for text, calls, params in house.seen])


def values_of(field, annotation):
    text = str(annotation)
    return [
        *VALUES.get(field, []),
        *([True, False] if "bool" in text else []),
        *([3, 0, 1] if "int" in text else []),
        *([0.4, 0.0, 1.5] if "float" in text else []),
        *([["x"]] if "list[str]" in text or "list[typing.Any]" in text else []),
        *([[1, 2]] if "list[int]" in text else []),
        *([{"a": 1}] if "dict" in text else []),
        *(["x"] if "str" in text else []),
    ]


def fields():
    return [(name, field, info.annotation) for name, (_, _, model) in PATHS.items() for field, info in model.model_fields.items()]


def documented():
    """(protocol's heading, field) of the table "Fields without effect"."""
    _, _, section = DOCS.read_text(encoding="utf-8").partition("### Fields without effect")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", section.partition("\n#")[0], re.M)
    return {(name.strip(), field) for name, listed in rows for field in re.findall(r"`(\w+)`", listed)}


@pytest.mark.parametrize("name", list(PATHS))
def test_no_field_is_ignored_in_silence(house, name):
    silent = []
    for _, field, annotation in [each for each in fields() if each[0] == name]:
        together = {key: value for key, value in TOGETHER.get(field, {}).items() if key in PATHS[name][2].model_fields}
        tried = values_of(field, annotation)
        assert tried, f"no value for {field} of {annotation}"
        status, before = call(house, name, together)
        assert status == 200 or together, (field, before)
        found = [call(house, name, together | {field: value}) for value in tried]
        refused = {repr(value) for value, (status, _) in zip(tried, found, strict=True) if status != 200}
        accepted = [shown for value, (status, shown) in zip(tried, found, strict=True) if status == 200]
        if refused == {"True"}:  # a switch that may only be off
            continue
        if accepted and all(shown == before for shown in accepted):
            silent.append(field)
    listed = {field for heading, field in documented() if heading in (name, "all")}
    assert sorted(set(silent) - listed) == [], "obey it, refuse it, or name it in docs/api.md"
    assert sorted(listed & set(PATHS[name][2].model_fields) - set(silent)) == [], "docs/api.md says that it has no effect"


def test_every_sampling_parameter_is_known_to_openai_and_kobold():
    """Of the programs that send such parameters at all."""
    openai, theirs = openai_models.CompletionRequest.model_fields, kobold.GenerateRequest.model_fields
    for name, row, _default in GenerationParams.table():
        if row.in_requests:
            assert name in openai, name
            assert any(each in theirs for each in row.names.get("kobold", (name,))) or name == "frequency_penalty", name


def test_a_logit_bias_comes_as_pairs_too_and_ids_of_other_models_are_passed_over(house):
    for bias in ({"1": 5, "99999": 3}, [[1, 5], [99999, 3]], [[1, 5000.0]], [], {}):
        status, (said, seen) = call(house, "KoboldAI", {"logit_bias": bias})
        assert status == 200, said
        wanted = () if not bias else ((1, 100.0 if bias == [[1, 5000.0]] else 5.0),)
        assert seen[0][2].logit_bias == wanted
    for bias in ([[1]], [["x", 1]], {"x": 1}, "x"):
        assert call(house, "KoboldAI", {"logit_bias": bias})[0] == 422, json.dumps(bias)
