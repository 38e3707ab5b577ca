"""engine/settings.py: remembered, atomic, and a damaged file costs the settings only."""

import json

from gptq_webui.engine.settings import Settings


def test_what_is_saved_is_there_in_the_next_run(tmp_path):
    settings = Settings()
    settings.models_folders = [tmp_path]
    settings.save_for_model("m", loader="transformers", options={"context_tokens": 4096})
    settings.save_for_model("m", template="Vicuna")
    again = Settings()
    assert again.models_folders == [tmp_path]
    assert again.for_model("m") == {"loader": "transformers", "options": {"context_tokens": 4096}, "template": "Vicuna"}


def test_none_takes_a_value_out():
    settings = Settings()
    settings.save_for_model("m", template="Vicuna", loader="x")
    settings.save_for_model("m", template=None)
    assert Settings().for_model("m") == {"loader": "x"}


def test_keys_of_another_version_are_kept():
    settings = Settings()
    settings.path.parent.mkdir(parents=True)
    settings.path.write_text(json.dumps({"of_the_future": [1], "models": {"m": {"new": 2}}}))
    later = Settings()
    later.save_for_model("m", loader="x")
    assert json.loads(later.path.read_text()) == {"of_the_future": [1], "models": {"m": {"new": 2, "loader": "x"}}}


def test_two_processes_do_not_undo_each_other():
    first, second = Settings(), Settings()
    first.save_for_model("m", template="Vicuna")
    second.last_model = "other"
    assert Settings().for_model("m") == {"template": "Vicuna"} and Settings().last_model == "other"


def test_a_damaged_file_costs_the_settings_and_one_warning():
    settings = Settings()
    settings.path.parent.mkdir(parents=True)
    settings.path.write_text("{broken")
    damaged = Settings()
    assert "start anew" in damaged.warning and damaged.for_model("m") == {}
    damaged.last_model = "m"
    assert Settings().last_model == "m" and not Settings().warning
    assert damaged.path.with_suffix(".damaged.json").read_text() == "{broken"


def test_nothing_is_written_into_the_package():
    from pathlib import Path

    import gptq_webui

    assert not Settings().path.is_relative_to(Path(gptq_webui.__file__).parent)
