"""loaders/contract/standard_folder.py: other libraries find standard names and every fact; the user's folder is not touched."""

import json
import os

import pytest
import torch
from safetensors import safe_open

import tiny
from gptq_webui.core.errors import LoadFailed
from gptq_webui.core.models import LocalModel
from gptq_webui.loaders.contract.standard_folder import config_of, standard_folder


def write(folder, **options):
    tiny.write(folder, weights="gptq_model-4bit-32g", **options)
    tiny.write_tokenizer(folder)
    return LocalModel.read(folder)


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_have_standard_names_and_the_settings_stand_in_config_json(shards, tmp_path):
    model = write(tmp_path / "model", shards=shards)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with standard_folder(model) as folder:
        names = {path.name for path in folder.iterdir()}
        assert "tokenizer.json" in names and not any(name.startswith("gptq_model") for name in names)
        assert ("model.safetensors" in names) == (shards == 1)
        seen = LocalModel.read(folder)  # as we would read it ourselves
        assert seen.kind == "gptq" and seen.quantize == model.quantize and seen.problem == ""
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
        if shards > 1:
            index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
            assert set(index.values()) == {f"model-{at:05}-of-00003.safetensors" for at in (1, 2, 3)}
            for name, file in index.items():
                with safe_open(folder / file, framework="pt") as opened:
                    assert name in opened.keys()  # noqa: SIM118
    assert not folder.exists() and {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_rope_settings_of_transformers_5_get_their_older_names(tmp_path):
    model = write(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_theta", None)
    config["rope_parameters"] = {"rope_theta": 100000.0, "rope_type": "linear", "factor": 2.0}
    path.write_text(json.dumps(config))
    found = config_of(model)
    assert found["rope_theta"] == 100000.0 and found["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_a_tied_model_gets_its_output_layer_for_libraries_that_know_no_ties(tmp_path):
    model = write(tmp_path / "model", kind="gpt2")
    with standard_folder(model, untie=True) as folder:
        with safe_open(folder / "lm_head.safetensors", framework="pt") as file:
            head = file.get_tensor("lm_head.weight")
        with safe_open(model.weights[0], framework="pt") as file:
            assert torch.equal(head, file.get_tensor("transformer.wte.weight"))
    with standard_folder(write(tmp_path / "llama"), untie=True) as folder:
        assert not (folder / "lm_head.safetensors").exists()


def test_where_no_links_are_possible_the_user_is_warned_and_nothing_stays(tmp_path, monkeypatch):
    model = write(tmp_path / "model")
    made = []
    monkeypatch.setattr(
        "gptq_webui.loaders.contract.standard_folder.tempfile.mkdtemp",
        lambda prefix: made.append(tmp_path / "view") or _make(made[0]),
    )

    def no(*_):
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", no)
    monkeypatch.setattr(os, "link", no)
    with pytest.raises(LoadFailed, match="Developer Mode"), standard_folder(model):
        pass
    assert not made[0].exists()


def _make(path):
    path.mkdir()
    return str(path)
