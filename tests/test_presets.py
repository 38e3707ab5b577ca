"""engine/preset_store.py, preset_file.py: presets of each login, and files of text-generation-webui."""

import json

import pytest
import yaml

from gptq_webui.core.params import PRESETS, GenerationParams
from gptq_webui.engine import preset_file
from gptq_webui.engine.preset_file import SAMPLERS, BadPresetFile, from_yaml, to_yaml
from gptq_webui.engine.preset_store import MOST_PRESETS, BadPreset, PresetStore


def test_each_login_has_presets_of_its_own_and_they_survive_a_restart(tmp_path):
    PresetStore(tmp_path).save("anna", " Warm  evening ", {"temperature": 1.3})
    PresetStore(tmp_path).save("../../anna", "Other", {"top_p": 0.5})
    assert PresetStore(tmp_path).all("anna") == {"Warm evening": {"temperature": 1.3}}
    assert PresetStore(tmp_path).all("../../anna") == {"Other": {"top_p": 0.5}}
    assert PresetStore(tmp_path).all("") == {} == PresetStore(tmp_path).all("Anna")
    assert all(each.parent == tmp_path for each in tmp_path.rglob("*"))


def test_a_preset_is_renamed_deleted_and_brought_back(tmp_path):
    store = PresetStore(tmp_path)
    store.save("", "a", {"top_k": 1})
    store.save("", "b", {"top_k": 2})
    with pytest.raises(BadPreset, match="There is a preset 'b' already"):
        store.rename("", "a", "b")
    assert store.rename("", "a", "c") == "c"
    values = store.delete("", "c")
    assert list(store.all("")) == ["b"]
    with pytest.raises(BadPreset, match="no longer there"):
        store.delete("", "c")
    store.save("", "c", values)
    assert store.all("")["c"] == {"top_k": 1}


@pytest.mark.parametrize(("name", "said"), [("", "Type a name"), (" \n ", "Type a name"), ("x" * 61, "may have 60 characters")])
def test_a_name_that_cannot_be_kept_is_a_sentence(tmp_path, name, said):
    with pytest.raises(BadPreset, match=said):
        PresetStore(tmp_path).save("", name, {})


def test_there_is_an_end_to_how_many_are_kept(tmp_path):
    store = PresetStore(tmp_path)
    store._write("", {str(at): {} for at in range(MOST_PRESETS)})
    store.save("", "0", {"top_k": 5})  # replaced
    with pytest.raises(BadPreset, match="Delete one first"):
        store.save("", "one more", {})
    with pytest.raises(BadPreset, match="too large"):
        store.save("", "0", {"stop": "x" * 3_000_000})
    assert store.all("")["0"] == {"top_k": 5}


@pytest.mark.parametrize("found", ["{", "[]", "3", '{"a": 5}', "\0"])
def test_a_damaged_file_is_kept_aside_and_costs_nothing_else(tmp_path, found):
    (tmp_path / "presets.json").write_text(found)
    store = PresetStore(tmp_path)
    assert store.all("") == {}
    store.save("", "a\ud800", {"stop": "\udfff"})
    assert list(store.all("")) == ["a?"]
    assert (tmp_path / "presets.damaged.json").read_text() == found


def sampled(params: GenerationParams) -> dict:
    return {name: getattr(params, name) for name in SAMPLERS}


@pytest.mark.parametrize(
    "params",
    [
        *PRESETS.values(),
        GenerationParams(dynatemp_range=0.5, temperature=1.0, dynatemp_exponent=2.0, repetition_range=1024),
        GenerationParams(dry_multiplier=0.8, dry_sequence_breakers=("\n", '"', "ä\\"), dry_penalty_last_n=64),
        GenerationParams(mirostat=2, mirostat_tau=4.0, xtc_probability=0.5, xtc_threshold=0.2, smoothing_factor=0.3),
        GenerationParams(top_n_sigma=1.5, typical_p=0.5, presence_penalty=-1, frequency_penalty=0.5, repetition_range=77),
    ],
)
def test_what_goes_out_comes_back(params):
    found = from_yaml(to_yaml(params))
    for name, value in sampled(params).items():
        assert found.values[name] == (value if isinstance(value, tuple) else pytest.approx(value)), name
    assert not found.ignored


def test_a_file_has_the_names_and_meanings_of_text_generation_webui():
    written = yaml.safe_load(to_yaml(GenerationParams(temperature=0.0, top_p=1.0, top_k=0, mirostat=2, repetition_range=1024)))
    assert written == {"do_sample": False, "repetition_penalty": 1.1, "mirostat_mode": 2}
    found = from_yaml("temperature: 1.3\ntop_p: 0.14\nrepetition_penalty: 1.17\ntop_k: 49\ntop_a: 0.2\ntemperature_last: true\n")
    assert (found.values["temperature"], found.values["top_k"], found.values["min_p"]) == (1.3, 49, 0.0)
    assert found.values["repetition_range"] == 1024  # their default
    assert found.ignored == ("top_a",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Found nothing"), ("[1, 2]", "Found a list"), ("hello", "Found plain text"), ("{", "not YAML"),
        ("a: &x [1]\nb: *x", "no references"), ("width: 3", "None of its names"), ("temperature: 1\n" * 10_000, "at most"),
        ("!!python/object/apply:os.system ['true']", "not YAML"), ("\0", "not YAML"), ("[" * 5000, "not YAML"),
    ],
)  # fmt: skip
def test_what_is_no_preset_is_a_sentence(text, said):
    with pytest.raises(BadPresetFile, match=said):
        from_yaml(text)


@pytest.mark.parametrize("value", ["x", "null", "[1]", "99999", "-5", ".nan", "true", "{a: 1}", "1" + ":1" * 2000 + ".5"])
def test_a_value_of_the_wrong_type_costs_that_value(value):
    found = from_yaml(f"temperature: {value}\nmin_p: 0.1")
    GenerationParams(**found.values)
    assert found.values["min_p"] == 0.1


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9, "top_k": 50}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.05}, {"temperature": 0.0, "repetition_penalty": 1.05}),
        ({"temperature": 1.0, "top_k": 20, "max_new_tokens": 2048}, {"top_k": 20, "max_new_tokens": 2048}),
        ({"temperature": 99, "max_new_tokens": 10**7}, {"temperature": 5.0, "max_new_tokens": 32768}),
    ],
)
def test_the_makers_values_are_read_from_generation_config(tmp_path, config, values):
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    found = preset_file.of_model(tmp_path)
    assert found is not None and found.values | values == found.values
    GenerationParams(**found.values)


def test_a_model_that_says_nothing_has_no_preset(tmp_path):
    assert preset_file.of_model(tmp_path) is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert preset_file.of_model(tmp_path) is None
