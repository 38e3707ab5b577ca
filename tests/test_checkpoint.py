"""gptq/checkpoint.py: every layout loads right, and what does not fit is an error, never a silent load."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.gptq_linear import GPTQLinear


def load(folder, dtype=torch.float32):
    return checkpoint.load(LocalModel.read(folder), dtype=dtype, device_map="cpu")


def difference(packed, twin) -> float:
    ids = torch.randint(0, 288, (1, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted, found = twin(ids).logits.double(), packed(ids).logits.double()
    assert wanted.std() > 1e-3  # or the comparison would say nothing
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_packed_logits_equal_those_of_the_dense_twin(kind, tmp_path):
    twin = tiny.write(tmp_path / "model", kind, sym=False)
    packed, _notes = load(tmp_path / "model")
    layers = [module for module in packed.modules() if isinstance(module, GPTQLinear)]
    assert layers and all(module.qweight.dtype == torch.int32 for module in layers)  # the weights stay packed
    assert difference(packed, twin) < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_every_width_and_format_loads(bits, form, tmp_path):
    twin = tiny.write(tmp_path / "model", bits=bits, form=form, sym=False)
    assert difference(load(tmp_path / "model")[0], twin) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"settings": "config"},  # quantization_config in config.json: the host says "requires optimum"
        {"weights": "gptq_model-4bit-32g"},  # the layout of 2023: the host finds no model.safetensors
        {"weights": "model"},  # quantize_config.json beside model.safetensors: the host loads random weights
        {"weights": "gptq_model-4bit-32g", "shards": 3},
        {"weights": "model", "shards": 2},
        {"g_idx": False, "act_order": False},  # the oldest files
        {"group_size": -1},
    ],
    ids=str,
)
def test_every_layout_of_a_folder_loads_right(options, tmp_path):
    twin = tiny.write(tmp_path / "model", **options)
    assert difference(load(tmp_path / "model")[0], twin) < 1e-5


def test_a_quantised_head_that_is_not_tied_loads(tmp_path):
    folder = tmp_path / "model"
    twin = tiny.write(folder)
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    tensors, dense = tiny.random_layer(64, 288, 4, 32)
    state |= {f"lm_head.{part}": tensor for part, tensor in tensors.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    twin.lm_head.weight.data = dense
    assert difference(load(folder)[0], twin) < 1e-5


def test_a_tied_head_is_the_embedding(tmp_path):
    folder = tmp_path / "model"
    tiny.ARCHITECTURES["tied"] = {**tiny.ARCHITECTURES["llama"], "tie_word_embeddings": True}
    original, tiny.dense_model = tiny.dense_model, lambda _kind, seed=0: _tied(seed)
    try:
        twin = tiny.write(folder, "tied")
    finally:
        tiny.dense_model = original
        del tiny.ARCHITECTURES["tied"]
    packed, _notes = load(folder)
    assert packed.lm_head.weight is packed.get_input_embeddings().weight
    assert difference(packed, twin) < 1e-5


def _tied(seed):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(**tiny.ARCHITECTURES["tied"]), dtype=torch.float32).eval()


def test_scales_keep_their_bits_when_the_model_computes_in_bf16(tmp_path):
    tiny.write(tmp_path / "model")
    packed, _notes = load(tmp_path / "model", torch.bfloat16)
    stored = load_file(tmp_path / "model" / "model.safetensors")["model.layers.0.mlp.up_proj.scales"]
    assert torch.equal(packed.model.layers[0].mlp.up_proj.scales.float(), stored.float())


def test_a_biasless_layer_keeps_the_bias_that_an_old_file_adds(tmp_path):
    folder = tmp_path / "model"
    twin = tiny.write(folder)
    state = load_file(folder / "model.safetensors")
    bias = torch.randn(96).half()
    state["model.layers.0.mlp.up_proj.bias"] = bias
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    twin.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(bias.float())
    assert difference(load(folder)[0], twin) < 1e-5


def test_old_rotary_buffers_in_the_file_do_no_harm(tmp_path):
    folder = tmp_path / "model"
    twin = tiny.write(folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert difference(load(folder)[0], twin) < 1e-5


def change(folder, alter):
    state = load_file(folder / "model.safetensors")
    alter(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def rename(old, new):
    return lambda state: state.__setitem__(new, state.pop(old))


_UP = "model.layers.1.mlp.up_proj"
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@pytest.mark.parametrize(
    ("alter", "says"),
    [
        (rename(f"{_UP}.qweight", f"{_UP}.qweights"), "has no qweight"),
        (rename(f"{_UP}.scales", f"{_UP}.scale"), "has no scales"),
        (rename("model.norm.weight", "model.norm.weigth"), "model.norm.weight"),
        (lambda state: state.pop("model.layers.0.input_layernorm.weight"), "lack 1 tensor"),
        (lambda state: state.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}), "no place for"),
        (lambda state: state.update({f"{_UP}.qzeros": state[f"{_UP}.qzeros"][:, :-1].contiguous()}), "do not fit each other"),
        (lambda state: [rename(f"{_UP}.{p}", f"{_UP[:13]}9{_UP[14:]}.{p}")(state) for p in _PARTS], "does not have"),
    ],
    ids=["renamed qweight", "renamed scales", "renamed norm", "missing", "one too many", "shapes", "no such layer"],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_an_error_in_words(alter, says, tmp_path):
    folder = tmp_path / "model"
    tiny.write(folder)
    change(folder, alter)
    with pytest.raises(BadCheckpoint, match=says) as caught:
        load(folder)
    assert "Traceback" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_model_of_another_size_is_an_error(tmp_path):
    folder = tmp_path / "model"
    tiny.write(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(BadCheckpoint, match=r"96×64 in the files and 128×64 in config\.json"):
        load(folder)


def test_an_expert_that_is_missing_is_an_error(tmp_path):
    folder = tmp_path / "model"
    tiny.write(folder, "mixtral")
    change(folder, lambda state: [state.pop(name) for name in list(state) if ".experts.2.w2." in name])
    with pytest.raises(BadCheckpoint, match="experts"):
        load(folder)


def test_zeros_that_their_writer_damaged_are_reported(tmp_path):
    folder = tmp_path / "model"
    tiny.write(folder, sym=False)

    def flood(state):
        state[f"{_UP}.qzeros"].fill_(-12)  # 0xfffffff4: what AutoGPTQ made of 5, 0, 7, 7 …

    change(folder, flood)
    _packed, notes = load(folder)
    assert any("damaged" in note for note in notes)


def test_settings_that_the_tensors_contradict_are_amended_and_reported(tmp_path):
    folder = tmp_path / "model"
    twin = tiny.write(folder)
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 8, "group_size": 128, "desc_act": False}))
    packed, notes = load(folder)
    assert difference(packed, twin) < 1e-5
    assert len(notes) == 3  # bits, group size, act-order


def test_a_missing_config_is_a_sentence(tmp_path):
    folder = tmp_path / "model"
    tiny.write(folder, weights="gptq_model", shards=2)
    (folder / "config.json").unlink()
    assert "config.json" in LocalModel.read(folder).problem


@pytest.mark.parametrize("weights", ["model", "gptq_model-4bit-32g"])
@pytest.mark.parametrize("listed", [None, {}, {"lm_head.weight": "model-00001-of-00009.safetensors"}])
def test_a_missing_or_stale_index_is_made_from_the_files(weights, listed, tmp_path):
    folder = tmp_path / "model"
    twin = tiny.write(folder, weights=weights, shards=3)
    index = folder / f"{weights}.safetensors.index.json"
    index.unlink()
    if listed is not None:
        index.write_text(json.dumps({"weight_map": listed}))
    packed, notes = load(folder)
    assert difference(packed, twin) < 1e-5
    assert any("files themselves were read" in note for note in notes)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "C:\\x.safetensors", 5])
def test_an_index_that_leaves_the_folder_is_refused(name, tmp_path):
    folder = tmp_path / "model"
    tiny.write(folder, shards=2)
    shutil.copy(folder / "model-00002-of-00002.safetensors", tmp_path / "outside.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint, match="not in the model's folder"):
        load(folder)


def test_code_in_a_model_folder_is_not_run(tmp_path):
    folder = tmp_path / "model"
    tiny.write(folder)
    config = json.loads((folder / "config.json").read_text())
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Config: pass\n")
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=r"code|does not know"):
        load(folder)
    assert not ran.exists()


def test_awq_is_never_read_as_gptq(tmp_path):
    folder = tmp_path / "model"
    tiny.write(folder)

    def to_awq(state):  # AWQ packs along the columns
        for name in [name for name in state if name.endswith(".qweight")]:
            rows, columns = state[name].shape[0] * 8, state[name].shape[1]
            state[name] = torch.zeros(rows, columns // 8, dtype=torch.int32)
            state.pop(name.replace("qweight", "g_idx"))

    change(folder, to_awq)
    model = LocalModel.read(folder)
    assert model.kind == "awq" and model.quantize.checkpoint_format == "awq"


def test_a_16_bit_folder_loads_too(tmp_path):
    twin = tiny.dense_model("llama")
    twin.half().save_pretrained(tmp_path / "model")
    packed, notes = load(tmp_path / "model")
    assert not notes and difference(packed, twin.float()) < 1e-5
    shutil.rmtree(tmp_path / "model")


@pytest.mark.parametrize("what", ["another head", "the embedding again", "none"])
def test_the_files_decide_whether_the_output_layer_is_the_embedding(what, tmp_path):
    """config.json says that it is. transformers 4 believes that, whatever the files hold."""
    twin = tiny.write(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    state = load_file(path)
    twin.lm_head.weight = torch.nn.Parameter(state["lm_head.weight"].float())
    if what != "another head":
        twin.lm_head.weight = torch.nn.Parameter(twin.model.embed_tokens.weight.detach().clone())
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    if what == "none":
        del state["lm_head.weight"]
    save_file(state, path, metadata={"format": "pt"})
    settings = tmp_path / "model" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tie_word_embeddings": True}))
    packed, notes = checkpoint.load(LocalModel.read(tmp_path / "model"), dtype=torch.float32, device_map="cpu")
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        found, wanted = packed(ids).logits, twin(ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert any("lm_head.weight), which is used" in note for note in notes) == (what == "another head")
