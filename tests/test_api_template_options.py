"""What requests say to the chat template: the prompts that a model which can think is given, door by door."""

import logging

import pytest

from api_server import ApiServer
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader, FakeModel
from gptq_webui.loaders.text.chat_template import named

JINJA = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if reasoning_effort is defined %}effort {{ reasoning_effort }}\n{% endif %}"
    "{% if city is defined %}city {{ city }}\n{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>\n{% endif %}"
    "{% if enable_thinking is defined and enable_thinking %}think!\n{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
OPENAI = "/v1/chat/completions"
ANTHROPIC = CHAT | {"max_tokens": 5}
OLLAMA = CHAT | {"model": MISTRAL, "stream": False}
CASES = [  # path, body, what the prompt ends with
    (OPENAI, CHAT, ""),
    (OPENAI, CHAT | {"enable_thinking": False}, "<think></think>\n"),
    (OPENAI, CHAT | {"enable_thinking": True}, "think!\n"),
    (OPENAI, CHAT | {"reasoning_effort": "none"}, "<think></think>\n"),
    (OPENAI, CHAT | {"reasoning_effort": "auto"}, ""),  # SillyTavern's
    (OPENAI, CHAT | {"reasoning_effort": "min"}, "effort minimal\n"),
    (OPENAI, CHAT | {"reasoning_effort": "high"}, "effort high\n"),
    (OPENAI, CHAT | {"chat_template_kwargs": {"enable_thinking": False, "city": "Rome"}}, "city Rome\n<think></think>\n"),
    (OPENAI, CHAT | {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False}, "think!\n"),
    (OPENAI, CHAT | {"chat_template_kwargs": {"messages": [], "tools": [], "add_generation_prompt": False}}, ""),
    ("/v1/responses", {"input": "Hi", "reasoning": {"effort": "none"}}, "<think></think>\n"),
    ("/v1/responses", {"input": "Hi", "reasoning": {"effort": "low"}}, "effort low\n"),
    ("/v1/messages", ANTHROPIC, ""),
    ("/v1/messages", ANTHROPIC | {"thinking": {"type": "disabled"}}, "<think></think>\n"),
    ("/v1/messages", ANTHROPIC | {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "think!\n"),
    ("/v1/messages", ANTHROPIC | {"output_config": {"effort": "max"}}, "effort max\n"),
    ("/api/chat", OLLAMA, ""),
    ("/api/chat", OLLAMA | {"think": False}, "<think></think>\n"),
    ("/api/chat", OLLAMA | {"think": True}, "think!\n"),
    ("/api/chat", OLLAMA | {"think": "low"}, "effort low\nthink!\n"),
    ("/api/generate", {"prompt": "Hi", "model": MISTRAL, "stream": False, "think": False}, "<think></think>\n"),
]
BAD = [
    (OPENAI, CHAT | {"reasoning_effort": "huge"}, "reasoning_effort must be one of none, minimal"),
    (OPENAI, CHAT | {"reasoning_effort": 3}, "reasoning_effort"),
    (OPENAI, CHAT | {"enable_thinking": "perhaps"}, "enable_thinking"),
    (OPENAI, CHAT | {"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    (OPENAI, CHAT | {"chat_template_kwargs": {"city": "x" * 200_000}}, "more than 100,000 characters"),
    ("/v1/responses", {"input": "Hi", "reasoning": {"effort": "huge"}}, "reasoning.effort must be one of"),
    ("/v1/messages", ANTHROPIC | {"output_config": {"effort": "huge"}}, "output_config.effort must be one of"),
    ("/api/chat", OLLAMA | {"think": "huge"}, "think must be one of"),
    ("/tokenize", CHAT | {"reasoning_effort": "huge"}, "reasoning_effort must be one of"),
]


class Thinking(FakeModel):
    def __init__(self, model, options):
        super().__init__(model, options)
        self.template = named(JINJA).bound(self.tokenizer)


class Loader(FakeLoader):
    def load(self, model, options, progress):
        return Thinking(model, options)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [Loader()])
    engine.load(MISTRAL)
    with ApiServer(engine) as server:
        server.prompts = []
        answer = engine.answer
        engine.answer = lambda prompt, *rest: server.prompts.append(prompt.text) or answer(prompt, *rest)
        yield server
    engine.unload()


@pytest.mark.parametrize("at", range(len(CASES)))
def test_the_template_is_given_what_the_request_says(house, at):
    path, body, end = CASES[at]
    answer = house.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert house.prompts[-1] == f"<user>Hi\n{end}"


def test_counts_see_the_same_prompt(house):
    def tokens(path, body):
        answer = house.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    for more in ({}, {"enable_thinking": False}, {"reasoning_effort": "high"}, {"chat_template_kwargs": {"city": "a b c"}}):
        house.http.post(OPENAI, json=CHAT | more)
        made = tokens("/chat_tokenize", CHAT | more)
        assert made["templated_text"] == house.prompts[-1]
        ids = tokens("/tokenize", CHAT | more)["tokens"]
        assert len(ids) == len(made["tokenize_response"])
        assert tokens("/v1/internal/chat-prompt", CHAT | more)["prompt"] == house.prompts[-1]
    plain = tokens("/v1/messages/count_tokens", CHAT)["input_tokens"]
    unthinking = tokens("/v1/messages/count_tokens", CHAT | {"thinking": {"type": "disabled"}})["input_tokens"]
    assert unthinking == plain + 1


@pytest.mark.parametrize("at", range(len(BAD)))
def test_what_cannot_be_is_refused_in_words(house, at):
    path, body, words = BAD[at]
    answer = house.http.post(path, json=body)
    assert answer.status_code in (400, 422) and words in answer.text, answer.text


def test_a_value_that_the_template_does_not_take_is_named_once(house, caplog):
    body = CHAT | {"chat_template_kwargs": {"moon": 1}}
    with caplog.at_level(logging.INFO, logger="gptq_webui"):
        for _ in range(2):
            assert house.http.post(OPENAI, json=body).status_code == 200
    assert sum("moon" in each.getMessage() for each in caplog.records) == 1
