"""Tiny folders of 2023 in the names and settings of their authors' program code, and the arithmetic of it in plain torch."""

import json
import math
import re

import torch
from checked_steps import IDS
from safetensors.torch import save_file
from torch.nn import functional as F

import tiny

HIDDEN, INNER, HEADS, KEYS, DIM, WORDS, LAYERS, EPS = 64, 96, 4, 2, 16, 288, 2, 1e-5
COMMON = {
    "vocab_size": WORDS, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "hidden_act": "silu",
    "num_attention_heads": HEADS, "rms_norm_eps": EPS, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# --- the arithmetic ----------------------------------------------------------------------------------


class Weights:
    """Of a folder, dequantised, in its own names."""

    def __init__(self, tensors):
        self.tensors = tensors

    def linear(self, name, x):
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def rms(self, name, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.tensors[f"{name}.weight"]

    def layer_norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], EPS)


def turned(x, dims):
    """Rotary positions in the first `dims` numbers of each head: the first half of them with the second. x: [heads, T, D]."""
    angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, dims, 2) / dims)[None]
    first, second, rest = x[..., : dims // 2], x[..., dims // 2 : dims], x[..., dims:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin(), rest], -1)


def published_slopes(heads):
    """The rule of the paper on ALiBi: for a number between two powers, those of the lower, then every other one of the next."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (at + 1) / power) for at in range(power)]
    return first if power == heads else first + published_slopes(2 * power)[::2][: heads - power]


def attention(q, k, v, dims=DIM, slopes=None):
    """Causal, of [T, heads * D] each; fewer keys stand for several queries."""
    q, k, v = (each.view(len(each), -1, DIM).transpose(0, 1) for each in (q, k, v))
    if slopes is None:
        q, k = turned(q, dims), turned(k, dims)
    k, v = (each.repeat_interleave(len(q) // len(each), 0) for each in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(DIM) + torch.full((q.shape[1], q.shape[1]), -torch.inf).triu(1)
    if slopes is not None:
        at = torch.arange(q.shape[1])
        scores = scores + torch.tensor(slopes)[:, None, None] * (at[None] - at[:, None])
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def three(w, at, x):
    return tuple(w.linear(f"model.layers.{at}.self_attn.{each}_proj", x) for each in "qkv")


def one(w, at, x):
    return w.linear(f"model.layers.{at}.self_attn.W_pack", x).chunk(3, -1)


def llama(w, norm=Weights.rms, qkv=three, embedding=1.0, depth=1.0, logits=1.0, head="lm_head", slopes=None):
    x = w.tensors["model.embed_tokens.weight"][IDS] * embedding
    for at in range(LAYERS):
        name = f"model.layers.{at}"
        attended = attention(*qkv(w, at, norm(w, f"{name}.input_layernorm", x)), slopes=slopes)
        x = x + depth * w.linear(f"{name}.self_attn.o_proj", attended)
        inner = norm(w, f"{name}.post_attention_layernorm", x)
        gated = F.silu(w.linear(f"{name}.mlp.gate_proj", inner)) * w.linear(f"{name}.mlp.up_proj", inner)
        x = x + depth * w.linear(f"{name}.mlp.down_proj", gated)
    return F.linear(norm(w, "model.norm", x) / logits, w.tensors[f"{head}.weight"])


def baichuan2(w, slopes=None):
    w.tensors["lm_head.weight"] = w.tensors["lm_head.weight"] / w.tensors["lm_head.weight"].norm(dim=1, keepdim=True)
    return llama(w, qkv=one, slopes=slopes)


def internlm2(w):
    x = w.tensors["model.tok_embeddings.weight"][IDS]
    for at in range(LAYERS):
        name = f"model.layers.{at}"
        fused = w.linear(f"{name}.attention.wqkv", w.rms(f"{name}.attention_norm", x)).view(len(x), KEYS, -1, DIM)
        q, k, v = (each.flatten(1) for each in (fused[:, :, :-2], fused[:, :, -2], fused[:, :, -1]))
        x = x + w.linear(f"{name}.attention.wo", attention(q, k, v))
        inner = w.rms(f"{name}.ffn_norm", x)
        gated = F.silu(w.linear(f"{name}.feed_forward.w1", inner)) * w.linear(f"{name}.feed_forward.w3", inner)
        x = x + w.linear(f"{name}.feed_forward.w2", gated)
    return w.linear("output", w.rms("model.norm", x))


def phi(w, before="transformer.h", first=0, embedding="transformer.embd.wte", last="lm_head"):
    x = w.tensors[f"{embedding}.weight"][IDS]
    for at in range(first, first + LAYERS):
        name = f"{before}.{at}"
        inner = w.layer_norm(f"{name}.ln", x)
        attended = w.linear(f"{name}.mixer.out_proj", attention(*w.linear(f"{name}.mixer.Wqkv", inner).chunk(3, -1), dims=8))
        mlp = w.linear(f"{name}.mlp.fc2", F.gelu(w.linear(f"{name}.mlp.fc1", inner), approximate="tanh"))
        x = x + attended + mlp
    return w.linear(f"{last}.linear", w.layer_norm(f"{last}.ln", x))


def mixformer(w):
    return phi(w, "layers", 1, "layers.0.wte", f"layers.{LAYERS + 1}")


# --- the folders -------------------------------------------------------------------------------------


def llama_shapes(keys=(KEYS * DIM, KEYS * DIM), fused=False, bias=False, norm_bias=False, tied=False):
    """name -> shape of a linear layer's weight; name -> shape of another tensor."""
    linears, others = {}, {"model.embed_tokens.weight": (WORDS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for at in range(LAYERS):
        name = f"model.layers.{at}"
        widths = {"W_pack": 3 * HIDDEN} if fused else {"q_proj": HIDDEN, "k_proj": keys[at], "v_proj": keys[at]}
        inside = {f"self_attn.{each}": (width, HIDDEN) for each, width in widths.items()} | {"self_attn.o_proj": (HIDDEN, HIDDEN)}
        if bias:
            others |= {f"{name}.{each}.bias": shape[:1] for each, shape in inside.items()}
        inside |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
        linears |= {f"{name}.{each}": shape for each, shape in inside.items()}
        others |= {f"{name}.{each}.weight": (HIDDEN,) for each in ("input_layernorm", "post_attention_layernorm")}
    if norm_bias:
        others |= {name.replace("weight", "bias"): shape for name, shape in others.items() if "norm" in name}
    return linears, others | ({} if tied else {"lm_head.weight": (WORDS, HIDDEN)})


def internlm2_shapes():
    linears = {}
    others = {"model.tok_embeddings.weight": (WORDS, HIDDEN), "model.norm.weight": (HIDDEN,), "output.weight": (WORDS, HIDDEN)}
    for at in range(LAYERS):
        inside = {"attention.wqkv": (HIDDEN + 2 * KEYS * DIM, HIDDEN), "attention.wo": (HIDDEN, HIDDEN), "feed_forward.w1":
                  (INNER, HIDDEN), "feed_forward.w3": (INNER, HIDDEN), "feed_forward.w2": (HIDDEN, INNER)}  # fmt: skip
        linears |= {f"model.layers.{at}.{each}": shape for each, shape in inside.items()}
        others |= {f"model.layers.{at}.{each}.weight": (HIDDEN,) for each in ("attention_norm", "ffn_norm")}
    return linears, others


def phi_shapes(before="transformer.h", first=0, embedding="transformer.embd.wte", last="lm_head"):
    linears, others = {}, {f"{embedding}.weight": (WORDS, HIDDEN), f"{last}.linear.weight": (WORDS, HIDDEN)}
    others |= {f"{last}.linear.bias": (WORDS,), f"{last}.ln.weight": (HIDDEN,), f"{last}.ln.bias": (HIDDEN,)}
    for at in range(first, first + LAYERS):
        inside = {"mixer.Wqkv": (3 * HIDDEN, HIDDEN), "mixer.out_proj": (HIDDEN, HIDDEN), "mlp.fc1": (4 * HIDDEN, HIDDEN),
                  "mlp.fc2": (HIDDEN, 4 * HIDDEN)}  # fmt: skip
        linears |= {f"{before}.{at}.{each}": shape for each, shape in inside.items()}
        others |= {f"{before}.{at}.{each}.bias": shape[:1] for each, shape in inside.items()}
        others |= {f"{before}.{at}.ln.{part}": (HIDDEN,) for part in ("weight", "bias")}
    return linears, others


PHI = {
    "vocab_size": WORDS, "n_positions": 256, "n_embd": HIDDEN, "n_layer": LAYERS, "n_inner": None, "n_head": HEADS, "n_head_kv":
    None, "rotary_dim": 8, "activation_function": "gelu_new", "layer_norm_epsilon": EPS, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
    "resid_pdrop": 0.0, "tie_word_embeddings": False, "flash_attn": False, "fused_dense": False, "img_processor": None,
}  # fmt: skip
LAST = f"layers.{LAYERS + 1}"
KEYED = {**COMMON, "num_key_value_heads": KEYS}
SLOPED = {name: value for name, value in COMMON.items() if name != "max_position_embeddings"} | {"model_max_length": 256}
MINI = {"scale_emb": 12, "dim_model_base": 16, "scale_depth": 1.4}
CASES = {  # name -> (model_type, settings, shapes, arithmetic)
    "aquila": ("aquila", KEYED, llama_shapes(), llama),
    "xverse": ("xverse", KEYED | {"max_tokenizer_truncation": 256}, llama_shapes(), llama),
    "skywork": ("skywork", KEYED | {"rope_theta": 10000}, llama_shapes(), llama),
    "internlm": ("internlm", COMMON | {"bias": True, "rotary": {"base": 10000, "type": "dynamic"}},
                 llama_shapes((HIDDEN, HIDDEN), bias=True), llama),
    "internlm-20b": ("internlm", COMMON | {"bias": False}, llama_shapes((HIDDEN, HIDDEN)), llama),
    "internlm2": ("internlm2", KEYED | {"bias": False, "rope_theta": 10000, "rope_scaling": {"type": "dynamic", "factor": 2.0},
                                        "attn_implementation": "eager"}, internlm2_shapes(), internlm2),
    "baichuan": ("baichuan", COMMON | {"gradient_checkpointing": False}, llama_shapes(fused=True), lambda w: llama(w, qkv=one)),
    "baichuan2": ("baichuan", COMMON | {"model_max_length": 256, "z_loss_weight": 0, "tie_word_embeddings": False},
                  llama_shapes(fused=True), baichuan2),
    "baichuan-13b": ("baichuan", SLOPED, llama_shapes(fused=True), lambda w: llama(w, qkv=one, slopes=published_slopes(HEADS))),
    "baichuan2-13b": ("baichuan", SLOPED | {"z_loss_weight": 0}, llama_shapes(fused=True),
                      lambda w: baichuan2(w, published_slopes(HEADS))),
    "orion": ("orion", KEYED | {"attention_bias": False, "rope_theta": 10000.0, "pretraining_tp": 1},
              llama_shapes(norm_bias=True), lambda w: llama(w, norm=Weights.layer_norm)),
    "minicpm": ("minicpm", KEYED | MINI, llama_shapes(tied=True), lambda w: llama(
        w, embedding=12, depth=1.4 / math.sqrt(LAYERS), logits=HIDDEN / 16, head="model.embed_tokens")),
    "minicpm-untied": ("minicpm", KEYED | MINI | {"tie_word_embeddings": False}, llama_shapes(), lambda w: llama(
        w, embedding=12, depth=1.4 / math.sqrt(LAYERS), logits=HIDDEN / 16)),
    "phi": ("phi-msft", PHI, phi_shapes(), phi),
    "mixformer": ("mixformer-sequential", PHI | {"architecture": {"block_cls": "parallel", "mixer": {}, "mlp": {}}},
                  phi_shapes("layers", 1, "layers.0.wte", LAST), mixformer),
    "deci": ("deci", COMMON | {"num_key_value_heads_per_layer": [1, 2], "rope_theta": 10000.0}, llama_shapes((DIM, 2 * DIM)),
             llama),
}  # fmt: skip


def write(folder, case, *, packed=True, bits=4, act_order=True, left=None, **changes):
    """A folder in the names of its program code, which must not run; returns its weights. `left`: what stays in 16 bits."""
    model_type, settings, (linears, others), _arithmetic = CASES[case]
    generator = torch.Generator().manual_seed(7)
    last = max(int(re.search(r"\.(\d+)\.", name)[1]) for name in linears)
    left = re.compile(left or rf"\.{last}\.")
    stored, dense = {}, {}
    for name, shape in others.items():
        value = torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else 0.5)
        stored[name] = (value + ("norm" in name or ".ln." in name) * name.endswith("weight")).half()
        dense[name] = stored[name].float()
    for name, (outputs, inputs) in linears.items():
        if packed and not left.search(name):
            tensors, matrix = tiny.random_layer(inputs, outputs, bits, 32, act_order=act_order, generator=generator)
            stored |= {f"{name}.{part}": each for part, each in tensors.items()}
        else:
            matrix = (torch.randn(outputs, inputs, generator=generator) * 0.1).half().float()
            stored[f"{name}.weight"] = matrix.half()
        dense[f"{name}.weight"] = matrix
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = settings | {
        "model_type": model_type, "architectures": ["OldForCausalLM"], "torch_dtype": "float16", "use_cache": True,
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}, "transformers_version": "4.33.0",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "code.py").write_text("raise SystemExit('it ran')")
    if packed:
        quantize = {"bits": bits, "group_size": 32, "desc_act": act_order, "sym": True, "damp_percent": 0.1}
        (folder / "quantize_config.json").write_text(json.dumps(quantize))
    return Weights(dense)
