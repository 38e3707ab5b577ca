"""The one list of sampling parameters: limits, types, and what is passed over."""

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


@pytest.mark.parametrize("name", [name for name, row, _default in GenerationParams.table() if row.kind in ("number", "whole")])
def test_every_limit_is_accepted_and_what_lies_beyond_is_named(name: str) -> None:
    row = next(row for each, row, _ in GenerationParams.table() if each == name)
    for value in (row.low, row.high):
        GenerationParams(**{name: value})
    for value in (row.low - 1, row.high + 1):
        with pytest.raises(BadParameter, match=rf"{name} must be between"):
            GenerationParams(**{name: value})


def test_what_is_not_checked_again_is_as_the_check_leaves_it() -> None:
    rows = {name: row for name, row, _default in GenerationParams.table()}
    for name, value in neutral_values().items():
        checked = rows[name].check(name, value)
        assert checked == value and type(checked) is type(value)
        assert type(getattr(GenerationParams(**{name: value}), name)) is type(value)
    with pytest.raises(BadParameter, match="max_new_tokens"):
        GenerationParams(max_new_tokens=None)  # type: ignore[arg-type] # it has no neutral value, and no default is passed over


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "top_k"])
@pytest.mark.parametrize("value", ["7", None, True, float("nan"), float("inf"), [1]])
def test_what_is_no_number_is_refused(name: str, value: object) -> None:
    with pytest.raises(BadParameter, match=f"{name} must be a number"):
        GenerationParams(**{name: value})


def test_a_negative_penalty_stays_negative() -> None:
    params = GenerationParams(presence_penalty=-1, frequency_penalty=-0.5)
    assert (params.presence_penalty, params.frequency_penalty) == (-1.0, -0.5)


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
    assert {name for name, row, _ in GenerationParams.table() if row.in_requests} == set(neutral_values())
    assert GenerationParams(**neutral_values()).in_one_pass


def test_a_name_of_a_protocol_means_one_parameter() -> None:
    for protocol in get_args(Protocol):
        theirs = [each for names in names_in(protocol).values() for each in names]
        assert len(theirs) == len(set(theirs)), protocol


def test_logit_bias_is_pairs_or_a_mapping_within_its_limits() -> None:
    assert GenerationParams(logit_bias={"7": 1, 3: -2.5}).logit_bias == ((3, -2.5), (7, 1.0))  # type: ignore[arg-type]
    for bad in ({"x": 1}, {-1: 0}, {1: 101}, 5, [(1,)]):
        with pytest.raises(BadParameter, match="logit_bias must be pairs"):
            GenerationParams(logit_bias=bad)  # type: ignore[arg-type]


def test_what_the_kernel_leaves_to_torch_is_said_in_the_table() -> None:
    by_torch = {name for name, row, _default in GenerationParams.table() if row.by_torch}
    assert by_torch == {
        "min_tokens", "bad_words", "banned_strings", "dry_multiplier", "xtc_probability", "dynatemp_range", "smoothing_factor",
        "mirostat",
    }  # fmt: skip
    assert not GenerationParams(xtc_probability=0.1).in_one_pass and GenerationParams(xtc_threshold=0.5).in_one_pass
    assert GenerationParams(ignore_eos=True, custom_token_bans=(3,), stop_token_ids=(4,)).in_one_pass
    assert not GenerationParams(min_tokens=5).in_one_pass
    assert GenerationParams(min_tokens=5, max_new_tokens=5).in_one_pass  # the end tokens are banned throughout


def test_lists_of_other_programs_are_read_as_they_write_them() -> None:
    assert read_request("host", {"custom_token_bans": "5, 3,x"}) == {"custom_token_bans": (5, 3)}
    assert read_request("kobold", {"dry_sequence_breakers": '"\\n", ":"'}) == {"dry_sequence_breakers": ("\n", ":")}
    assert read_request("kobold", {"dry_sequence_breakers": '["\\n"]'}) == {"dry_sequence_breakers": ("\n",)}
    assert read_request("kobold", {"banned_tokens": ["ministrations", ""]}) == {"banned_strings": ("ministrations",)}
    assert read_request("kobold", {"banned_tokens": "shivers"}) == {"banned_strings": ("shivers",)}
    assert read_request("kobold", {"use_default_badwordsids": True}) == {"ignore_eos": True}
    assert read_request("openai", {"banned_tokens": [3, -1, "x"]}) == {"custom_token_bans": (3,)}


def test_the_two_ends_of_a_dynamic_temperature_are_its_middle_and_its_range() -> None:
    given = {"dynamic_temperature": True, "dynatemp_low": 0.5, "dynatemp_high": 1.5, "temperature": 3}
    assert read_request("host", given) == {"temperature": 1.0, "dynatemp_range": 0.5}
    assert read_request("host", given | {"dynamic_temperature": False}) == {"temperature": 3.0}
    assert read_request("openai", {"min_temp": 1, "max_temp": 2}) == {"temperature": 1.5, "dynatemp_range": 0.5}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ignore_eos", 1), ("stop_token_ids", [-1]), ("stop_token_ids", "5"), ("stop_token_ids", [True]),
        ("custom_token_bans", list(range(5000))), ("bad_words", ["x" * 501]), ("banned_strings", ["x"] * 513),
    ],
)  # fmt: skip
def test_lists_and_switches_of_programs_have_limits(name: str, value: object) -> None:
    with pytest.raises(BadParameter, match=name):
        GenerationParams(**{name: value})  # type: ignore[arg-type]


def test_ids_are_sorted_and_each_is_there_once() -> None:
    assert GenerationParams(stop_token_ids=[5, 3, 5]).stop_token_ids == (3, 5)  # type: ignore[arg-type]
