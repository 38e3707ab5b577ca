"""loaders/text/grammar_trial.py: no grammar of a request holds this process."""

import json
import time

import pytest

pytest.importorskip("llguidance")

from gptq_webui.core.errors import BadParameter
from gptq_webui.core.grammar import Grammar
from gptq_webui.loaders.text import grammar_trial
from gptq_webui.loaders.text.child_process import ChildEnded
from gptq_webui.loaders.text.grammar_trial import GrammarTrial, is_quick

USUAL = {
    "$defs": {"Step": {"type": "object", "properties": {"text": {"type": "string"}, "sure": {"type": "boolean"}},
                       "required": ["text", "sure"], "additionalProperties": False}},
    "title": "Answer", "type": "object", "additionalProperties": False, "required": ["steps"],
    "properties": {
        "steps": {"type": "array", "items": {"$ref": "#/$defs/Step"}, "minItems": 1, "maxItems": 9},
        "pattern": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}], "default": None},
        "kind": {"enum": ["a", "b"]},
    },
}  # fmt: skip


@pytest.fixture
def trial():
    found = GrammarTrial()
    yield found
    found.close()


def require(trial, kind, text):
    text = text if isinstance(text, str) else json.dumps(text)
    trial.require(Grammar(kind, text), text)


def test_a_schema_of_forty_bytes_that_takes_minutes_is_refused_and_the_next_one_is_taken(trial):
    began = time.process_time()
    with pytest.raises(BadParameter, match=r"a JSON schema that cannot be compiled: it took too long. Use a simpler one"):
        require(trial, "json_schema", {"type": "integer", "multipleOf": 999983})
    assert time.process_time() - began < 1, "this process computed it"
    require(trial, "json_schema", {"type": "integer", "multipleOf": 8})
    require(trial, "regex", "[a-z]{3}")
    require(trial, "gbnf", 'root ::= "a" | "b"')


def test_usual_schemas_and_choices_need_no_process(trial, monkeypatch):
    monkeypatch.setattr(grammar_trial, "Child", lambda *_given: pytest.fail("a process was started"))
    require(trial, "json", "")
    require(trial, "json_schema", USUAL)
    require(trial, "regex", "yes|no|I do not know\\.")


@pytest.mark.parametrize(("kind", "text"), [
    *(("json_schema", {"properties": {"a": {key: 7}}}) for key in (
        "pattern", "patternProperties", "multipleOf", "allOf", "oneOf", "not", "if", "format", "propertyNames", "contains",
        "dependentSchemas", "unevaluatedProperties", "prefixItems", "anything",
    )),
    ("json_schema", {"items": {"anyOf": [{"pattern": "a"}]}}),
    ("json_schema", {"$defs": {"a": {"additionalProperties": {"multipleOf": 3}}}}),
    ("json_schema", {"enum": list(range(2000))}),
    ("json_schema", {"enum": 7}),
    ("json_schema", {"anyOf": [{"type": "string"}] * 2000}),
    ("json_schema", [{"type": "string"}]),
    ("json_schema", "{not json"),
    ("json_schema", "[" * 5000),
    ("regex", "a{1,9}"), ("regex", "(?!a)"), ("regex", "a*"), ("regex", "\\w"), ("regex", "[ab]"),
    ("gbnf", 'root ::= "a"'),
], ids=str)  # fmt: skip
def test_whatever_is_not_known_to_be_quick_is_tried(kind, text):
    assert not is_quick(kind, text if isinstance(text, str) else json.dumps(text))


def test_what_was_found_good_is_not_tried_again(trial, monkeypatch):
    require(trial, "regex", "[a-z]{4}")
    monkeypatch.setattr(trial, "_try", lambda *_given: pytest.fail("it was tried again"))
    require(trial, "regex", "[a-z]{4}")


def test_where_no_process_can_be_started_grammars_are_taken_as_before(trial, monkeypatch):
    def none(*_given):
        raise ChildEnded("no process could be started (full)")

    monkeypatch.setattr(grammar_trial, "Child", none)
    require(trial, "regex", "[a-z]{5}")


def test_a_damaged_grammar_is_left_to_the_compiler_which_says_what_is_wrong(trial):
    for kind, text in (("json_schema", "{not json"), ("regex", "("), ("gbnf", "root ::= ("), ("json_schema", "[" * 5000)):
        require(trial, kind, text)
