"""A tiny ChatGLM 2 (or 3, or GLM-4 of 2024) as its quantised folders are: its own names and settings, with program code.

`logits` is its arithmetic in plain torch, written from its definition and independent of transformers.
"""

import json
import math
from pathlib import Path

import torch
from random_tensors import RandomTensors
from safetensors.torch import save_file

LAYERS, HEADS, GROUPS, HEAD, HIDDEN, INNER, EPSILON = 2, 4, 2, 16, 64, 96, 1e-5


def write(folder: Path, *, bits=4, group_size=32, act_order=True, vocabulary=288, rope_ratio=1, **settings):
    """Writes a packed folder; returns its tensors by their names in it, dequantised, in fp32."""
    made = RandomTensors(11, bits, group_size, act_order)
    made.normal("transformer.embedding.word_embeddings.weight", vocabulary, HIDDEN)
    made.normal("transformer.output_layer.weight", vocabulary, HIDDEN, scale=0.2)
    made.norm("transformer.encoder.final_layernorm.weight", HIDDEN)
    for at in range(LAYERS):
        layer = f"transformer.encoder.layers.{at}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made.norm(f"{layer}.{norm}.weight", HIDDEN)
        made.pack(f"{layer}.self_attention.query_key_value", HIDDEN, (HEADS + 2 * GROUPS) * HEAD, bias=True)
        made.pack(f"{layer}.self_attention.dense", HEADS * HEAD, HIDDEN)
        made.pack(f"{layer}.mlp.dense_h_to_4h", HIDDEN, 2 * INNER)
        made.pack(f"{layer}.mlp.dense_4h_to_h", INNER, HIDDEN)
    made.stored["transformer.rotary_pos_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0, HEAD // 2, 2) / (HEAD // 2))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(made.stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "_name_or_path": "THUDM/chatglm3-6b", "model_type": "chatglm", "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModelForCausalLM": "modeling_chatglm.ChatGLM"},
        "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True, "kv_channels": HEAD,
        "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True, "ffn_hidden_size": INNER, "fp32_residual_connection": False, "hidden_dropout": 0.0,
        "hidden_size": HIDDEN, "layernorm_epsilon": EPSILON, "multi_query_attention": True, "multi_query_group_num": GROUPS,
        "num_attention_heads": HEADS, "num_layers": LAYERS, "original_rope": True, "padded_vocab_size": vocabulary,
        "post_layer_norm": True, "rmsnorm": True, "seq_length": 256, "use_cache": True, "torch_dtype": "float16",
        "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0, "rope_ratio": rope_ratio,
        "quantization_config": {
            "bits": bits, "group_size": group_size, "desc_act": act_order, "sym": True, "quant_method": "gptq",
        },
        **settings,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("configuration_chatglm.py", "modeling_chatglm.py"):
        (folder / file).write_text("raise SystemExit('it ran')")
    return made.dense


def _norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight


def _turned(x, angles):
    """The first half of each head, neighbour by neighbour."""
    pairs = torch.view_as_complex(x[..., : HEAD // 2].reshape(*x.shape[:-1], -1, 2).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    return torch.cat([turned, x[..., HEAD // 2 :]], -1)


def logits(tensors, ids, rope_ratio=1):
    """[tokens, vocabulary]."""
    count, half = len(ids), HEAD // 2
    x = tensors["transformer.embedding.word_embeddings.weight"][torch.tensor(ids)]
    angles = torch.arange(count)[:, None, None] / (10000.0 * rope_ratio) ** (torch.arange(0, half, 2) / half)
    hidden = torch.ones(count, count, dtype=torch.bool).triu(1)
    for at in range(LAYERS):
        own = {name.removeprefix(f"transformer.encoder.layers.{at}."): tensor for name, tensor in tensors.items()}
        fused = _norm(x, own["input_layernorm.weight"]) @ own["self_attention.query_key_value.weight"].T
        fused = (fused + own["self_attention.query_key_value.bias"]).reshape(count, -1, HEAD)
        q, k, v = fused.split([HEADS, GROUPS, GROUPS], 1)
        q, k = _turned(q, angles), _turned(k, angles)
        k, v = (each.repeat_interleave(HEADS // GROUPS, 1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(HEAD)
        seen = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).reshape(count, -1)
        x = x + seen @ own["self_attention.dense.weight"].T
        gate, up = (_norm(x, own["post_attention_layernorm.weight"]) @ own["mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ own["mlp.dense_4h_to_h.weight"].T
    return _norm(x, tensors["transformer.encoder.final_layernorm.weight"]) @ tensors["transformer.output_layer.weight"].T
