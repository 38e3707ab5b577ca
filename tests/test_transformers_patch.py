"""gptq_webui.register(): the model card's Python example runs through our layers, and can be undone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gptq_webui
import tiny
from gptq_webui.core.errors import BadCheckpoint, BadQuantizeConfig
from gptq_webui.gptq.gptq_linear import GPTQLinear


@pytest.fixture
def registered():
    gptq_webui.register()
    yield
    gptq_webui.unregister()


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map="auto", dtype=torch.float32, revision="main", **options)


@pytest.mark.parametrize(
    "written",
    [{}, {"g_idx": False, "act_order": False}, {"shards": 3}, {"form": "gptq_v2", "sym": False, "bits": 8}, {"kind": "mixtral"}],
    ids=str,
)
def test_plain_transformers_code_gives_the_logits_of_the_dense_twin(written, tmp_path, registered):
    twin = tiny.write(tmp_path / "model", settings="config", **written)
    model = load(tmp_path / "model", trust_remote_code=False)
    assert any(isinstance(module, GPTQLinear) for module in model.modules())
    ids = torch.randint(0, 288, (1, 24))
    with torch.no_grad():
        wanted, found = twin(ids).logits, model(ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def test_generate_and_pipeline_run_as_the_model_card_writes_them(tmp_path, registered):
    from transformers import AutoTokenizer, pipeline

    tiny.write(tmp_path / "model", settings="config")
    tiny.write_tokenizer(tmp_path / "model")
    model = load(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", use_fast=True)
    input_ids = tokenizer("Tell me about AI", return_tensors="pt").input_ids.to(model.device)
    output = model.generate(inputs=input_ids, temperature=0.7, do_sample=True, top_p=0.95, top_k=40, max_new_tokens=8)
    assert output.shape[1] > input_ids.shape[1]
    pipe = pipeline(
        "text-generation", model=model, tokenizer=tokenizer, max_new_tokens=8, do_sample=True, temperature=0.7, top_p=0.95,
        top_k=40, repetition_penalty=1.1,
    )  # fmt: skip
    assert pipe("Tell me about AI")[0]["generated_text"].startswith("Tell me about AI")


GPU = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("door", sys.argv[1])
door = importlib.util.module_from_spec(spec)
spec.loader.exec_module(door)
door.register()

import gptq_webui
gptq_webui.register()

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

model_name_or_path = "TheBloke/Tiny-7B-GPTQ"
model = AutoModelForCausalLM.from_pretrained(
    model_name_or_path, device_map="auto", trust_remote_code=False, revision="gptq-4bit-32g-actorder_True"
)
tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, use_fast=True, revision="gptq-4bit-32g-actorder_True")
input_ids = tokenizer("Tell me about AI", return_tensors="pt").input_ids
print(len(model.generate(inputs=input_ids, do_sample=False, max_new_tokens=6)[0]) - input_ids.shape[1])
print(type(model.model.layers[0].self_attn.q_proj).__name__, "optimum" in sys.modules, "gptqmodel" in sys.modules)
"""


def test_the_model_cards_example_runs_from_the_hub_with_a_branch(tmp_path, hub_server):
    tiny.write(tmp_path / "model", settings="config")
    tiny.write_tokenizer(tmp_path / "model")
    hub_server.add("TheBloke/Tiny-7B-GPTQ", tmp_path / "model", "gptq-4bit-32g-actorder_True")
    entry = str(Path(gptq_webui.__file__).parent / "script.py")
    environment = {**os.environ, "HF_ENDPOINT": hub_server.url, "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", GPU, entry], capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
    )
    assert done.stdout.split() == ["6", "GPTQLinear", "False", "False"], done.stderr[-2000:]


def test_it_is_undone_and_the_original_can_be_reached_meanwhile(tmp_path):
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from gptq_webui.gptq import transformers_patch as module

    before = AUTO_QUANTIZER_MAPPING["gptq"]
    gptq_webui.register()
    gptq_webui.register()
    try:
        assert AUTO_QUANTIZER_MAPPING["gptq"] is module.RegisteredQuantizer
        with module.original():
            assert AUTO_QUANTIZER_MAPPING["gptq"] is before
        assert AUTO_QUANTIZER_MAPPING["gptq"] is module.RegisteredQuantizer
    finally:
        gptq_webui.unregister()
    gptq_webui.unregister()
    assert AUTO_QUANTIZER_MAPPING["gptq"] is before


def test_a_folder_that_only_says_gptq_is_an_error_and_never_random_weights(tmp_path, registered):
    import json

    tiny.dense_model("llama").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"bits": 4, "group_size": 32, "quant_method": "gptq"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match="no packed GPTQ weights"):
        load(tmp_path / "model")


def test_quantising_with_transformers_is_refused_in_words(tmp_path, registered):
    from transformers import GPTQConfig

    tiny.dense_model("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(BadQuantizeConfig, match="unregister"):
        load(tmp_path / "model", quantization_config=GPTQConfig(bits=4, dataset=["a"], tokenizer="x"))


def test_asking_the_package_for_it_imports_nothing_before(tmp_path):
    code = (
        "import sys, gptq_webui; print('transformers' in sys.modules); print(callable(gptq_webui.register)); "
        "print(hasattr(gptq_webui, 'nothing'))"
    )
    root = str(Path(gptq_webui.__file__).parent)
    entry = f"import importlib.util as u; s = u.spec_from_file_location('d', {root!r} + '/script.py'); "
    entry += "m = u.module_from_spec(s); s.loader.exec_module(m); m.register(); "
    done = subprocess.run([sys.executable, "-c", entry + code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "True", "False"], done.stderr
