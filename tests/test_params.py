"""The one list of sampling parameters: limits, types, and what is passed over."""

from dataclasses import fields
from typing import get_args

import pytest

from gptq_webui.core.errors import BadParameter
from gptq_webui.core.grammar import Grammar
from gptq_webui.core.params import (
    PRESETS,
    GenerationParams,
    Protocol,
    changed_in,
    names_in,
    neutral_values,
    read_request,
)


def test_defaults_are_those_of_the_model_card() -> None:
    defaults = PRESETS["Model card"]
    assert defaults == GenerationParams()
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.repetition_penalty, defaults.max_new_tokens) == (
        0.7,
        0.95,
        40,
        1.1,
        512,
    )


@pytest.mark.parametrize(
    "name", [each.name for each in fields(GenerationParams) if each.name not in ("stop", "logit_bias", "grammar")]
)
def test_every_limit_is_accepted_and_what_lies_beyond_is_named(name: str) -> None:
    row = next(row for each, row, _ in GenerationParams.table() if each == name)
    for value in (row.low, row.high):
        GenerationParams(**{name: value})
    for value in (row.low - 1, row.high + 1):
        with pytest.raises(BadParameter, match=rf"{name} must be between"):
            GenerationParams(**{name: value})


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "top_k"])
@pytest.mark.parametrize("value", ["7", None, True, float("nan"), float("inf"), [1]])
def test_what_is_no_number_is_refused(name: str, value: object) -> None:
    with pytest.raises(BadParameter, match=f"{name} must be a number"):
        GenerationParams(**{name: value})


def test_whole_numbers_stay_whole_and_sliders_may_send_floats() -> None:
    params = GenerationParams(max_new_tokens=64.0, temperature=1)  # type: ignore[arg-type]
    assert params.max_new_tokens == 64 and isinstance(params.max_new_tokens, int) and isinstance(params.temperature, float)
    with pytest.raises(BadParameter, match="top_k must be a whole number"):
        GenerationParams(top_k=1.5)  # type: ignore[arg-type]


def test_a_grammar_is_one_and_not_endless() -> None:
    assert GenerationParams(grammar=Grammar("json")).grammar == Grammar("json")
    with pytest.raises(BadParameter, match="grammar must be"):
        GenerationParams(grammar={"type": "json"})  # type: ignore[arg-type]
    with pytest.raises(BadParameter, match=r"a pattern may have up to 10,000 characters; found 10,001"):
        Grammar("regex", "a" * 10_001)


def test_seed_minus_one_and_none_draw_a_new_one() -> None:
    assert GenerationParams(seed=-1).seed is GenerationParams(seed=None).seed is None
    assert GenerationParams(seed=0).seed == 0


@pytest.mark.parametrize("stop", ["text", [""], [1], ["a", ""]])
def test_stop_strings_are_a_list_of_texts_that_are_not_empty(stop: object) -> None:
    with pytest.raises(BadParameter, match="stop must be a list of texts"):
        GenerationParams(stop=stop)  # type: ignore[arg-type]


def test_stop_strings_become_a_tuple() -> None:
    assert GenerationParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_saved_settings_of_other_versions_are_passed_over() -> None:
    assert GenerationParams.from_dict({"top_k": 3, "from_the_future": 1}) == GenerationParams(top_k=3)


def test_every_field_has_a_label_and_help_in_words() -> None:
    for name, row, _ in GenerationParams.table():
        assert row.label and row.help.endswith("."), name


@pytest.mark.parametrize("value", [1e-300, 1e-7, 5e-7, 9e-5])
def test_a_temperature_too_low_to_compute_with_is_greedy(value: float) -> None:
    assert GenerationParams(temperature=value).temperature == 0
    assert GenerationParams(temperature=1e-4).temperature == 1e-4


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_a_number_of_any_size_is_refused_in_words(value: int) -> None:
    with pytest.raises(BadParameter, match="top_k must be between"):
        GenerationParams(top_k=value)


def test_a_request_of_another_program_is_read_under_its_names_and_brought_within_the_limits() -> None:
    given = {"rep_pen": 0, "repetition_penalty": 1.3, "typical": 0.5, "typical_p": 0.9, "top_k": 5000, "rep_pen_range": None}
    assert read_request("kobold", given) == {"repetition_penalty": 1.3, "typical_p": 0.5, "top_k": 1000}
    assert read_request("kobold", {"temperature": True, "top_p": "1", "min_p": float("nan")}) == {}
    assert read_request("kobold", {"top_k": 10**400}) == {"top_k": 1000}


def test_what_changes_nothing_is_not_sent_to_an_engine_elsewhere() -> None:
    params = GenerationParams(top_k=0, typical_p=0.9, presence_penalty=0.5)
    assert changed_in("remote_extra", params) == {"typical_p": 0.9}
    assert changed_in("remote", params) == {"presence_penalty": 0.5}


def test_neutral_values_are_accepted_and_lie_within_the_limits() -> None:
    assert GenerationParams(**neutral_values()).top_k == 0
    assert {name for name, row, _ in GenerationParams.table() if row.in_kernel} == set(neutral_values())


def test_a_name_of_a_protocol_means_one_parameter() -> None:
    for protocol in get_args(Protocol):
        theirs = [each for names in names_in(protocol).values() for each in names]
        assert len(theirs) == len(set(theirs)), protocol


def test_logit_bias_is_pairs_or_a_mapping_within_its_limits() -> None:
    assert GenerationParams(logit_bias={"7": 1, 3: -2.5}).logit_bias == ((3, -2.5), (7, 1.0))  # type: ignore[arg-type]
    for bad in ({"x": 1}, {-1: 0}, {1: 101}, 5, [(1,)]):
        with pytest.raises(BadParameter, match="logit_bias must be pairs"):
            GenerationParams(logit_bias=bad)  # type: ignore[arg-type]
