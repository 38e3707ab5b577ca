"""gptq/families: settings in config.json that an architecture does not know."""

import pytest
import transformers

pytest.importorskip("numba")

from family_variants import VARIANTS
from test_families import packed

from gptq_webui.gptq.families.known import parts_of

# Settings of some architectures, with values that would change what is computed.
SETTINGS = {
    "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0, "query_pre_attn_scalar": 7, "attention_multiplier": 3.0,
    "embedding_multiplier": 3.0, "residual_multiplier": 3.0, "logits_scaling": 3.0, "logit_scale": 3.0, "sliding_window": 3,
    "norm_topk_prob": False, "routed_scaling_factor": 3.0, "n_group": 2, "num_experts_per_tok": 1,
    "use_parallel_residual": False, "parallel_attn": False, "alibi": True, "multi_query": False,
    "use_qk_norm": True, "partial_rotary_factor": 0.25, "rotary_dim": 4, "layer_norm_eps": 0.5, "rms_norm_eps": 0.5,
    "clip_qkv": 0.5, "scale_attn_weights": False, "new_decoder_architecture": True, "no_rope_layers": [0, 0, 0, 0],
    "hidden_act": "relu", "activation_function": "relu", "tie_word_embeddings": True,
}  # fmt: skip


def numbers_of(parts):
    """What is read off settings, not off tensors."""
    experts = [layer.experts for layer in parts.layers if layer.experts is not None]
    return (
        parts.options, parts.heads, parts.kv_heads, parts.head_dim, parts.rotary_dim, parts.eps, parts.alibi is None,
        [(layer.window, layer.rotary, layer.experts is None) for layer in parts.layers],
        [(each.choices, each.sigmoid, each.normed, each.scale) for each in experts],
    )  # fmt: skip


@pytest.mark.parametrize("kind", sorted({kind for kind, _changes in VARIANTS.values()}))
def test_a_setting_that_an_architecture_does_not_know_changes_nothing(kind):
    """config.json of a finetune may keep settings of another architecture; transformers' modules do not read them."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers cannot make such a model")
    hf = packed(kind, next(changes for name, changes in VARIANTS.values() if name == kind))[0]
    parts = parts_of(hf)
    if parts is None:
        pytest.skip("transformers 4 keeps such experts dense")
    known = numbers_of(parts)
    added = [name for name in SETTINGS if not hasattr(hf.config, name)]
    for name in added:
        setattr(hf.config, name, SETTINGS[name])
    assert len(added) > 8
    assert (again := parts_of(hf)) is None or numbers_of(again) == known


def test_weights_of_experts_that_are_divided_by_more_than_their_sum_are_not_described():
    """ERNIE's moe_norm_min, which is 1e-12 in its models: the step divides by the sum."""
    if "ernie4_5_moe" not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers cannot make such a model")
    assert parts_of(packed("ernie4_5_moe")[0]) is not None
    assert parts_of(packed("ernie4_5_moe", {"moe_norm_min": 0.5})[0]) is None
