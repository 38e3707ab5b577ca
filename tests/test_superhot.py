"""loaders/contract/superhot.py: models whose context is stretched by code in their folder are computed as that code does."""

import json

import pytest

import tiny
from gptq_webui.core.models import LocalModel
from gptq_webui.loaders.autogptq.autogptq_loader import AutoGPTQLoader, AutoGPTQOptions
from gptq_webui.loaders.contract.superhot import compression
from gptq_webui.loaders.exllamav2.exllamav2_loader import ExLlamaV2Options
from gptq_webui.loaders.machine.memory_fit import Memory
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions


def folder_of(tmp_path, name, tokens, code=False, **more):
    folder = tmp_path / name
    tiny.write(folder)
    tiny.write_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": tokens, "rope_theta": 10000.0, **more}))
    if code:
        (folder / "modelling_llama.py").write_text("raise SystemExit('never run')")
    return LocalModel.read(folder)


@pytest.mark.parametrize(
    ("name", "tokens", "code", "factor"),
    [
        ("TheBloke_Vicuna-13B-1-3-SuperHOT-8K-GPTQ", 8192, True, 4),
        ("TheBloke_Guanaco-7B-SuperHOT-8K-GPTQ", 2048, False, 4),  # an older config.json
        ("renamed", 4096, True, 2),
        ("TheBloke_Vicuna-13B-GPTQ", 2048, False, 1),
        ("TheBloke_Vicuna-13B-v1.5-16K-GPTQ", 4096, False, 1),
    ],
)
def test_what_positions_are_divided_by(name, tokens, code, factor, tmp_path):
    assert compression(folder_of(tmp_path, name, tokens, code)) == factor


def test_a_model_that_says_its_scaling_is_left_alone(tmp_path):
    model = folder_of(tmp_path, "SuperHOT-8K", 8192, True, rope_scaling={"type": "linear", "factor": 4.0})
    assert compression(model) == 1


def test_it_is_set_said_and_may_be_changed(tmp_path):
    model = folder_of(tmp_path, "SuperHOT-8K", 8192, True)
    for options in (TransformersOptions(), ExLlamaV2Options()):
        assert options.for_model(model).compress_pos_emb == 4
        assert options.for_model(model).demand(model, True).trained_tokens == 8192
    assert TransformersOptions(compress_pos_emb=2).for_model(model).compress_pos_emb == 2
    assert TransformersLoader().fit(model, TransformersOptions(), Memory(1 << 40)).context_tokens == 8192
    assert "SuperHOT" in AutoGPTQLoader().refusal(model, AutoGPTQOptions()).reason
    loaded = TransformersLoader().load(model, TransformersOptions(device="cpu"), lambda share, text: None)
    try:
        assert any("Positions are divided by 4" in note for note in loaded.notes)
        plain = TransformersLoader().load(model, TransformersOptions(device="cpu", alpha_value=1.0001), lambda share, text: None)
        factors = [each.hf.model.rotary_emb.inv_freq for each in (loaded, plain)]
        assert abs(float((factors[1] / factors[0])[0]) - 4) < 0.01
        plain.close()
    finally:
        loaded.close()
