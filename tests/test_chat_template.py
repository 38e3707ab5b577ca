"""loaders/text/chat_template.py: the right template is found, and it renders as its makers wrote it."""

from types import SimpleNamespace

import pytest

from fake_library import MISTRAL, FakeLibrary
from gptq_webui.core.chat import Message
from gptq_webui.core.errors import BadParameter
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.loaders.text import chat_template
from gptq_webui.loaders.text.built_in_templates import BUILT_IN, CHATML, PLAIN

CHAT = [Message("user", "U1"), Message("assistant", "A1"), Message("user", "U2")]


class LlamaTokenizer:
    bos_token, eos_token, bos_token_id, eos_token_id = "<s>", "</s>", 1, 2
    chat_template = None


def render(name, messages=CHAT):
    return chat_template.named(name).render(messages, LlamaTokenizer())


def test_the_mistral_model_cards_conversation_renders_as_in_the_model_card():
    condiment = "Well, I'm quite partial to a squeeze of fresh lemon juice."
    found = render(
        "Mistral [INST]",
        [
            Message("user", "What is your favourite condiment?"),
            Message("assistant", condiment),
            Message("user", "Do you have mayonnaise recipes?"),
        ],
    )
    assert found == (
        f"<s>[INST] What is your favourite condiment? [/INST]{condiment}</s> [INST] Do you have mayonnaise recipes? [/INST]"
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "ChatML",
            "<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
            "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("Llama-2 [INST]", "<s>[INST] U1 [/INST] A1 </s><s>[INST] U2 [/INST]"),
        ("Zephyr", "<|user|>\nU1</s>\n<|assistant|>\nA1</s>\n<|user|>\nU2</s>\n<|assistant|>\n"),
        ("Human/Assistant ###", "<s>### Human: U1\n### Assistant: A1</s>\n### Human: U2\n### Assistant:"),
    ],
)  # fmt: skip
def test_built_in_templates(name, wanted):
    assert render(name) == wanted


def test_vicuna_begins_with_its_system_text():
    assert render("Vicuna").startswith("<s>A chat between a curious user and an artificial intelligence assistant.")
    assert render("Vicuna").endswith("USER: U1 ASSISTANT: A1</s>USER: U2 ASSISTANT:")


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_template_shows_the_whole_conversation_in_order(name):
    text = render(name, [Message("system", "S0"), *CHAT])
    positions = [text.index(part) for part in ("S0", "U1", "A1", "U2")]
    assert positions == sorted(positions)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_template_can_be_continued(name):
    assert render(name, [Message("user", "U1"), Message("assistant", "A1 and")]).endswith("A1 and")


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("Vicuna", ("USER:", "ASSISTANT:")),
        ("Alpaca", ("### Instruction:", "### Response:")),
        ("Mistral [INST]", ("[INST]", "[/INST]")),
        ("ChatML", ("<|im_end|>", "<|im_start|>user", "<|im_start|>assistant")),
    ],
)
def test_role_markers_are_stop_strings(name, stop):
    assert chat_template.named(name).bound(LlamaTokenizer()).stop == stop


def test_role_markers_that_are_special_tokens_are_stop_ids(tmp_path):
    from transformers import AutoTokenizer

    import tiny

    tiny.write_tokenizer(tmp_path, CHATML)
    template = chat_template.find(tmp_path, AutoTokenizer.from_pretrained(tmp_path), "LlamaForCausalLM")
    assert set(template.stop_ids) == {2, 3} and template.stop == ()


@pytest.mark.parametrize(
    ("folder", "wanted"),
    [
        ("TheBloke_Mistral-7B-Instruct-v0.2-GPTQ_gptq-4bit-32g-actorder_True", "Mistral [INST]"),
        ("TheBloke_Llama-2-13B-chat-GPTQ", "Llama-2 [INST]"),
        ("TheBloke_vicuna-13B-v1.5-GPTQ", "Vicuna"),
        ("TheBloke_OpenHermes-2.5-Mistral-7B-GPTQ", "ChatML"),
        ("TheBloke_zephyr-7B-beta-GPTQ", "Zephyr"),
        ("TheBloke_MythoMax-L2-13B-GPTQ", "Alpaca"),
        ("TheBloke_Mixtral-8x7B-Instruct-v0.1-GPTQ", "Mistral [INST]"),
        ("TheBloke_Llama-2-7B-GPTQ", PLAIN),
    ],
)
def test_the_name_tells_the_template(folder, wanted, tmp_path):
    (tmp_path / folder).mkdir()
    found = chat_template.find(tmp_path / folder, LlamaTokenizer(), "LlamaForCausalLM")
    assert found.name == wanted
    assert found.is_chat == (wanted != PLAIN)


def model_card(folder, template):
    import json

    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\nbase_model: x/y\nprompt_template: {json.dumps(template)}\n---\n# Card\n")
    return folder


def test_the_model_card_comes_before_the_name(tmp_path):
    folder = model_card(tmp_path / "vicuna-13b", "### Instruction:\n{prompt}\n\n### Response:\n")
    found = chat_template.find(folder, LlamaTokenizer(), "LlamaForCausalLM")
    assert (found.name, found.source) == ("Alpaca", "the model card")


def test_a_model_card_of_no_known_family_becomes_a_template_of_its_own(tmp_path):
    folder = model_card(tmp_path / "model", "You are kind.\n\nHUMAN: {prompt}\nBOT:")
    found = chat_template.find(folder, LlamaTokenizer(), "LlamaForCausalLM")
    assert found.render(CHAT, LlamaTokenizer()) == "<s>You are kind.\n\nHUMAN: U1\nBOT:A1</s>\nHUMAN: U2\nBOT:"
    assert found.stop == ("HUMAN:", "BOT:")


def test_the_models_own_template_comes_first(tmp_path):
    class Own(LlamaTokenizer):
        chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"

    folder = model_card(tmp_path / "mistral-instruct", "USER: {prompt} ASSISTANT:")
    found = chat_template.find(folder, Own(), "MistralForCausalLM")
    assert found.name == "the model's own" and found.render(CHAT, Own()) == "<user>U1<assistant>A1<user>U2"


def test_a_template_without_a_system_role_gets_the_text_before_the_first_message():
    refuse = "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    strict = "{% for m in messages %}" + refuse + "[{{ m['content'] }}]{% endfor %}"
    template = chat_template.ChatTemplate(strict, "strict", "test")
    assert template.render([Message("system", "S"), *CHAT], LlamaTokenizer()) == "[S\n\nU1][A1][U2]"


def test_two_messages_of_one_role_are_joined():
    assert "U1\n\nU1b" in render("Mistral [INST]", [Message("user", "U1"), Message("user", "U1b")])


def test_a_broken_template_is_a_sentence():
    with pytest.raises(BadParameter, match="Choose another template"):
        chat_template.ChatTemplate("{{ raise_exception('never') }}", "broken", "test").render(CHAT, LlamaTokenizer())


def test_an_unknown_name_is_a_sentence():
    with pytest.raises(BadParameter, match="ChatML"):
        chat_template.named("nonsense")


def test_a_template_cannot_reach_python():
    with pytest.raises(BadParameter):
        chat_template.ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", "evil", "test").render(
            CHAT, LlamaTokenizer()
        )


def test_a_template_of_ones_own_is_used_remembered_and_refused_in_words(tmp_path):
    engine = Engine(FakeLibrary(tmp_path), Settings(tmp_path / "settings.json"), [FakeLoader()])
    engine.load(MISTRAL)
    own = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    engine.set_template(own)
    assert engine.loaded.prompt([Message("user", "Hi")]).text == "<user>Hi<bot>"
    engine.reload()
    assert engine.loaded.template.name == "your own" and engine.loaded.prompt([Message("user", "Hi")]).text == "<user>Hi<bot>"
    for bad, words in (("{% for %}", "cannot be used"), ("{{ 1 }}", "does not contain"), ("{% set x = 1 %}" * 20_000, "limit")):
        with pytest.raises(BadParameter, match=words):
            engine.set_template(bad)
    assert engine.loaded.prompt([Message("user", "Hi")]).text == "<user>Hi<bot>"
    engine.unload()


def test_names_of_templates_are_shown_short_and_printable(tmp_path):
    given = {f"\x1b[2J{at}" * 30: "{% for m in messages %}{{ m['content'] }}{% endfor %}" for at in range(5000)}
    found = chat_template.find(tmp_path, SimpleNamespace(chat_template=given, bos_token="", eos_token=""), "")
    found.close()
    assert found.note.isprintable() and len(found.note) < 600 and "and 4992 more" in found.note


def test_a_template_of_any_length_is_a_sentence(tmp_path):
    tokenizer = SimpleNamespace(chat_template="{# " + "x" * 2_000_000 + " #}", bos_token="", eos_token="")
    assert "has more than 1,000,000 characters" in chat_template.find(tmp_path, tokenizer, "").warning
