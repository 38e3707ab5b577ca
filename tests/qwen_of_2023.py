"""A tiny Qwen of 2023 as its quantised folders are: its own names and settings, with program code, which must not run.

`logits` is its arithmetic in plain torch, written from its definition and independent of transformers.
"""

import json
import math
from pathlib import Path

import torch
from random_tensors import RandomTensors
from safetensors.torch import save_file

LAYERS, HEADS, HEAD, HIDDEN, INNER, EPSILON, BASE = 2, 4, 16, 64, 96, 1e-6, 10000.0
CODE = "raise SystemExit('it ran')"


def write(folder: Path, *, bits=4, group_size=32, act_order=True, vocabulary=288, seq_length=128, longest=256, shards=1):
    """Writes a packed folder; returns its tensors by their names in it, dequantised, in fp32."""
    made = RandomTensors(7, bits, group_size, act_order)
    made.normal("transformer.wte.weight", vocabulary, HIDDEN)
    made.normal("lm_head.weight", vocabulary, HIDDEN, scale=0.2)
    made.norm("transformer.ln_f.weight", HIDDEN)
    for at in range(LAYERS):
        layer = f"transformer.h.{at}"
        for norm in ("ln_1", "ln_2"):
            made.norm(f"{layer}.{norm}.weight", HIDDEN)
        made.pack(f"{layer}.attn.c_attn", HIDDEN, 3 * HEADS * HEAD, bias=True)
        made.pack(f"{layer}.attn.c_proj", HEADS * HEAD, HIDDEN)
        made.pack(f"{layer}.mlp.w1", HIDDEN, INNER)
        made.pack(f"{layer}.mlp.w2", HIDDEN, INNER)
        made.pack(f"{layer}.mlp.c_proj", INNER, HIDDEN)
    made.stored["transformer.rotary_emb.inv_freq"] = 1 / BASE ** (torch.arange(0, HEAD, 2) / HEAD)
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(made.stored)
    for at in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{at + 1:05}-of-{shards:05}.safetensors"
        save_file({name: made.stored[name] for name in names[at::shards]}, folder / file, metadata={"format": "pt"})
    config = {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": HIDDEN, "intermediate_size": 2 * INNER,
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "kv_channels": HEAD, "layer_norm_epsilon": EPSILON,
        "rotary_emb_base": int(BASE), "rotary_pct": 1.0, "seq_length": seq_length, "max_position_embeddings": longest,
        "vocab_size": vocabulary, "tie_word_embeddings": False, "no_bias": True, "use_dynamic_ntk": True, "use_logn_attn": True,
        "use_flash_attn": "auto", "fp16": True, "bf16": False, "fp32": False, "scale_attn_weights": True, "use_cache": True,
        "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "initializer_range": 0.02, "tokenizer_class": "QWenTokenizer",
        "softmax_in_fp32": False, "use_cache_quantization": False, "use_cache_kernel": False, "onnx_safe": None,
        "transformers_version": "4.32.0",
        "quantization_config": {
            "bits": bits, "group_size": group_size, "damp_percent": 0.01, "desc_act": act_order, "static_groups": False,
            "sym": True, "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model",
            "quant_method": "gptq",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("configuration_qwen.py", "modeling_qwen.py"):
        (folder / file).write_text(CODE)
    return made.dense


def _norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight


def _turned(x, angles):
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def logits(tensors, ids):
    """[tokens, vocabulary], for at most seq_length tokens."""
    count = len(ids)
    x = tensors["transformer.wte.weight"][torch.tensor(ids)]
    angles = torch.arange(count)[:, None, None] / BASE ** (torch.arange(0, HEAD, 2) / HEAD)
    hidden = torch.ones(count, count, dtype=torch.bool).triu(1)
    for at in range(LAYERS):
        own = {name.removeprefix(f"transformer.h.{at}."): tensor for name, tensor in tensors.items()}
        mixed = _norm(x, own["ln_1.weight"]) @ own["attn.c_attn.weight"].T + own["attn.c_attn.bias"]
        q, k, v = (each.reshape(count, HEADS, HEAD) for each in mixed.split(HEADS * HEAD, -1))
        q, k = _turned(q, angles), _turned(k, angles)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(HEAD)
        seen = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).reshape(count, -1)
        x = x + seen @ own["attn.c_proj.weight"].T
        normed = _norm(x, own["ln_2.weight"])
        gate = normed @ own["mlp.w2.weight"].T
        x = x + (normed @ own["mlp.w1.weight"].T * gate * gate.sigmoid()) @ own["mlp.c_proj.weight"].T
    return _norm(x, tensors["transformer.ln_f.weight"]) @ tensors["lm_head.weight"].T
