"""gptq/cut_layers.py: layers that a file holds as one, and transformers as several."""

import json

import every_architecture
import hub_folder
import pytest
import torch
from every_architecture import KINDS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.config_reading import read_config
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.gptq.module_names import splits_of
from gptq_webui.gptq.stepper_choice import stepper_for

IDS = [5, 9, 200, 7, 33, 8, 100, 6, 42, 77, 12, 250]
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def write(folder, kind="llama", joined=JOINED, **settings):
    """A packed folder whose layers are joined in its file; returns its twin."""
    twin = tiny.write(folder, kind, shared_order=True, **settings)
    path = folder / "model.safetensors"
    state = load_file(path)
    for new, parts in joined.items():
        for owner in sorted({name.rsplit(".", 2)[0] for name in state if f".{parts[0]}." in name}):
            for each in ("qweight", "qzeros", "scales", "bias"):
                if all(f"{owner}.{part}.{each}" in state for part in parts):
                    state[f"{owner}.{new}.{each}"] = torch.cat([state.pop(f"{owner}.{part}.{each}") for part in parts], -1)
            orders = [state.pop(f"{owner}.{part}.g_idx") for part in parts if f"{owner}.{part}.g_idx" in state]
            state |= {f"{owner}.{new}.g_idx": each for each in orders[:1]}
    save_file(state, path, metadata={"format": "pt"})
    return twin


@pytest.mark.parametrize(("kind", "settings"), [
    ("llama", {}), ("llama", {"bits": 2}), ("llama", {"bits": 3}), ("llama", {"bits": 8}), ("llama", {"sym": False}),
    ("llama", {"form": "gptq_v2", "sym": False}), ("llama", {"act_order": False, "g_idx": False}), ("llama", {"group_size": -1}),
    ("qwen2", {}), ("qwen3", {}),
], ids=str)  # fmt: skip
def test_they_are_cut_and_computed_as_the_dequantised_twin(kind, settings, tmp_path):
    twin = write(tmp_path / "model", kind, **settings)
    hf, _notes = checkpoint.load(LocalModel.read(tmp_path / "model"), dtype=torch.float32, device_map="cpu")
    layer = hf.model.layers[0]
    parts = [layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj]
    assert all(isinstance(each, GPTQLinear) for each in parts) and not hasattr(layer.mlp, "gate_up_proj")
    stepper, _note = stepper_for(hf, 64)
    with torch.inference_mode():
        found, wanted = stepper.prefill(stepper.begin(), IDS), twin(torch.tensor([IDS])).logits[:, -1]
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3
    stepper.close()


def test_one_of_another_width_is_refused(tmp_path):
    write(tmp_path / "model", joined={"qkv_proj": ("q_proj", "k_proj")})
    with pytest.raises(BadCheckpoint, match=r"qkv_proj is 64×\d+ in the files and 64×\d+ in config.json"):
        checkpoint.load(LocalModel.read(tmp_path / "model"), dtype=torch.float32, device_map="cpu")


SPLIT = [kind for kind in ("sarvam_moe", "hrm_text", "lara_mini") if kind in KINDS]  # in newer versions of transformers


@pytest.mark.parametrize("kind", SPLIT)
def test_what_transformers_cuts_in_16_bit_files_is_cut_when_it_is_packed(kind, tmp_path):
    """Their makers join query, key and value under names of their own."""
    model = every_architecture.tiny_model(kind)
    hub_folder.write(tmp_path, model, group_size=16, act_order=True)
    whole = {each.joined[0] for each in splits_of(model)}
    state = load_file(tmp_path / "packed" / "model.safetensors")
    names = {name.rsplit(".", 2)[-2] for name in state if name.endswith(".qweight")}
    assert whole & names
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    hf, _notes = checkpoint.load(LocalModel.read(tmp_path / "packed"), dtype=torch.float32, device_map="cpu")
    packed = {name.rpartition(".")[2] for name, each in hf.named_modules() if isinstance(each, GPTQLinear)}
    assert packed.isdisjoint(whole - {"gate_up_proj"}) and packed >= set().union(*(each.joined[1] for each in splits_of(model)))
    with torch.inference_mode():
        found, wanted = (each(torch.tensor([IDS]), use_cache=False).logits for each in (hf, twin))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


@pytest.mark.parametrize("kind", [kind for kind in SPLIT if kind == "sarvam_moe"])
def test_one_that_lacks_a_part_is_refused(kind, tmp_path):
    """auto-round 0.16.1 writes query, key and value of Sarvam under one name; the last one is left."""
    hub_folder.write(tmp_path, every_architecture.tiny_model(kind), group_size=16, act_order=False)
    path = tmp_path / "packed" / "model.safetensors"
    state = load_file(path)
    for name in [each for each in state if ".query_key_value." in each and not each.endswith("g_idx")]:
        state[name] = state[name][:, : 4 if name.endswith("qzeros") else 32].contiguous()
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"query_key_value is 64×32 in the files and 64×\d+ in config.json"):
        checkpoint.load(LocalModel.read(tmp_path / "packed"), dtype=torch.float32, device_map="cpu")


def test_longrope_by_its_first_name_is_read(tmp_path):
    """Phi-3 said "su" in its first weeks."""
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "vocab_size": 288, "hidden_size": 64,
              "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "num_hidden_layers": 2,
              "pad_token_id": 1, "max_position_embeddings": 512, "original_max_position_embeddings": 256, "rope_theta": 1e4,
              "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_config(LocalModel.read(tmp_path))
    rope = getattr(found, "rope_parameters", None) or found.rope_scaling
    assert rope.get("rope_type", rope.get("type")) == "longrope" and rope["long_factor"] == [2.0] * 8
    assert found.original_max_position_embeddings == 256
