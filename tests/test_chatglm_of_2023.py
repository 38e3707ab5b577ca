"""ChatGLM 2 and 3 and GLM-4 of 2024 (model_type "chatglm") open without their program code, as transformers' GLM."""

import chatglm_of_2023
import pytest
import torch
from checked_steps import IDS, require_logits

from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.loaders.machine import memory_fit


def loaded(folder):
    return checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map="cpu")


@pytest.mark.parametrize(("bits", "act_order", "rope_ratio"), [(4, False, 1), (4, True, 500), (8, True, 1)])
def test_its_logits_are_those_of_its_arithmetic(bits, act_order, rope_ratio, tmp_path):
    tensors = chatglm_of_2023.write(tmp_path / "model", bits=bits, act_order=act_order, rope_ratio=rope_ratio)
    wanted = chatglm_of_2023.logits(tensors, IDS, rope_ratio)
    hf, notes = loaded(tmp_path / "model")
    assert not notes and sum(isinstance(each, GPTQLinear) for each in hf.modules()) == 6 * chatglm_of_2023.LAYERS
    require_logits(hf, wanted)


def test_its_numbers_are_known_before_it_is_loaded(tmp_path):
    chatglm_of_2023.write(tmp_path / "model")
    model = LocalModel.read(tmp_path / "model")
    assert (model.kind, model.context_tokens, model.architecture) == ("gptq", 256, "ChatGLMModel")
    assert memory_fit.conversation_bytes_per_token(tmp_path / "model") == 2 * 2 * 2 * 2 * 16


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"rmsnorm": False}, "rmsnorm, False"),
        ({"vision_config": {"hidden_size": 8}}, "vision_config"),
        ({"rope_ratio": 16, "_name_or_path": "THUDM/chatglm2-6b-32k"}, "ChatGLM 2 for long texts"),
    ],
)
def test_another_forward_under_the_same_name_is_refused_in_words(settings, why, tmp_path):
    chatglm_of_2023.write(tmp_path / "model", **settings)
    with pytest.raises(BadCheckpoint, match=why) as refused:
        loaded(tmp_path / "model")
    assert "Update" not in str(refused.value) and "code is not run" in str(refused.value)
