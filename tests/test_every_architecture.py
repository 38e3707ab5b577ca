"""Every causal architecture of transformers, packed as programs of today write it, through our loader on the processor.

Logits of a prompt of 24 tokens and of 16 single tokens are those of the dequantised twin, 32 greedy tokens are those of its
`generate`. What cannot be computed is refused before a weight is read. A sample runs here, one of each kind of cache, of experts
and of layers that are shared or read; GPTQ_WEBUI_EVERY_ARCHITECTURE=1 runs all, in about ten minutes.
"""

import json
import os
import re

import hub_folder
import pytest
import torch
import transformers
from every_architecture import KINDS, tiny_model
from packaging import version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.core.models import LocalModel
from gptq_webui.core.old_names import renewed, successor_of
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.cpu import numba_compiler
from gptq_webui.gptq.experts import PackedExperts
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.gptq.joined_layers import JoinedLayers
from gptq_webui.gptq.module_names import splits_of
from gptq_webui.gptq.stepper_choice import stepper_for

# transformers' own forward does not look back only.
REFUSED = {"cpmant"}  # in words, by checkpoint.py
OWN_CACHE_ERRS = {"moshi"}  # transformers' forward with a cache is off by a fifth of that of the whole text, which is ours
SHARED = {"zamba", "zamba2"}  # less layers in the files than places
SAMPLE = (
    "falcon",  # a subclass of Linear that computes as Linear does
    "gpt_oss",  # experts with biases, gates and ups in turns, attention sinks, sliding windows
    "llama4_text",  # experts that are transposed and weighted before
    "nemotron_h",  # experts without a gate, states
    "longcat_flash",  # choices that are no experts
    "deepseek_v3",  # MLA
    "deepseek_v4",  # a linear layer of a class of its own, experts with a limit
    "mamba",  # layers whose weights are read
    "falcon_mamba",  # and buffers beside them that no file holds
    "zamba",  # shared blocks
    "bamba",  # positions that must be given
    "qwen3_next",
    "hrm_text",  # layers that are gone through several times
    "moshi",  # an embedding of one row more than config.json says
)
IDS = torch.randint(5, 260, (40,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPT, MADE = 24, 32
NEW = version.parse(transformers.__version__).major >= 5


def off(found, wanted):
    """The largest distance of a row, relative to its length."""
    found, wanted = found.double(), wanted.double()
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def loaded(folder):
    hf, notes = checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map="cpu")
    stepper, _note = stepper_for(hf, 128)
    return hf, stepper, notes


@torch.inference_mode()
def check(kind, tmp_path, split=None, left=lambda name: False, **changes):
    names = hub_folder.write(tmp_path, tiny_model(kind, **changes), split=split, left=left)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    wanted = twin(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    hf, stepper, notes = loaded(tmp_path / "packed")
    packed = [each for each in hf.modules() if isinstance(each, GPTQLinear)]
    files = (tmp_path / "packed").glob("*.safetensors")  # some layers are too small to be packed
    written = [name.removesuffix(".qweight") for file in files for name in load_file(file) if name.endswith(".qweight")]
    cut = sum(len(each.parts) - 1 for each in splits_of(hf) for name in written if re.search(f"(?:{each.pattern})$", name))
    assert packed and (
        len(packed) - cut in (len(names), len(written)) or kind in SHARED or any("computed in 32 bits" in each for each in notes)
    )
    memory = stepper.begin()
    assert off(stepper.prefill(memory, IDS[:PROMPT]), wanted[PROMPT - 1 : PROMPT]) < 1e-3
    for at in range(PROMPT, len(IDS)):
        assert off(stepper.step(memory, IDS[at]), wanted[at : at + 1]) < 1e-3, f"token {at}"
    made = twin.generate(
        torch.tensor([IDS[:PROMPT]]), max_new_tokens=MADE, min_new_tokens=MADE, do_sample=False, eos_token_id=None,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    made_logits = made.logits
    if kind in OWN_CACHE_ERRS:
        made_logits = twin(made.sequences, use_cache=False).logits[0, PROMPT - 1 : -1].split(1)
    memory = stepper.begin()
    logits = stepper.prefill(memory, IDS[:PROMPT])[0]
    for id, theirs in zip(made.sequences[0, PROMPT:].tolist(), made_logits, strict=True):
        ours = int(logits.argmax())
        best = int(theirs.argmax()) if kind in OWN_CACHE_ERRS else id
        assert ours == best or float(theirs[0, best] - theirs[0, ours]) < 2e-3 * float(theirs.std()), "no tie of two tokens"
        logits = stepper.step(memory, id)[0]
    kernel = stepper.kernel
    stepper.close()
    return hf, notes, kernel


@pytest.mark.skipif(not NEW, reason="the table is of transformers 5")
@pytest.mark.parametrize("kind", KINDS if os.environ.get("GPTQ_WEBUI_EVERY_ARCHITECTURE") else SAMPLE)
def test_every_architecture_is_computed_as_its_dequantised_twin(kind, tmp_path):
    if kind in REFUSED:
        pytest.skip("it is refused; see below")
    try:
        tiny_model(kind)(input_ids=torch.tensor([IDS]), use_cache=False)
    except Exception as reason:
        assert kind not in SAMPLE
        pytest.skip(f"no tiny model could be made: {type(reason).__name__}: {str(reason)[:100]}")
    check(kind, tmp_path)


@pytest.mark.skipif(not NEW, reason="transformers 4 cannot make the folder")
@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_cannot_be_computed_is_refused_before_loading(kind, tmp_path):
    hub_folder.write(tmp_path, tiny_model(kind))
    with pytest.raises(BadCheckpoint, match="Choose another model"):
        checkpoint.load(LocalModel.read(tmp_path / "packed"), dtype=torch.float32, device_map="cpu")


@pytest.mark.skipif(not NEW, reason="transformers 4 cannot make the folder")
def test_experts_keep_the_activation_of_their_architecture(tmp_path):
    hub_folder.write(tmp_path, tiny_model("gpt_oss"))
    hf, _notes = checkpoint.load(LocalModel.read(tmp_path / "packed"), dtype=torch.float32, device_map="cpu")
    found = [each for each in hf.modules() if isinstance(each, PackedExperts)]
    assert len(found) == 4 and not any(each.plain for each in found)
    assert all(layer.bias is not None for each in found for layer in each.modules() if isinstance(layer, GPTQLinear))


@pytest.mark.skipif(not NEW, reason="transformers 4 cannot make the folder")
def test_layers_whose_weights_are_read_become_dense_and_a_note_says_so(tmp_path):
    hf, notes, _kernel = check("deepseek_v32", tmp_path)
    assert not isinstance(hf.model.layers[0].self_attn.indexer.weights_proj, GPTQLinear)
    assert any("computed in 32 bits" in note and "weights_proj" in note for note in notes)


@pytest.mark.skipif(not NEW, reason="transformers 4 cannot make the folder")
@pytest.mark.parametrize(("kind", "split"), [
    ("phi3", {"gate_up_proj": (("gate_proj", "up_proj"), (96, 96))}),
    ("phi3", {"gate_up_proj": (("gate_proj", "up_proj"), (96, 96)), "qkv_proj": (("q_proj", "k_proj", "v_proj"), (64, 32, 32))}),
    ("glm4", {"gate_up_proj": (("gate_proj", "up_proj"), (96, 96))}),
])  # fmt: skip
def test_layers_that_the_writer_cut_are_computed_together(kind, split, tmp_path):
    hf, _notes, kernel = check(kind, tmp_path, split=split)
    assert kernel == "cpu", "and in one step"
    assert sum(isinstance(each, JoinedLayers) for each in hf.modules()) == 4 * len(split)


@pytest.mark.skipif(not NEW, reason="transformers 4 cannot make the folder")
@pytest.mark.parametrize(("kind", "left"), [
    ("mixtral", r"\.w3$"), ("mixtral", r"experts\.1\."), ("qwen3_moe", r"up_proj$"), ("gpt_oss", r"up_proj$"),
    ("llama4_text", r"\.down_proj$"),
    ("deepseek_v3", r"layers\.1\..*gate_proj$"), ("qwen3_moe", r"layers\.0\."), ("gpt_oss", r"layers\.0\."),
])  # fmt: skip
def test_experts_that_the_writer_left_in_16_bits_stand_beside_packed_ones(kind, left, tmp_path):
    hf, _notes, _kernel = check(kind, tmp_path, left=lambda name: re.search(left, name))
    assert any(isinstance(each, PackedExperts) for each in hf.modules())


@pytest.mark.skipif(not NEW, reason="transformers 4 cannot make the folder")
@pytest.mark.parametrize("left", ["up_proj", "layers.0."])
@pytest.mark.parametrize("kind", ["phi3", "glm4"])
def test_parts_of_a_cut_layer_may_be_left_in_16_bits(kind, left, tmp_path):
    split = {"gate_up_proj": (("gate_proj", "up_proj"), (96, 96))}
    hf, _notes, kernel = check(kind, tmp_path, split=split, left=lambda name: left in name)
    assert kernel == "cpu"
    assert sum(isinstance(each, JoinedLayers) for each in hf.modules()) == 4


@pytest.mark.skipif(not NEW, reason="transformers 4 cannot make the folder")
def test_layers_under_an_older_name_may_have_no_order(tmp_path):
    """auto-round writes no g_idx, and Mixtral's experts below block_sparse_moe, which transformers 5 calls mlp."""
    names = hub_folder.write(tmp_path, tiny_model("mixtral"), act_order=False)
    assert any("block_sparse_moe" in each for each in names)
    path = tmp_path / "packed" / "model.safetensors"
    save_file({name: each for name, each in load_file(path).items() if not name.endswith("g_idx")}, path, {"format": "pt"})
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    hf, _stepper, _notes = loaded(tmp_path / "packed")
    with torch.inference_mode():
        assert off(hf(torch.tensor([IDS])).logits[0], twin(torch.tensor([IDS])).logits[0]) < 1e-3


@pytest.mark.skipif(not NEW, reason="transformers 4 cannot make the folder")
def test_an_expert_that_is_not_in_the_files_is_refused(tmp_path):
    """As gptqmodel 7.6 writes experts that it does not pack: it takes those that share memory for one."""
    hub_folder.write(tmp_path, tiny_model("gpt_oss"), left=lambda name: "up_proj" in name)
    path = tmp_path / "packed" / "model.safetensors"
    state = {name: each for name, each in load_file(path).items() if not re.search(r"experts\.[1-9].*up_proj", name)}
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match="Expert 1 of"):
        loaded(tmp_path / "packed")


@pytest.mark.skipif(not NEW, reason="transformers 4 cannot make the folder")
def test_more_experts_than_config_json_says_are_refused(tmp_path):
    hub_folder.write(tmp_path, tiny_model("mixtral"))
    path = tmp_path / "packed" / "config.json"
    path.write_text(path.read_text().replace('"num_local_experts": 4', '"num_local_experts": 3'))
    assert "says 3 experts, the files hold 4" in LocalModel.read(tmp_path / "packed").problem


@pytest.mark.skipif(not NEW, reason="transformers 4 cannot make the folder")
def test_a_cut_layer_with_other_widths_is_refused(tmp_path):
    hub_folder.write(tmp_path, tiny_model("phi3"), split={"gate_up_proj": (("gate_proj", "up_proj"), (96, 96))})
    path = tmp_path / "packed" / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 96', '"intermediate_size": 80'))
    with pytest.raises(BadCheckpoint, match=r"192 outputs together|config\.json"):
        loaded(tmp_path / "packed")


@pytest.mark.skipif(not NEW, reason="transformers 4 cannot make the folder")
@pytest.mark.parametrize("kind", ["mixtral", "glm4_moe"])
def test_a_packed_router_is_computed(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_folder, "_LEFT", re.compile("^$"))
    monkeypatch.setattr(hub_folder, "_PARTS", re.compile(r"\.gate\.weight$"))
    _hf, notes, _kernel = check(kind, tmp_path)
    assert any(".gate first" in note for note in notes)


@pytest.mark.skipif(not NEW, reason="transformers 4 cannot make the folder")
@pytest.mark.parametrize("prefix", ["model.layers.4", "mtp.layers.0"])
def test_layers_that_guess_further_tokens_are_left_out(prefix, tmp_path):
    model = tiny_model("glm4_moe", num_nextn_predict_layers=1)
    hub_folder.write(tmp_path, model)
    path = tmp_path / "packed" / "model.safetensors"
    state = load_file(path)
    more = {name: tensor.clone() for name, tensor in state.items() if name.startswith("model.layers.3.")}
    state |= {name.replace("model.layers.3", prefix): tensor for name, tensor in more.items()}
    save_file(state, path, metadata={"format": "pt"})
    hf, stepper, notes = loaded(tmp_path / "packed")
    assert len(hf.model.layers) == 4 and any("guess further tokens" in note for note in notes)
    stepper.close()


def test_a_subclass_that_computes_as_linear_does_stays_packed(tmp_path):
    tiny.write(tmp_path / "model", "falcon")
    hf, stepper, notes = loaded(tmp_path / "model")
    assert not notes and sum(isinstance(each, GPTQLinear) for each in hf.modules()) == 8
    if numba_compiler.available():
        assert stepper.kernel == "cpu"
    stepper.close()


def of_2023(folder, kind, model_type, names, tensors=None):
    """A packed folder as it was written when its architecture was program code in the folder, which must not run."""
    twin = tiny.write(folder, kind)
    config = json.loads((folder / "config.json").read_text())
    config = {old: config[now] for old, now in names.items() if now in config} | {
        name: value for name, value in config.items() if name not in names.values()
    }
    (folder / "code.py").write_text("raise SystemExit('it ran')")
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    for now, old in (tensors or {}).items():
        state = {name.replace(now, old): tensor for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return twin


@pytest.mark.parametrize(("kind", "model_type", "names", "tensors"), [
    ("falcon", "RefinedWebModel", {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}, {}),
    ("llama", "Yi", {}, {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}),
])  # fmt: skip
def test_settings_of_2023_are_read_without_their_code(kind, model_type, names, tensors, tmp_path):
    twin = of_2023(tmp_path / "model", kind, model_type, names, tensors)
    _hf, stepper, _notes = loaded(tmp_path / "model")
    with torch.inference_mode():
        assert off(stepper.prefill(stepper.begin(), IDS), twin(torch.tensor([IDS])).logits[:, -1]) < 1e-3
    stepper.close()


def test_names_of_2023_become_those_of_now():
    old = {"model_type": "stablelm_epoch", "rope_pct": 0.25, "norm_eps": 1e-5, "auto_map": {}, "hidden_size": 64}
    found = successor_of(old)
    assert found is not None and found.model_type == "stablelm" and successor_of({"model_type": ["Yi"]}) is None
    assert renewed(old, found) == {"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5, "hidden_size": 64}
    forty = successor_of({"model_type": "RefinedWeb"})
    assert forty is not None and renewed({"n_head_kv": 8}, forty) == {"new_decoder_architecture": True, "num_kv_heads": 8}
