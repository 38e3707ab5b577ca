"""gptq/cuda: attention to latent vectors that heeds more than ours does is left to transformers; without a GPU."""

import copy
import importlib
from contextlib import nullcontext

import pytest
import torch
from every_architecture import KINDS, tiny_model
from torch import nn
from transformers import AutoConfig

from gptq_webui.gptq.cuda import latent_attention

LATENT = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "q_lora_rank": 16,
}  # fmt: skip
CHOOSING = ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "mistral_large4_text", "dots3_note_text", "glm5_next_text")


@pytest.mark.parametrize("kind", CHOOSING)
def test_attention_that_chooses_among_its_tokens_is_left(kind):
    if kind not in KINDS:
        pytest.skip("this transformers has no such architecture")
    try:
        model = tiny_model(kind)
    except (ImportError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        pytest.skip(f"it cannot be made: {error}")
    assert not [each for each in model.modules() if latent_attention.is_latent(each)]


def latent_module():
    own = importlib.import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")
    return own.DeepseekV3Attention(AutoConfig.for_model("deepseek_v3", hidden_size=64, num_hidden_layers=1, **LATENT), 0)


def taken(module, **given):
    """(what a trial of a call would be given), or None where the call is not ours."""

    class Attention:
        asked = None

        def of(self, module, x, cache, angles, plain):
            self.asked = (plain(),)
            return None

        def computed(self, _module, _here):
            pass

    attention = Attention()

    latent_attention._taken(module, module.forward, attention, nullcontext)(torch.randn(1, 1, 64).half(), **given)
    return attention.asked


def test_latent_attention_computes_all_that_it_is_called_with():
    module = latent_module()
    assert latent_attention.is_latent(module)

    windowed = copy.copy(module)
    windowed.sliding_window = 8
    assert not latent_attention.is_latent(windowed)

    class Scaled(nn.Module):
        def forward(self, hidden_states, position_ids=None, prev_topk_indices=None, output_attentions=None, **given):
            return hidden_states * (1 + position_ids // 1000), None

    class Plain(nn.Module):
        def forward(self, hidden_states, **given):
            return hidden_states, None

    at = torch.tensor([[5]])
    assert taken(Scaled(), position_ids=at) == (None,)  # at this place it is no other than one that does not scale
    assert taken(Plain(), position_ids=at)[0][1] is None
    assert taken(Plain(), position_ids=at, prev_topk_indices=at)[0] is not None  # it does not know what that is
    assert taken(Scaled(), position_ids=at, output_attentions=False) is not None
    for more in ({"prev_topk_indices": at}, {"output_attentions": True}):
        assert taken(Scaled(), position_ids=at, **more) is None


def test_latent_attention_that_gives_more_than_its_output_is_left():
    attention = latent_attention.LatentAttention(None)
    for given in (None, torch.zeros(1), (torch.zeros(1),), (torch.zeros(1), None, torch.zeros(1))):
        assert attention._try(latent_module(), torch.zeros(1, 1, 64), None, None, lambda given=given: given) is None
