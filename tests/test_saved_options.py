"""engine/saved_options.py: only what differs is kept, what is unknown stays, what is damaged is passed over."""

import json
from dataclasses import dataclass, field

import pytest

from gptq_webui.core.errors import BadParameter
from gptq_webui.engine.saved_options import save_for, saved_for
from gptq_webui.engine.settings import Settings


def option(default):
    return field(default=default, metadata={"label": "x"})


@dataclass(frozen=True)
class Options:
    context_tokens: int = option(0)
    dtype: str = option("auto")
    scale: float = option(1.0)
    careful: bool = option(False)

    def __post_init__(self):
        if self.context_tokens < 0:
            raise BadParameter("context_tokens must not be negative.")


class One:
    name = "one"
    options = Options


class Two:
    name = "two"

    @dataclass(frozen=True)
    class options:
        cache_type: str = option("FP16")


LOADERS = [One, Two]
DEFAULTS = {"context_tokens": 0, "dtype": "auto", "scale": 1.0, "careful": False}


def test_only_what_differs_from_the_default_is_kept():
    settings = Settings()
    save_for(settings, "m", LOADERS, None, {"one": {**DEFAULTS, "context_tokens": 4096}})
    assert json.loads(settings.path.read_text())["models"] == {"m": {"options": {"context_tokens": 4096}}}
    save_for(settings, "m", LOADERS, None, {"one": DEFAULTS})
    assert Settings().for_model("m") == {}


def test_what_nobody_here_knows_and_what_another_loader_has_is_kept():
    settings = Settings()
    settings.save_for_model("m", options={"of_the_future": [1], "cache_type": "Q4", "dtype": "fp16"}, sampling={"top_p": 1})
    save_for(settings, "m", LOADERS, "one", {"one": {**DEFAULTS, "scale": 2.0}})
    assert Settings().for_model("m") == {
        "options": {"of_the_future": [1], "cache_type": "Q4", "scale": 2.0},
        "sampling": {"top_p": 1},
        "loader": "one",
    }


def test_a_refused_value_changes_nothing():
    settings = Settings()
    settings.save_for_model("m", options={"dtype": "fp16"})
    with pytest.raises(BadParameter):
        save_for(settings, "m", LOADERS, None, {"one": {**DEFAULTS, "context_tokens": -1}})
    assert Settings().for_model("m") == {"options": {"dtype": "fp16"}}


@pytest.mark.parametrize(
    "options",
    [5, "x", None, ["a"], {"context_tokens": "many"}, {"context_tokens": -3}, {"careful": 1}, {"dtype": 4}, {"scale": True}],
)
def test_a_damaged_value_is_passed_over_and_stays_in_the_file(options):
    settings = Settings()
    settings.path.parent.mkdir(parents=True)
    text = json.dumps({"models": {"m": {"options": options, "loader": 7, "template": []}}})
    settings.path.write_text(text)
    found = saved_for(Settings(), "m", LOADERS)
    assert (found.loader, found.options, found.template) == (None, {}, None)
    assert settings.path.read_text() == text


@pytest.mark.parametrize("text", ['{"models": {"m": 3}}', '{"models": {"m": null}}', '{"last_model": 5, "models_folders": 1}'])
def test_settings_of_the_wrong_shape_are_no_settings(text):
    settings = Settings()
    settings.path.parent.mkdir(parents=True)
    settings.path.write_text(text)
    again = Settings()
    assert again.for_model("m") == {} and again.models_folders
    again.save_for_model("m", loader="one")
    assert Settings().for_model("m") == {"loader": "one"}
