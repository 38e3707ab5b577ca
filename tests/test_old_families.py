"""core/old_families.py: folders of 2023 whose architecture came as program code, in the names and settings of that code.

Each is compared with its own arithmetic, written in plain torch from what the authors published (folders_of_2023.py). Nothing of
a folder's code runs. The last decoder layer is left in 16 bits.
"""

import json
from pathlib import Path

import pytest
import torch
from checked_steps import IDS, off, require_logits
from folders_of_2023 import CASES, DIM, HEADS, HIDDEN, KEYS, LAYERS, WORDS, published_slopes, write
from safetensors.torch import load_file, save_file
from test_file_selection import GPTQ, listing

import tiny
from gptq_webui.app.cli import main
from gptq_webui.core.errors import BadCheckpoint, BadParameter, LoadRefused
from gptq_webui.core.models import LocalModel
from gptq_webui.core.old_families import FAMILIES
from gptq_webui.core.old_names import for_new_files, in_todays_words
from gptq_webui.engine.model_export import DENSE, export
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.config_reading import read_config
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.gptq.rope import Rope
from gptq_webui.gptq.sloped_llama import slopes_on
from gptq_webui.hub.file_selection import select_files
from gptq_webui.loaders.machine import memory_fit
from gptq_webui.loaders.text.built_in_templates import CHATML


def check(folder, wanted):
    """Logits of a prompt and of single steps; returns the transformers model."""
    hf, _notes = checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map="cpu")
    require_logits(hf, wanted)
    return hf


@pytest.mark.parametrize("case", CASES)
def test_packed_and_16_bit_layers_are_computed_as_the_authors_code_does(case, tmp_path):
    weights = write(tmp_path / "model", case)
    hf = check(tmp_path / "model", CASES[case][3](weights))
    layers = [each for name, each in hf.named_modules() if isinstance(each, GPTQLinear) and ".0." in name]
    assert len(layers) >= 6 and not any("W_pack" in name or "qkv" in name for name, _each in hf.named_modules())


@pytest.mark.parametrize("case", CASES)
def test_a_folder_in_16_bits_is_read_as_well(case, tmp_path):
    weights = write(tmp_path / "model", case, packed=False)
    hf = check(tmp_path / "model", CASES[case][3](weights))
    assert getattr(hf.config, "quantization_config", None) is None, "it is an ordinary model now"


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 3}, {"act_order": False}, {"left": "W_pack|wqkv"}], ids=str)
@pytest.mark.parametrize("case", ["baichuan", "internlm2"])
def test_fused_layers_are_cut_in_every_width(case, settings, tmp_path):
    weights = write(tmp_path / "model", case, **{"left": "nothing", **settings})
    check(tmp_path / "model", CASES[case][3](weights))


@pytest.mark.parametrize("case", CASES)
def test_the_list_and_the_fit_read_the_settings(case, tmp_path):
    write(tmp_path / "model", case)
    model = LocalModel.read(tmp_path / "model")
    assert (model.kind, model.badge, model.context_tokens) == ("gptq", "GPTQ 4-bit, group 32, act-order", 256), model.problem
    keys = KEYS if case in ("aquila", "xverse", "skywork", "internlm2", "orion", "deci") or "minicpm" in case else HEADS
    assert memory_fit.conversation_bytes_per_token(model.folder) == LAYERS * 2 * keys * DIM * 2


@pytest.mark.parametrize(("case", "changes", "why"), [
    ("skywork", {"rope_scaling": {"type": "ntk", "factor": 4.0}}, "of the kind 'ntk'"),
    ("xverse", {"num_experts": 64}, "experts"),
    ("minicpm", {"num_experts": 8}, "experts"),
    ("minicpm", {"sparse_config": {"block_size": 64}}, "leaves parts of a long text out"),
    ("minicpm", {"scale_emb": "12"}, "not all positive numbers"),
    ("orion", {"attention_bias": True}, "biases"),
    ("internlm", {"rotary": {"base": 10000, "type": "other"}}, "rotary in config.json"),
    ("deci", {"num_key_value_heads_per_layer": [2, 3]}, "divide the largest"),
])  # fmt: skip
def test_a_variant_that_computes_something_else_is_refused_with_its_cause(case, changes, why, tmp_path):
    write(tmp_path / "model", case, **changes)
    with pytest.raises(BadCheckpoint, match=f"came as program code.*{why}.*Choose another model"):
        checkpoint.load(LocalModel.read(tmp_path / "model"), dtype=torch.float32, device_map="cpu")


def test_an_architecture_that_nobody_has_is_not_cured_by_an_update(tmp_path):
    write(tmp_path / "model", "aquila", model_type="telechat")
    with pytest.raises(BadCheckpoint, match="brings its own program code") as caught:
        read_config(LocalModel.read(tmp_path / "model"))
    assert "Update" not in str(caught.value)


def test_a_packed_output_layer_whose_rows_are_divided_is_refused(tmp_path):
    write(tmp_path / "model", "baichuan2")
    path = tmp_path / "model" / "model.safetensors"
    tensors, _dense = tiny.random_layer(HIDDEN, WORDS, 4, 32)
    state = load_file(path)
    del state["lm_head.weight"]
    save_file(state | {f"lm_head.{part}": each for part, each in tensors.items()}, path, metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match="output layer is packed"):
        checkpoint.load(LocalModel.read(tmp_path / "model"), dtype=torch.float32, device_map="cpu")


def test_a_fused_layer_of_another_width_is_refused(tmp_path):
    write(tmp_path / "model", "internlm2", num_key_value_heads=4)
    with pytest.raises(BadCheckpoint, match=r"wqkv is 64×128 in the files and 64×192 in config.json"):
        checkpoint.load(LocalModel.read(tmp_path / "model"), dtype=torch.float32, device_map="cpu")
    write(tmp_path / "plain", "internlm2", packed=False, num_key_value_heads=4)
    with pytest.raises(BadCheckpoint, match=r"qkv_proj is 64×128 in the files and 64×192 in config.json"):
        checkpoint.load(LocalModel.read(tmp_path / "plain"), dtype=torch.float32, device_map="cpu")


@pytest.mark.parametrize("heads", [4, 32, 40, 6])
def test_slopes_are_those_of_the_paper(heads):
    assert torch.allclose(slopes_on(heads, torch.device("cpu")), torch.tensor(published_slopes(heads)), rtol=1e-6)


def test_slopes_of_the_scores_have_no_rotary_positions_and_no_name_to_write(tmp_path):
    write(tmp_path / "model", "baichuan-13b")
    with pytest.raises(BadParameter, match="no rotary positions"):
        rope = Rope(compress_pos_emb=2.0)
        checkpoint.load(LocalModel.read(tmp_path / "model"), dtype=torch.float32, device_map="cpu", rope=rope)
    with pytest.raises(LoadRefused, match=r"cannot be exported.*under no name"):
        export(LocalModel.read(tmp_path / "model"), DENSE, tmp_path / "made", None, print)


@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("13b")])
def test_files_that_are_written_anew_say_the_name_of_today(case, tmp_path):
    write(tmp_path / "model", case)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    now = for_new_files(config)
    assert now["model_type"] not in FAMILIES and now["architectures"][0].endswith("ForCausalLM") and "auto_map" not in now
    assert in_todays_words(config)["model_type"] == config["model_type"]


def run(capsys, command, folder, *arguments):
    code = main([str(each) for each in (command, folder, *arguments, "--models-dir", folder.parent)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return Path(captured.out.strip())


def logits(folder):
    hf, _notes = checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map="cpu")
    with torch.inference_mode():
        return hf(torch.tensor([IDS])).logits[0], hf


@pytest.mark.parametrize("case", ["internlm2", "baichuan2", "phi"])
def test_a_16_bit_folder_is_quantised_into_one_of_today(case, tmp_path, capsys):
    weights = write(tmp_path / "model", case, packed=False)
    tiny.write_tokenizer(tmp_path / "model", CHATML)
    made = run(capsys, "quantize", tmp_path / "model", "--seq-len", "16", "--samples", "20", "--branches",
               "gptq-8bit-32g-actorder_True")  # fmt: skip
    found, hf = logits(made)
    assert off(found, CASES[case][3](weights)) < 0.05 and not list(made.glob("*.py"))
    config = json.loads((made / "config.json").read_text())
    assert config["model_type"] == hf.config.model_type and config["architectures"] == [type(hf).__name__]


@pytest.mark.parametrize("case", ["baichuan2", "minicpm", "mixformer", "deci"])
@pytest.mark.parametrize("form", ["16bit", "gptq"])
def test_a_packed_folder_is_exported_in_todays_names(case, form, tmp_path, capsys):
    write(tmp_path / "model", case)
    tiny.write_tokenizer(tmp_path / "model")
    wanted, _hf = logits(tmp_path / "model")
    made = run(capsys, "export", tmp_path / "model", "--as", form)
    assert off(logits(made)[0], wanted) < 2e-3
    assert json.loads((made / "config.json").read_text())["model_type"] not in FAMILIES


def test_a_download_says_that_the_code_is_not_needed():
    assert "it is not needed" in _noted({"model_type": "internlm2"})
    assert "with all your rights" in _noted({"model_type": "telechat"}) and "all your rights" in _noted({"model_type": "deci"})


def _noted(config):
    names = ("model.safetensors", "config.json", "quantize_config.json", "modeling_x.py")
    settings = {"quantize_config.json": GPTQ, "config.json": config | {"auto_map": {"AutoModel": "modeling_x.X"}}}
    return select_files(listing(*names), settings).notes[0]
