"""Llama, and what is made of its modules: Mistral, Ministral (and 3), Qwen 2 and 3, Phi-3, Seed-OSS, EXAONE 3, InternLM 3, CWM,
IQuest-Coder, Arcee (whose MLP has no gate); Yi and most finetunes say llama or mistral."""

from typing import Any

from .image_text import OnePosition
from .parts import ModelParts, Options
from .reading import act_of, base_of, llama_layer, model_of, rotary_of, temperature_of


def describe(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    layers = []
    for layer in base.layers:
        window = getattr(layer.self_attn, "sliding_window", None)
        if window is None and config.model_type in ("mistral", "phi3"):
            window = getattr(config, "sliding_window", None)
        layers.append(llama_layer(layer, config, window=window or 0))
    qk_norm = "head" if layers[0].q_norm is not None else ""
    return model_of(hf, layers, Options(activation=act_of(base.layers[0].mlp), qk_norm=qk_norm))


def _three_positions(hf: Any) -> ModelParts:
    """The language models of Qwen2-VL and Qwen2.5-VL."""
    layers = [llama_layer(layer, hf.config) for layer in base_of(hf).layers]
    rotaries = (rotary_of(OnePosition(base_of(hf).rotary_emb)),)
    return model_of(hf, layers, Options(activation=act_of(base_of(hf).layers[0].mlp)), rotaries=rotaries)


def _arcee(hf: Any) -> ModelParts:
    layers = [llama_layer(layer, hf.config, gate_up=(layer.mlp.up_proj,)) for layer in base_of(hf).layers]
    return model_of(hf, layers, Options(gated=False, activation=act_of(base_of(hf).layers[0].mlp)))


def _ministral3(hf: Any) -> ModelParts:
    config = hf.config
    window = getattr(config, "sliding_window", None) or 0
    layers = [llama_layer(layer, config, window=window, tempered=True) for layer in base_of(hf).layers]
    return model_of(hf, layers, Options(activation=act_of(base_of(hf).layers[0].mlp)), temperature=temperature_of(config))


KINDS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "seed_oss", "qwen3_vl_text"), describe)
KINDS |= dict.fromkeys(("ministral", "exaone", "internlm3", "iquestcoder", "cwm"), describe)
KINDS |= {"arcee": _arcee, "ministral3": _ministral3}
KINDS |= dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), _three_positions)
