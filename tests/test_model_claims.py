"""config.json against itself and against the files: every contradiction is a sentence, before anything is built."""

import json
import shutil
import struct

import pytest

from gptq_webui.core.model_claims import problem_of
from gptq_webui.core.models import LocalModel

LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 288}


@pytest.mark.parametrize(("claims", "says"), [
    ({"num_attention_heads": 3, "num_key_value_heads": 2, "head_dim": 16}, "3 attention heads"),
    ({"num_attention_heads": 5, "num_key_value_heads": 1}, "hidden size of 64 for 5 heads"),
    ({"partial_rotary_factor": 64}, "partial_rotary_factor 64"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 2}}, "partial_rotary_factor 2"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4, "partial_rotary_factor": 64.0}}}, "partial_rotary_factor 64"),
    ({"partial_rotary_factor": 0.2}, "3 of them would be rotated"),
    ({"partial_rotary_factor": 0.01}, "none of them would be rotated"),
    ({"rotary_dim": 32}, "rotary_dim 32"),
    ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor -2"),
    ({"rope_theta": float("nan")}, "rope_theta nan"),
    ({"num_hidden_layers": 1000000}, "num_hidden_layers 1000000"),
    ({"num_hidden_layers": 3}, "says 3 layers, the files hold 2"),
    ({"max_position_embeddings": -2048}, "max_position_embeddings -2048"),
    ({"hidden_size": "64"}, "hidden_size '64'"),
    ({"vocab_size": True}, "vocab_size True"),
    ({"vocab_size": 289}, "vocab_size 289, the embedding in the files has 288 rows"),
    ({"head_dim": 0}, "head_dim 0"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps -1e-06"),
    ({"sliding_window": 0}, "sliding_window 0"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": {"a": 1}}}, "attention_factor {'a': 1}"),
    ({"rope_scaling": {"type": "linear", "factor": [2, 2]}}, "factor [2, 2]"),
    ({"num_labels": 10**9}, "num_labels 1000000000"),
    ({"num_labels": [3]}, "num_labels [3]"),
    ({"model_type": "gptj", "n_positions": 10**7}, "n_positions 10000000; a model of the type gptj"),
    ({"model_type": "gpt2", "n_positions": 1 << 20}, "at most"),
    ({"model_type": "mpt", "max_seq_len": 1 << 30}, "at most"),
    ({"moe_num_experts": 1 << 31}, "says 2147483648 experts"),
    ({"num_experts": 4, "num_experts_per_tok": 5}, "says 5 experts for each token"),
    ({"num_local_experts": 4, "num_experts_per_tok": 0}, "says 0 experts for each token"),
    ({"n_routed_experts": 4, "num_experts_per_tok": "2"}, "says '2' experts for each token"),
    ({"n_routed_experts": 4, "n_group": 1, "topk_group": 80}, "topk_group 80 of 1 groups"),
    ({"n_routed_experts": 4, "n_group": 3, "topk_group": 1}, "4 experts in 3 groups"),
    ({"n_routed_experts": 4, "n_group": 0, "topk_group": 0}, "0 groups of experts"),
    ({"n_routed_experts": 4, "n_group": -2}, "-2 groups of experts"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 10**30}}, "attention_factor 10000000"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1 << 31}}, "attention_factor 2147483648"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 1e9}}, "mscale 1000000000.0"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale_all_dim": "1"}}, "mscale_all_dim '1'"),
    ({"attention_multiplier": 0.0}, "attention_multiplier 0.0"), ({"attention_multiplier": -1}, "attention_multiplier -1"),
    ({"layer_types": [1, [2, -(10**20)]]}, "layer_types -10000000"),
    ({"text_config": {"anything": {"deep": 1 << 63}}}, "deep 9223372036854775808"),
    ({"moe_num_experts": 4, "moe_k": -1}, "from 1 to 4 was expected"),
    ({"text_config": {"num_hidden_layers": 10**6}}, "num_hidden_layers 1000000"),
])  # fmt: skip
def test_a_contradiction_is_a_sentence_in_the_list(claims, says, tiny_gptq, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_gptq, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **LLAMA, "head_dim": None, **claims}))
    model = LocalModel.read(folder)
    assert model.kind == "incomplete" and says in model.problem
    assert "config.json" in model.problem and model.problem.endswith("download the model again.")


@pytest.mark.parametrize("claims", [
    {}, {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}, {"n_routed_experts": 8, "n_group": 0, "topk_method": "greedy"},
    {"model_max_length": 10**30, "max_length": 1 << 64}, {"task_specific_params": {"any": {"seed": (1 << 64) - 1}}},
    {"num_local_experts": 0, "num_experts_per_tok": 0}, {"num_experts": 4}, {"num_experts": 4, "moe_k": [2, 2]},
    {"n_routed_experts": 4, "zero_expert_num": 2, "num_experts_per_tok": 6},
    {"head_dim": 48}, {"partial_rotary_factor": 0.5}, {"rope_scaling": None}, {"num_hidden_layers": 1},
    {"sliding_window": 0, "use_sliding_window": False}, {"num_key_value_heads": None}, {"n_inner": None},
    {"hidden_size": 7168, "num_attention_heads": 60, "num_key_value_heads": 60, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 4096}},
    {"num_key_value_heads": [1, 2]}, {"num_labels": 2}, {"model_type": "gptj", "n_positions": 2048},
    {"model_type": "mpt", "max_seq_len": 65536},
])  # fmt: skip
def test_what_real_models_say_is_no_contradiction(claims):
    assert problem_of({**LLAMA, **claims}, {}) == ""


def test_a_deeply_nested_header_spoils_its_own_folder_only(tiny_gptq, tmp_path):
    shutil.copytree(tiny_gptq, tmp_path / "good")
    shutil.copytree(tiny_gptq, tmp_path / "bad")
    nested = b"[" * 200_000 + b"]" * 200_000
    (tmp_path / "bad" / "model.safetensors").write_bytes(struct.pack("<Q", len(nested)) + nested)
    from gptq_webui.hub.library import Library

    found = {each.name: each for each in Library([tmp_path]).models()}
    assert found["good"].kind == "gptq" and found["bad"].kind == "incomplete" and "model.safetensors" in found["bad"].problem


def test_the_command_line_refuses_with_both_numbers(tiny_gptq, tmp_path, capsys):
    """3 heads with 2 key heads once ended in `double free or corruption`."""
    from gptq_webui.app.cli import main

    shutil.copytree(tiny_gptq, tmp_path / "heads3")
    path = tmp_path / "heads3" / "config.json"
    claims = {"num_attention_heads": 3, "num_key_value_heads": 2, "head_dim": 16}
    path.write_text(json.dumps({**json.loads(path.read_text()), **claims}))
    assert main(["ask", "Hi", "--model", "heads3", "--models-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "3 attention heads" in said and "2 key heads" in said and "Traceback" not in said


def test_the_name_of_an_architecture_is_printable_and_short(tiny_gptq, tmp_path):
    shutil.copytree(tiny_gptq, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "architectures": ["\x1b[2J" + "X" * 5000]}))
    found = LocalModel.read(tmp_path / "model").architecture
    assert found.isprintable() and len(found) == 80 and found.startswith("\\x1b[2JX")


def test_a_head_size_that_the_family_does_not_read_divides_nothing():
    config = {"model_type": "mpt", "d_model": 16, "n_heads": 6, "head_dim": 32}
    assert "16 for 6 heads" in problem_of(config, {})
    assert not problem_of(config | {"d_model": 18}, {})
    assert not problem_of(config | {"model_type": "mistral"}, {})


@pytest.mark.parametrize("window", [1 << 40, (1 << 63) - 1, 0, -4])
def test_a_window_that_no_library_can_count_is_a_sentence(window):
    assert "sliding_window" in problem_of({"model_type": "stablelm", "sliding_window": window}, {})
