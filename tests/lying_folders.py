"""Tiny random GPTQ folders, and what each must compute, whatever lies were told about it: for tests and benchmarks/lies.py.

A lie (folder_lies.py) changes config.json, the settings of the quantisation, or tensors. Such a folder is refused in a sentence,
or loads and gives the logits of its dequantised twin (lying_twins.py).
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

FAMILY = ("llama", "mistral", "qwen2", "qwen3", "phi3")
LIKE = ("gemma2", "cohere", "olmo2", "granite", "stablelm")  # Llama's modules with other options
SOFTMAX = (
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "flex_olmo",
    "granitemoe",
    "hunyuan_v1_moe",
    "ernie4_5_moe",
)  # mixtures, by their router
SIGMOID = ("dots1", "glm4_moe", "solar_open", "minimax_m2")
MIXTURES = (*SOFTMAX, *SIGMOID)
_W123 = ("mixtral", "minimax_m2")  # their files' names of experts are not those of transformers 5
OWN = ("gptj", "gpt_bigcode", "mpt")  # with other names for the sizes, as gpt2 has
OTHERS = (
    "gpt_neox", "opt", "gpt2", "falcon", "phi", "bloom", *LIKE, *OWN, "starcoder2", "gemma", "gemma3_text", "seed_oss", "cohere2",
    "olmo", "olmo3", "glm", "glm4", "ernie4_5", "nemotron", "hunyuan_v1_dense", "exaone4", "smollm3",
)  # fmt: skip
HEAD_DIM = ("gemma", "gemma2", "gemma3_text", "seed_oss", "glm", "glm4", "ernie4_5", "hunyuan_v1_dense")  # said, not computed
SLIDING = ("gemma2", "gemma3_text", "cohere2", "olmo3", "exaone4")
_ROUTERS = (".gate", ".gate.wg", ".shared_expert_gate")  # the choice of experts stays dense
ROLES = {"gate": ("w1", "gate_proj"), "up": ("w3", "up_proj"), "down": ("w2", "down_proj")}
WORDS = {torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}


@dataclass
class Folder:
    """What will be written: two JSON files and the tensors of one weights file."""

    kind: str
    config: dict[str, Any]
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    cut_bytes: int = 0  # taken from the end of the weights
    lies: list[str] = field(default_factory=list)  # the lies

    def write(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config))
        (path / "quantize_config.json").write_text(json.dumps(self.settings))
        file = path / "model.safetensors"
        save_file({name: each.contiguous() for name, each in self.tensors.items()}, file, metadata={"format": "pt"})
        if self.cut_bytes:
            data = file.read_bytes()
            file.write_bytes(data[: max(0, len(data) - self.cut_bytes)])

    @property
    def packed(self) -> list[str]:
        return sorted(name.removesuffix(".qweight") for name in self.tensors if name.endswith(".qweight"))


def honest(rng: random.Random, kind: str = "") -> Folder:
    """A random model whose files tell the truth."""
    kinds = [each for each in rng.choices((FAMILY, OTHERS, MIXTURES), (0.4, 0.3, 0.3))[0] if each in CONFIG_MAPPING]
    kind = kind or rng.choice(kinds)
    head_dim, keys = rng.choice((16, 16, 16, 32, 48, 24)), rng.choice((1, 2, 3))
    heads = keys * rng.choice((1, 2, 3))
    own = kind in ("llama", "mistral", "qwen3") and rng.random() < 0.4  # a head_dim that is not hidden / heads
    hidden = heads * (rng.choice((8, 16, 32)) if own else head_dim)
    layers, inner, vocabulary = rng.randint(1, 2), 32 * rng.randint(1, 4), rng.randint(40, 300)
    tied = rng.random() < 0.3
    config: dict[str, Any] = {"vocab_size": vocabulary, "max_position_embeddings": 128, "pad_token_id": None}
    config |= {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": tied, "initializer_range": 0.2}
    if kind in ("gpt2", "gptj", "gpt_bigcode"):
        config |= {"n_positions": 128, "n_embd": hidden, "n_layer": layers, "n_head": heads, "n_inner": inner}
        config |= {"rotary_dim": 8} if kind == "gptj" else {}
        config |= {"multi_query": rng.random() < 0.5} if kind == "gpt_bigcode" else {}
    elif kind == "mpt":
        config |= {"d_model": hidden, "n_layers": layers, "n_heads": heads, "max_seq_len": 128, "expansion_ratio": 2}
    elif kind == "opt":
        config |= {"hidden_size": hidden, "ffn_dim": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
                   "word_embed_proj_dim": hidden, "pad_token_id": 1}  # fmt: skip
    else:
        config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
    if kind == "bloom":
        config |= {"n_layer": layers, "n_head": heads}
    elif kind in MIXTURES:
        config |= {"num_key_value_heads": keys} | _mixture(rng, kind, head_dim, layers)
    elif kind in OTHERS and "num_attention_heads" in config and kind not in ("gpt_neox", "opt", "falcon", "phi", "bloom"):
        config |= {"num_key_value_heads": keys}
        config |= {"head_dim": head_dim} if kind in HEAD_DIM else {}
        if kind in SLIDING:
            config |= {"sliding_window": rng.choice((5, 17))}
            config |= {"layer_types": [rng.choice(("sliding_attention", "full_attention")) for _ in range(layers)]}
    if kind in FAMILY:
        config |= {"num_key_value_heads": keys}
        config |= {"head_dim": head_dim} if own or kind == "qwen3" else {}
        if kind in ("mistral", "phi3"):
            config |= {"sliding_window": rng.choice((None, 5, 17))}
        if rng.random() < 0.3:
            config |= {"rope_scaling": rope_of(rng, head_dim, kind)}
            config |= {"original_max_position_embeddings": 24} if config["rope_scaling"].get("rope_type") == "longrope" else {}
    if kind == "falcon":
        config |= {"multi_query": True, "new_decoder_architecture": False, "bias": rng.random() < 0.3}
    torch.manual_seed(rng.randrange(1 << 30))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), dtype=torch.float32)
    if kind in ("llama", "qwen2", "qwen3") and rng.random() < 0.2:
        tied = tied and rng.random() < 0.5
    bits, group, sym, ordered = (
        rng.choice((2, 3, 4, 4, 4, 8)),
        rng.choice((-1, 16, 32, 64, 128)),
        rng.random() < 0.5,
        rng.random() < 0.5,
    )
    form = rng.choice(("gptq", "gptq", "gptq_v2"))
    settings = {"bits": bits, "group_size": group, "desc_act": ordered, "sym": sym, "checkpoint_format": form}
    tensors: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name, value in model.state_dict().items():
        owner, _dot, part = name.rpartition(".")
        if config["tie_word_embeddings"] and name in ("lm_head.weight", "embed_out.weight"):
            continue
        module = modules[owner]
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if value.dim() == 3 and part in ("gate_up_proj", "down_proj"):  # transformers 5 stacks the experts; files do not
            for at in range(value.shape[0]):
                for role in ("gate", "up") if part == "gate_up_proj" else ("down",):
                    k, n = value.shape[2], value.shape[1] // (2 if role != "down" else 1)
                    expert = f"{owner}.{at}.{ROLES[role][kind not in _W123]}"
                    made = packed(rng, k, n, bits, group, ordered, sym, form)
                    tensors |= {f"{expert}.{each}": tensor for each, tensor in made.items()}
        elif linear and part == "weight" and any(each.isdigit() for each in name.split(".")) and not owner.endswith(_ROUTERS):
            k, n = value.shape if type(module).__name__ == "Conv1D" else value.shape[::-1]
            tensors |= {f"{owner}.{each}": tensor for each, tensor in packed(rng, k, n, bits, group, ordered, sym, form).items()}
        elif part == "e_score_correction_bias":
            tensors[name] = torch.randn(value.shape) * 0.3
        elif "norm" in name and part == "weight":
            tensors[name] = (torch.rand(value.shape) + 0.5).half()
        else:
            tensors[name] = value.half()
    if kind in _W123:
        tensors = {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in tensors.items()}
    return Folder(
        kind, json.loads(json.dumps({**config, "model_type": kind, "architectures": [type(model).__name__]})), settings, tensors
    )


def _mixture(rng: random.Random, kind: str, head_dim: int, layers: int) -> dict[str, Any]:
    """The settings of a mixture's experts and of their choice."""
    experts, each = rng.choice((2, 3, 4, 5)), rng.choice((1, 2, 2))
    name = {"mixtral": "num_local_experts", "granitemoe": "num_local_experts", "minimax_m2": "num_local_experts"}.get(
        kind, "n_routed_experts" if kind in SIGMOID else "num_experts"
    )
    made: dict[str, Any] = {name: experts, "moe_topk" if kind == "hunyuan_v1_moe" else "num_experts_per_tok": each}
    if kind == "ernie4_5_moe":
        made = {"moe_num_experts": experts, "moe_k": each, "moe_num_shared_experts": rng.choice((0, 1, 2))}
        return made | {"moe_intermediate_size": 32, "moe_layer_start_index": rng.choice((0, 1)), "use_bias": False}
    if kind == "hunyuan_v1_moe":
        return made | {"head_dim": head_dim}
    if kind not in (*_W123, "granitemoe", "olmoe", "flex_olmo"):
        made |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    if kind == "mixtral":
        made |= {"sliding_window": rng.choice((None, 5))}
    elif kind == "granitemoe":
        made |= {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}
    else:
        made |= {"norm_topk_prob": rng.random() < 0.5}
    if kind in ("qwen3_moe", *SIGMOID):
        made |= {"head_dim": head_dim}
    if kind == "qwen3_moe" and rng.random() < 0.3:
        made |= {"mlp_only_layers": [rng.randrange(layers)]}
    if kind in SIGMOID:
        made |= {"n_group": 1, "topk_group": 1, "n_shared_experts": rng.choice((1, 1, 2)), "routed_scaling_factor": 1.5}
        made |= {"first_k_dense_replace": rng.choice((0, 0, 1)), "sliding_window": None}
        made |= {"use_qk_norm": rng.random() < 0.5} if kind in ("glm4_moe", "minimax_m2", "solar_open") else {}
    if kind == "minimax_m2":
        made |= {"rotary_dim": head_dim // 2}
    return made


def rope_of(rng: random.Random, head_dim: int, kind: str = "llama") -> dict[str, Any]:
    """A scaling of rotary positions that is right."""
    half = head_dim // 2
    kinds = (
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
        {"rope_type": "longrope", "short_factor": [1.0 + 0.01 * at for at in range(half)],
         "long_factor": [2.0 + 0.1 * at for at in range(half)], "original_max_position_embeddings": 24},
    )  # fmt: skip
    return kinds[-1] if kind == "phi3" else rng.choice(kinds)


def packed(rng: random.Random, k: int, n: int, bits: int, group: int, ordered: bool, sym: bool, form: str) -> dict[str, Tensor]:
    size = k if group == -1 else group
    groups = -(-k // size)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    low = 1 if form == "gptq" else 0
    zeros = torch.full((groups, n), 2 ** (bits - 1)) if sym else torch.randint(low, 2**bits, (groups, n), generator=generator)
    g_idx = torch.arange(k) // size
    if ordered:
        g_idx = g_idx[torch.randperm(k, generator=generator)]
    words = torch.randint(-(2**31), 2**31, (-(-k * bits // 32), n), generator=generator).int()
    return {
        "qweight": words,
        "qzeros": pack_rows(zeros - low, bits),
        "scales": (torch.rand(groups, n, generator=generator) + 0.5).mul(2.5 / 2**bits / k**0.5).half(),
        "g_idx": g_idx.int(),
    }


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """[rows, count] -> int32 [rows, ceil(count * bits / 32)], a little-endian stream of bits in each row."""
    rows, count = values.shape
    stream = ((values.numpy()[..., None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(rows, count * bits)
    stream = np.pad(stream, ((0, 0), (0, -count * bits % 32)))
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view(np.int32).copy())
