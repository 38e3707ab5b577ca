"""loaders/text/grammar_matcher.py and the loop below it: whatever the model is, its answer obeys the grammar."""

import json
import re
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("llguidance")

import tiny
from gptq_webui.core.chat import Finish
from gptq_webui.core.errors import BadParameter
from gptq_webui.core.grammar import Grammar
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.generation import generate
from gptq_webui.gptq.prefix_cache import PrefixCache
from gptq_webui.gptq.transformers_stepper import TransformersStepper
from gptq_webui.loaders.text import grammar_matcher
from gptq_webui.loaders.text.grammar_matcher import Grammars
from gptq_webui.loaders.text.token_codec import TokenCodec

END = 1
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def schema(value=SCHEMA):
    return Grammar("json_schema", json.dumps(value))


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A model of random weights: only the form can make its answers right. It has more ids than the tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("words")
    tiny.write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SimpleNamespace(model=tiny.dense_model("llama"), tokenizer=tokenizer, held=Grammars(TokenCodec(tokenizer)))


def answer(random_model, grammar, stepper=None, ends=(END,), **values):
    """(text, Finish)"""
    params = GenerationParams(**{"temperature": 1.0, "repetition_penalty": 1, "top_p": 1, "top_k": 0} | values)
    events = list(
        generate(
            stepper or random_model.model, list(range(5, 20)), params, threading.Event(), prefix=PrefixCache(), end_ids=set(ends),
            context_tokens=250, grammar_mask=random_model.held.begin(grammar, ends),
        )
    )  # fmt: skip
    assert isinstance(events[-1], Finish)
    return random_model.tokenizer.decode([each.id for each in events[:-1]]), events[-1]


@pytest.mark.parametrize(
    "values", [{}, {"top_k": 5}, {"temperature": 0}, {"min_p": 0.3}, {"typical_p": 0.5}, {"top_p": 0.2}], ids=str
)
def test_a_random_models_answer_fits_the_schema(random_model, values):
    for seed in range(3):
        text, finish = answer(random_model, schema(), seed=seed, max_new_tokens=230, **values)
        found = json.loads(text)
        assert set(found) == set(SCHEMA["required"]) and finish.reason == "stop"
        assert isinstance(found["name"], str) and len(found["name"]) <= 3 and 0 <= found["age"] <= 150


def test_patterns_and_rules_hold_too(random_model):
    text, finish = answer(random_model, Grammar("regex", r"[a-c]{3}-(yes|no)"), seed=1)
    assert re.fullmatch(r"[a-c]{3}-(yes|no)", text) and finish.reason == "stop"
    text, _finish = answer(random_model, Grammar("gbnf", 'root ::= ("x" | num) "!"\nnum ::= [0-9] [0-9]'), seed=1)
    assert re.fullmatch(r"(x|\d\d)!", text)


def test_an_answer_that_is_complete_ends_there_also_on_its_last_token(random_model):
    text, finish = answer(random_model, Grammar("regex", "abc"), max_new_tokens=3)
    assert (text, finish.reason) == ("abc", "stop")
    text, finish = answer(random_model, Grammar("regex", "abcd"), max_new_tokens=3)
    assert (text, finish.reason) == ("abc", "length")


def test_the_end_token_comes_only_where_the_form_may_end(random_model):
    held = random_model.held.begin(Grammar("regex", "ab+"), {END})
    a, b = random_model.tokenizer.convert_tokens_to_ids(["a", "b"])
    assert held.allowed(288).nonzero().flatten().tolist() == [a]
    held.take(a)
    assert held.allowed(288).nonzero().flatten().tolist() == [b] and not held.complete
    held.take(b)
    assert held.allowed(288).nonzero().flatten().tolist() == [END, b] and not held.complete
    held.take(END)
    assert held.complete


def test_the_ends_are_those_of_the_template_that_is_set(random_model):
    a = random_model.tokenizer.convert_tokens_to_ids("a")
    for ends in ({1}, {1, 3}, {3}):
        held = random_model.held.begin(Grammar("regex", "a*"), ends)
        assert set(held.allowed(288).nonzero().flatten().tolist()) == {*ends, a}
        held.take(min(ends))


def test_white_space_cannot_run_on(random_model):
    space = random_model.tokenizer.convert_tokens_to_ids("Ġ")
    held = random_model.held.begin(Grammar("json"), {END})
    held.take(random_model.tokenizer.convert_tokens_to_ids("{"))
    count = 0
    while count < 100 and bool(held.allowed(288)[space]):
        held.take(space)
        count += 1
    assert 8 <= count <= 80


def test_a_stepper_that_runs_ahead_is_asked_token_by_token(random_model):
    class Ahead(TransformersStepper):
        def answer(self, *_):
            raise AssertionError("it draws on its device and cannot be held")

    assert answer(random_model, Grammar("regex", "(ab)+c"), Ahead(random_model.model), seed=1, max_new_tokens=200)[0].endswith(
        "abc"
    )


BAD = [
    (schema({"type": "nonsense"}), "JSON schema that no answer can obey: Invalid type: nonsense"),
    (schema({"type": "object", "not": {}}), "not"),
    (schema({"$ref": "https://example.com/x.json"}), "does not fetch"),
    (schema({"$ref": "#"}), "no text can satisfy it"),
    (schema({"type": "string", "pattern": "(("}), "unclosed group"),
    (Grammar("json_schema", '{"a": ' * 500), "JSON schema that is not valid|recursion limit"),
    (Grammar("regex", "a(?=b)"), "look-around"),
    (Grammar("regex", "\ud800"), "pattern that is not valid"),
    (Grammar("gbnf", 'rule ::= "a"'), "No 'root' rule"),
    (Grammar("gbnf", "root ::= root"), "no text can satisfy it"),
    (Grammar("gbnf", "root ::= " + "(" * 4000), "recursion"),
]


@pytest.mark.parametrize(("grammar", "words"), BAD, ids=lambda each: str(each)[:60])
def test_a_form_that_cannot_be_had_is_refused_in_words(random_model, grammar, words):
    with pytest.raises(BadParameter, match=words) as caught:
        random_model.held.begin(grammar, {END})
    assert len(str(caught.value)) < 300 and "<state>" not in str(caught.value)


def test_a_form_that_becomes_too_much_ends_the_answer_in_words(random_model):
    many = schema({"type": "integer", "multipleOf": 1000003, "minimum": -99999999999, "maximum": 9999999999999999})
    with pytest.raises(BadParameter, match="cannot obey this grammar any longer"):
        answer(random_model, many, seed=1)


def test_without_the_package_it_is_named(random_model, monkeypatch):
    monkeypatch.setattr(grammar_matcher, "find_spec", lambda name: None)
    with pytest.raises(BadParameter, match="pip install llguidance"):
        random_model.held.begin(Grammar("json"), {END})


def test_an_old_package_is_named_with_its_version(random_model, monkeypatch):
    monkeypatch.setattr(grammar_matcher, "version", lambda name: "1.3.0")
    with pytest.raises(BadParameter, match=r"llguidance is 1\.3\.0 here; .* pip install -U llguidance"):
        random_model.held.begin(Grammar("json"), {END})


def test_a_tokenizer_that_cannot_be_read_is_reported():
    slow = type("Slow", (), {"__len__": lambda self: 3})()
    with pytest.raises(BadParameter, match="cannot read its tokenizer"):
        Grammars(TokenCodec(slow)).begin(Grammar("json"), {END})


def test_many_threads_ask_at_once(random_model):
    held, found = Grammars(TokenCodec(random_model.tokenizer)), []

    def ask(at):
        found.append(int(held.begin(Grammar("regex", f"{chr(97 + at)}x"), {END}).allowed(288).sum()))

    threads = [threading.Thread(target=ask, args=(at % 12,)) for at in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [1] * 24


BOMBS = [
    ("gbnf", "start: " + " & ".join(f"/(a{{{prime}}})*/" for prime in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29))),
    ("gbnf", "start: A\nA: ~(/a/ ~ 5) & ~/b/ & /c/"),
    ("json_schema", json.dumps({"const": "x" * 190_000})),
    ("json_schema", json.dumps({"enum": ["a", "x" * 100_000]})),
    ("json_schema", json.dumps({"type": "object", "patternProperties": {f"^x{at}_.*y": {} for at in range(1500)}})),
    ("json_schema", json.dumps({"allOf": [{"type": "string", "pattern": f"a.{{{at}}}b"} for at in range(300)]})),
    ("json_schema", json.dumps({"allOf": [{"$ref": f"#/$defs/p{at}"} for at in range(30)],
                                "$defs": {f"p{at}": {"pattern": f"a.{{{at}}}b"} for at in range(30)}})),
    ("json_schema", json.dumps({"properties": {f"p{at}": {} for at in range(9000)},
                                "required": [f"p{at}" for at in range(2000)]})),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), BOMBS, ids=range(len(BOMBS)))
def test_what_takes_minutes_to_compile_is_refused_at_once(kind, text):
    with pytest.raises(BadParameter, match="take minutes to compile"):
        Grammar(kind, text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("gbnf", 'root ::= "a & b & c & d & e" [&~&~&] "~"'),
        ("json_schema", json.dumps({"properties": {f"p{at}": {"pattern": f"^a{at}$"} for at in range(40)}})),
        ("json_schema", json.dumps({"properties": {f"p{at}": {"type": "integer"} for at in range(1500)}})),
        ("json_schema", json.dumps({"allOf": [{"properties": {"a": {"pattern": "^b"}}}, {"required": ["a"]}]})),
        ("json_schema", "{not json"),
        ("json_schema", '{"properties": 5, "required": true, "patternProperties": 1.5, "pattern": {}, "allOf": null}'),
        ("json_schema", '[{"required": -1}, 7, null]'),
    ],
)
def test_what_is_large_and_compiles_is_taken(kind, text):
    assert Grammar(kind, text).text == text
