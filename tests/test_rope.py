"""gptq/rope.py: the three knobs against the arithmetic they stand for, on real model classes."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from gptq_webui.core.errors import BadParameter
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint, rope
from gptq_webui.gptq.rope import Rope


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rope") / "model"
    tiny.write(folder)
    return folder


def load(folder, **knobs):
    return checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map={"": "cpu"}, rope=Rope(**knobs))


def logits(model, scale=1):
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        return model(ids, position_ids=torch.arange(30)[None] * scale).logits


def test_compressed_positions_are_divided(folder):
    plain, _ = load(folder)
    compressed, notes = load(folder, compress_pos_emb=4)
    assert torch.allclose(logits(compressed, 4), logits(plain), atol=1e-5)
    assert not torch.allclose(logits(compressed), logits(plain), atol=1e-5) and "divided by 4" in notes[0]


def test_alpha_raises_the_base_by_the_ntk_rule_and_a_base_takes_precedence(folder):
    by_alpha, notes = load(folder, alpha_value=2)
    wanted = 10000 * 2 ** (16 / 14)  # heads of 16 numbers
    assert f"{wanted:g}" in notes[0]
    by_base, _ = load(folder, alpha_value=3, rope_freq_base=wanted)
    assert torch.equal(logits(by_base), logits(by_alpha))
    assert torch.allclose(by_alpha.model.rotary_emb.inv_freq, wanted ** -(torch.arange(0, 16, 2) / 16))


def test_nothing_asked_changes_nothing(folder):
    plain, notes = load(folder)
    assert notes == () and torch.equal(logits(plain), logits(load(folder, alpha_value=1.0)[0]))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "falcon", "phi", "mixtral"])
def test_every_family_with_rotary_positions_obeys(kind):
    config = AutoConfig.for_model(kind, **{**tiny.ARCHITECTURES[kind], "num_attention_heads": 2})
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).eval()
    rope.apply(config, Rope(compress_pos_emb=2, rope_freq_base=50000))
    turned = AutoModelForCausalLM.from_config(config).eval()
    turned.load_state_dict(plain.state_dict())
    assert not torch.allclose(logits(turned), logits(plain), atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_model_without_rotary_positions_says_so(kind):
    with pytest.raises(BadParameter, match="no rotary positions"):
        rope.apply(AutoConfig.for_model(kind), Rope(alpha_value=2))


def test_positions_scaled_by_the_model_itself_are_not_divided_again_but_the_base_may_change():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
    config = AutoConfig.for_model("llama", **tiny.ARCHITECTURES["llama"], rope_scaling=scaling)
    with pytest.raises(BadParameter, match="llama3"):
        rope.apply(config, Rope(compress_pos_emb=2))
    assert "base 40000" in rope.apply(config, Rope(rope_freq_base=40000))[0]


@pytest.mark.parametrize("knobs", [{"compress_pos_emb": 0.5}, {"alpha_value": 1000}, {"rope_freq_base": 3}, {"alpha_value": "2"}])
def test_a_wrong_value_is_a_sentence(knobs):
    with pytest.raises(BadParameter, match=next(iter(knobs))):
        Rope(**knobs)
