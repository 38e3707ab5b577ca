"""Lies about small GPTQ folders (lying_folders.py), each a random one of its kind. A lie says what it has changed."""

import random
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from lying_folders import FAMILY, MIXTURES, OTHERS, Folder, honest, packed, rope_of
from torch import Tensor

NUMBERS = (0, -1, 1, 2, 3, 5, 7, 16, 17, 24, 48, 63, 80, 256, 10**6, 2**31, 2**63, 10**30, 1.5, 0.0, -0.5, 1e308, float("nan"),
           float("inf"), "64", "", None, True, False, [], [4, 4], {}, {"a": 1})  # fmt: skip
FIELDS = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size", "num_hidden_layers",
    "vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps", "sliding_window", "tie_word_embeddings", "hidden_act",
    "attention_bias", "mlp_bias", "pad_token_id", "bos_token_id", "eos_token_id", "partial_rotary_factor", "model_type",
    "architectures", "max_window_layers", "use_sliding_window", "layer_types", "original_max_position_embeddings",
    "attention_dropout", "initializer_range", "torch_dtype", "n_head", "n_embd", "n_layer", "n_inner", "rotary_pct",
    "num_kv_heads", "ffn_dim", "activation_function", "word_embed_proj_dim", "rotary_dim", "d_model", "n_layers", "n_heads",
    "n_positions", "max_seq_len", "expansion_ratio", "multi_query", "parallel_attn", "new_decoder_architecture", "alibi",
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
    "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "router_jitter_noise", "layer_norm_eps", "layer_norm_epsilon",
    "hidden_activation", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "logit_scale",
    "logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier", "clip_qkv", "use_qk_norm",
    "use_parallel_residual", "no_rope_layers", "sliding_window_pattern", "norm_epsilon", "use_bias", "qk_layernorm",
    "moe_topk", "moe_k", "moe_num_experts", "moe_num_shared_experts", "moe_layer_start_index", "moe_layer_interval",
    "moe_norm_min",
    "n_routed_experts", "n_shared_experts", "n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace",
)  # fmt: skip
KINDS_OF_ROPE = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "su", "mrope", "proportional", "none", 7, None)


def _value(rng: random.Random, now: Any) -> Any:
    if isinstance(now, int) and not isinstance(now, bool) and rng.random() < 0.5:
        return rng.choice((now + 1, now - 1, now * 2, now // 2, now * 3, -now, float(now), str(now)))
    return rng.choice(NUMBERS)


def lie_in_config(folder: Folder, rng: random.Random) -> str:
    known = [each for each in FIELDS if each in folder.config]
    name = rng.choice(known) if rng.random() < 0.75 else rng.choice(FIELDS)
    if name == "model_type":
        value: Any = rng.choice((*FAMILY, *OTHERS, *MIXTURES, "bert", "nothing", 7))
    elif name == "hidden_act":
        value = rng.choice(("silu", "gelu", "relu", "swish", "nothing", 3))
    else:
        value = _value(rng, folder.config.get(name))
    folder.config[name] = value
    if rng.random() < 0.05:
        del folder.config[name]
        return f"config without {name}"
    return f"config {name} = {value!r}"


def lie_in_heads(folder: Folder, rng: random.Random) -> str:
    """Numbers of heads that may fit together, but not what was."""
    heads, keys = rng.choice((1, 2, 3, 4, 5, 6, 8)), rng.choice((1, 2, 3, 4))
    dim = rng.choice((None, 8, 16, 17, 24, 32, 48, 64))
    folder.config |= {"num_attention_heads": heads, "num_key_value_heads": keys} | ({"head_dim": dim} if dim else {})
    return f"heads {heads}, {keys}, {dim}"


def lie_in_rope(folder: Folder, rng: random.Random) -> str:
    rope = dict(rope_of(rng, rng.choice((16, 32, 48))))
    if rng.random() < 0.3:
        rope["rope_type"] = rng.choice(KINDS_OF_ROPE)
    if rng.random() < 0.5:
        name = rng.choice((*rope, "factor", "partial_rotary_factor", "rope_theta", "attention_factor", "beta_fast", "mscale"))
        rope[name] = _value(rng, rope.get(name))
    if rng.random() < 0.2:
        del rope[rng.choice(list(rope))]
    place = rng.choice(("rope_scaling", "rope_scaling", "rope_parameters"))
    folder.config[place] = rope if rng.random() < 0.95 else rng.choice(NUMBERS)
    return f"config {place} = {folder.config[place]!r}"


def lie_in_settings(folder: Folder, rng: random.Random) -> str:
    name = rng.choice(("bits", "bits", "group_size", "group_size", "sym", "desc_act", "pack_dtype", "meta", "quant_method"))
    value = {
        "bits": lambda: rng.choice((2, 3, 4, 8, 5, *NUMBERS)),
        "group_size": lambda: rng.choice((-1, 8, 16, 24, 32, 48, 64, 128, 1024, *NUMBERS)),
        "pack_dtype": lambda: rng.choice(("int8", "int16", "int32", "int64", "float32", "torch.int16", 3, None)),
        "meta": lambda: rng.choice(({}, {"quantizer": 7}, {"quantizer": ["autogptq:0.8"]}, 7, None, [])),
        "quant_method": lambda: rng.choice(("gptq", "GPTQ", "", None, 7)),
    }.get(name, lambda: rng.choice((True, False, None, 0, 1, "no", [])))()
    folder.settings[name] = value
    return f"setting {name} = {value!r}"


def lie_in_type(folder: Folder, rng: random.Random) -> str:
    dtype = rng.choice((torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32,
                        torch.int64, torch.uint8, torch.bool))  # fmt: skip
    names = _some(folder, rng)
    for name in names:
        folder.tensors[name] = folder.tensors[name].to(dtype)
    return f"{_shown(names)} as {dtype}"


def lie_in_shape(folder: Folder, rng: random.Random) -> str:
    names, how = _some(folder, rng), rng.choice(("cut", "cut end", "double", "transpose", "flat", "rank", "empty", "pad", "swap"))
    along = rng.randrange(2)
    for name in names:
        old = folder.tensors[name]
        if not old.numel():
            continue
        folder.tensors[name] = _reshaped(old, min(along, old.dim() - 1), how).clone()
    return f"{_shown(names)}: {how} {along}"


def _reshaped(old: Tensor, dim: int, how: str) -> Tensor:
    return {
        "cut": lambda: old.narrow(dim, 0, max(1, old.shape[dim] // 2)),
        "cut end": lambda: old.narrow(dim, 0, max(0, old.shape[dim] - 1)),
        "double": lambda: torch.cat([old, old], dim),
        "transpose": lambda: old.T if old.dim() == 2 else old,
        "flat": lambda: old.reshape(-1),
        "rank": lambda: old[None],
        "empty": lambda: old.reshape(-1)[:0],
        "pad": lambda: torch.cat([old, old.narrow(dim, 0, 1)], dim),
        "swap": lambda: old.reshape(old.shape[::-1]),
    }[how]()  # fmt: skip


def lie_by_leaving_out(folder: Folder, rng: random.Random) -> str:
    names = _some(folder, rng)
    for name in names:
        del folder.tensors[name]
    return f"without {_shown(names)}"


def lie_by_adding(folder: Folder, rng: random.Random) -> str:
    some = rng.choice(sorted(folder.tensors))
    layer = rng.choice(folder.packed or [some])
    new = rng.choice((
        f"{some}.more", re.sub(r"\.(\d+)\.", ".7.", some), "lm_head.weight", "lm_head.weight", "lm_head.weight", "lm_head.bias",
        f"{layer}.bias", f"{layer}.bias", f"{layer}.weight", "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.embed_tokens.weight",
    ))  # fmt: skip
    if new.endswith(".bias") and ".experts." in new:
        new = f"{some}.more"  # a bias of one expert is used as it stands there, but the twin's experts have no place for it
    k, n = folder.config.get("hidden_size", 64), folder.config.get("vocab_size", 64)
    shape = (
        (n, k) if new == "lm_head.weight" and isinstance(n, int) and isinstance(k, int) and 0 < n < 999 and 0 < k < 999 else None
    )
    if new.endswith(".bias") and f"{layer}.scales" in folder.tensors:
        shape = tuple(folder.tensors[f"{layer}.scales"].shape[-1:])
    folder.tensors[new] = torch.randn(shape or tuple(folder.tensors[some].shape)).half()
    return f"more: {new} {list(folder.tensors[new].shape)}"


def lie_in_order(folder: Folder, rng: random.Random) -> str:
    names = [name for name in folder.tensors if name.endswith(".g_idx") and folder.tensors[name].numel()]
    if not names:
        return ""
    names = names if rng.random() < 0.4 else [rng.choice(names)]
    how = rng.choice(("zeros", "one", "reversed", "negative", "too large", "random", "shuffled", "shifted", "last", "words"))
    for name in names:
        folder.tensors[name] = _misordered(folder.tensors[name].clone(), how)
    return f"{_shown(names)}: {how}"


def _misordered(old: Tensor, how: str) -> Tensor:
    return {
        "zeros": lambda: old * 0,
        "one": lambda: torch.full_like(old, int(old.max())),
        "reversed": lambda: old.flip(0),
        "negative": lambda: -old - 1,
        "too large": lambda: old + 100,
        "random": lambda: torch.randint(0, int(old.max()) + 1, old.shape).int(),
        "shuffled": lambda: old[torch.randperm(old.numel())],
        "shifted": lambda: old + 1,
        "last": lambda: old.index_fill(0, torch.tensor([old.numel() - 1]), 2**31 - 1),
        "words": lambda: old.long() + (1 << 40),
    }[how]()  # fmt: skip


def lie_in_file(folder: Folder, rng: random.Random) -> str:
    folder.cut_bytes = rng.choice((1, 2, 7, 100, 4000, 10**9))
    return f"cut by {folder.cut_bytes} bytes"


def lie_in_head(folder: Folder, rng: random.Random) -> str:
    """What is said of the output layer, and what is there."""
    name = "embed_out" if folder.kind == "gpt_neox" else "lm_head"
    hidden = folder.config.get("hidden_size", folder.config.get("n_embd"))
    rows = folder.config.get("vocab_size")
    how = rng.choice(("tied", "untied", "present", "packed", "absent", "same"))
    if not (_is_size(hidden) and _is_size(rows)):
        how = "absent"
    if how in ("tied", "untied"):
        folder.config["tie_word_embeddings"] = how == "tied"
    elif how in ("absent", "packed", "present", "same"):
        folder.tensors.pop(f"{name}.weight", None)
    if how == "present":
        folder.config["tie_word_embeddings"] = True
        folder.tensors[f"{name}.weight"] = torch.randn(rows, hidden).half()
    embedding = next(
        (each for each in folder.tensors if re.search(r"(embed_tokens|wte|embed_in|word_embeddings)\.weight$", each)), ""
    )
    if how == "same" and embedding:
        folder.config["tie_word_embeddings"] = True
        folder.tensors[f"{name}.weight"] = folder.tensors[embedding].clone()
    if how == "packed":
        bits = folder.settings["bits"] if folder.settings.get("bits") in (2, 3, 4, 8) else 4
        form = "gptq_v2" if folder.settings.get("checkpoint_format") == "gptq_v2" else "gptq"
        layer = packed(rng, hidden, rows, bits, 32, False, True, form)
        folder.tensors |= {f"{name}.{part}": each for part, each in layer.items()}
    return f"head {how}"


LIES: tuple[Callable[[Folder, random.Random], str], ...] = (
    lie_in_config, lie_in_config, lie_in_config, lie_in_heads, lie_in_rope, lie_in_rope, lie_in_settings, lie_in_settings,
    lie_in_type, lie_in_type, lie_in_shape, lie_in_shape, lie_by_leaving_out, lie_by_adding, lie_in_order, lie_in_order,
    lie_in_head, lie_in_file,
)  # fmt: skip


def lying(seed: int, number: int) -> Folder:
    """The folder of one number of a run: one in ten tells the truth, the others lie once, twice or three times."""
    rng = random.Random(f"{seed}-{number}")
    folder = honest(rng)
    torch.manual_seed(rng.randrange(1 << 30))
    for _ in range(0 if number % 10 == 9 else rng.choice((1, 1, 1, 2, 3))):
        lie = rng.choice(LIES)
        if lie is lie_in_file and rng.random() < 0.7:
            lie = lie_in_config
        with suppress(RuntimeError, IndexError, ValueError, TypeError, KeyError):  # it cannot be told after those before it
            if said := lie(folder, rng):
                folder.lies.append(said)
    return folder


def _some(folder: Folder, rng: random.Random) -> list[str]:
    """Names of one tensor, of one part of every layer, or of one layer."""
    names = sorted(folder.tensors)
    if not names:
        return []
    name = rng.choice(names)
    if rng.random() < 0.35:
        return [each for each in names if each.rpartition(".")[2] == name.rpartition(".")[2] and rng.random() < 2]
    if rng.random() < 0.2:
        return [each for each in names if each.rpartition(".")[0] == name.rpartition(".")[0]]
    return [name]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 999


def _shown(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else "nothing"
