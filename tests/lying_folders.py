"""Tiny random GPTQ folders, lies about them, and what each must compute: for tests and benchmarks/lies.py.

A lie changes config.json, the settings of the quantisation, or tensors. A folder with lies is either refused in a sentence,
or loads and gives the logits of its dequantised twin: the model of transformers that the lied config.json describes, with
dense weights that are unpacked here from the lied tensors, by the format alone.
"""

import json
import random
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

FAMILY = ("llama", "mistral", "qwen2", "qwen3", "phi3")
OTHERS = ("gpt_neox", "opt", "gpt2", "falcon", "phi")
WORDS = {torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}
NUMBERS = (0, -1, 1, 2, 3, 5, 7, 16, 17, 24, 48, 63, 80, 256, 10**6, 2**31, 2**63, 10**30, 1.5, 0.0, -0.5, 1e308, float("nan"),
           float("inf"), "64", "", None, True, False, [], [4, 4], {}, {"a": 1})  # fmt: skip
FIELDS = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size", "num_hidden_layers",
    "vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps", "sliding_window", "tie_word_embeddings", "hidden_act",
    "attention_bias", "mlp_bias", "pad_token_id", "bos_token_id", "eos_token_id", "partial_rotary_factor", "model_type",
    "architectures", "max_window_layers", "use_sliding_window", "layer_types", "original_max_position_embeddings",
    "attention_dropout", "initializer_range", "torch_dtype", "n_head", "n_embd", "n_layer", "n_inner", "rotary_pct",
    "num_kv_heads", "ffn_dim", "activation_function", "word_embed_proj_dim", "rotary_dim",
)  # fmt: skip
KINDS_OF_ROPE = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "su", "mrope", "proportional", "none", 7, None)


@dataclass
class Folder:
    """What will be written: two JSON files and the tensors of one weights file."""

    kind: str
    config: dict[str, Any]
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    cut_bytes: int = 0  # taken from the end of the weights
    told: list[str] = field(default_factory=list)  # the lies

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
    kind = kind or (rng.choice(FAMILY) if rng.random() < 0.7 else rng.choice(OTHERS))
    head_dim, keys = rng.choice((16, 16, 32, 48, 8, 24)), rng.choice((1, 2, 3))
    heads = keys * rng.choice((1, 2, 3))
    own = kind in ("llama", "mistral", "qwen3") and rng.random() < 0.4  # a head_dim that is not hidden / heads
    hidden = heads * (rng.choice((8, 16, 32)) if own else head_dim)
    layers, inner, vocabulary = rng.randint(1, 2), 32 * rng.randint(1, 4), rng.randint(40, 300)
    tied = rng.random() < 0.3
    config: dict[str, Any] = {"vocab_size": vocabulary, "max_position_embeddings": 128, "pad_token_id": None}
    config |= {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": tied, "initializer_range": 0.2}
    if kind == "gpt2":
        config |= {"n_positions": 128, "n_embd": hidden, "n_layer": layers, "n_head": heads, "n_inner": inner}
    elif kind == "opt":
        config |= {"hidden_size": hidden, "ffn_dim": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
                   "word_embed_proj_dim": hidden, "pad_token_id": 1}  # fmt: skip
    else:
        config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
    if kind in FAMILY:
        config |= {"num_key_value_heads": keys}
        config |= {"head_dim": head_dim} if own or kind == "qwen3" else {}
        if kind in ("mistral", "phi3"):
            config |= {"sliding_window": rng.choice((None, 5, 17))}
        if rng.random() < 0.3:
            config |= {"rope_scaling": _rope(rng, head_dim, kind)}
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
        if linear and part == "weight" and any(each.isdigit() for each in name.split(".")):
            k, n = value.shape if type(module).__name__ == "Conv1D" else value.shape[::-1]
            tensors |= {f"{owner}.{each}": tensor for each, tensor in packed(rng, k, n, bits, group, ordered, sym, form).items()}
        elif "norm" in name and part == "weight":
            tensors[name] = (torch.rand(value.shape) + 0.5).half()
        else:
            tensors[name] = value.half()
    return Folder(
        kind, json.loads(json.dumps({**config, "model_type": kind, "architectures": [type(model).__name__]})), settings, tensors
    )


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
        "scales": (torch.rand(groups, n, generator=generator) + 0.5).mul(4 / 2**bits / k**0.5).half(),
        "g_idx": g_idx.int(),
    }


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """[rows, count] -> int32 [rows, ceil(count * bits / 32)], a little-endian stream of bits in each row."""
    rows, count = values.shape
    stream = ((values.numpy()[..., None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(rows, count * bits)
    stream = np.pad(stream, ((0, 0), (0, -count * bits % 32)))
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view(np.int32).copy())


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_rows`, from words of any type."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    return torch.from_numpy((stream.reshape(len(stream), count, bits) << np.arange(bits)).sum(-1))


def dequantised(tensors: dict[str, Tensor], name: str, settings: dict[str, Any], likely: list[int]) -> Tensor:
    """The dense weight [N, K] of a layer, from what its tensors are. `likely` bits, the likeliest first, where several fit."""
    words, zeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    order = tensors.get(f"{name}.g_idx")
    word = WORDS[words.dtype]
    (rows, n), groups = words.shape, scales.shape[0]
    fits = fitting(tensors, name)
    bits = next((each for each in likely if each in fits), fits[0])
    k = len(order) if order is not None else rows * word // bits
    claimed = settings.get("group_size")
    size = claimed if isinstance(claimed, int) and claimed > 0 and -(-k // claimed) == groups else -(-k // groups)
    counts = torch.bincount(order.long(), minlength=groups) if order is not None and int(order.min()) >= 0 else None
    if counts is None or (groups > 1 and not (bool((counts[:-1] == counts[0]).all()) and 0 < counts[-1] <= counts[0])):
        order = torch.arange(k) // size  # no order of this kind can be
    q = unpack_rows(words.T, bits, k).T  # [K, N]
    stored = unpack_rows(zeros, bits, n)
    form = settings.get("checkpoint_format", "gptq")
    middle = 2 ** (bits - 1)
    if bool((stored == middle).all()):  # symmetric: the numbers tell the format
        form = "gptq_v2"
    elif bool((stored == middle - 1).all()):
        form = "gptq"
    true = (stored + (1 if form == "gptq" else 0)) & (2**bits - 1)
    at = order.long()
    return ((q - true[at]).float() * scales.float()[at]).T.contiguous()


def fitting(tensors: dict[str, Tensor], name: str) -> list[int]:
    """The bits that a layer's tensors can have."""
    words, zeros, scales, order = (tensors.get(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx"))
    assert words is not None and zeros is not None and scales is not None
    word = WORDS[words.dtype]
    fits = [b for b in (2, 3, 4, 8) if -(-scales.shape[1] * b // word) == zeros.shape[1]]
    if order is not None:
        fits = [b for b in fits if -(-len(order) * b // word) == words.shape[0]] or fits
    return fits


def twin(folder: Folder, path: Path) -> Any:
    """The dense model of the lied files. Raises whatever transformers raises, or ValueError where tensors do not fit."""
    config = AutoConfig.from_pretrained(path)
    config.initializer_range = 0.02  # some lies would stop the making of random weights
    for part in (config, config.get_text_config()):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            given = getattr(part, name, None)
            if isinstance(given, int) and given >= folder.config.get("vocab_size", 0):
                setattr(part, name, None)
    heads = [name for name in folder.tensors if re.fullmatch(r"(lm_head|embed_out)\.q?weight", name)]
    if heads:
        config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {
        name: each.float() for name, each in folder.tensors.items() if not re.search(r"\.(qweight|qzeros|scales|g_idx)$", name)
    }
    modules = dict(model.named_modules())
    counted = [bits for name in folder.packed for bits in fitting(folder.tensors, name)]
    likely = sorted((2, 3, 4, 8), key=lambda bits: (-counted.count(bits), bits != folder.settings.get("bits")))
    for name in folder.packed:
        dense = dequantised(folder.tensors, name, folder.settings, likely)
        state[f"{name}.weight"] = dense.T.contiguous() if type(modules.get(name)).__name__ == "Conv1D" else dense
    if "lm_head" in modules:  # its name in transformers 5
        state = {name.replace("embed_out.", "lm_head."): tensor for name, tensor in state.items()}
    for name in [each for each in state if each.endswith(".bias") and each.removesuffix(".bias") in folder.packed]:
        owner = modules.get(name.removesuffix(".bias"))
        if owner is not None and getattr(owner, "bias", False) is None:  # a bias that config.json does not mention
            owner.bias = torch.nn.Parameter(state[name])
    missing, unexpected = model.load_state_dict({n: t for n, t in state.items() if not n.endswith("inv_freq")}, strict=False)
    missing = [each for each in missing if heads or each not in ("lm_head.weight", "embed_out.weight")]
    absent = [each for each in missing if not (each.endswith(".bias") and each.removesuffix(".bias") in folder.packed)]
    if absent or unexpected:
        raise ValueError(f"missing {absent[:2]}, unexpected {unexpected[:2]}")
    for name in missing:
        model.get_parameter(name).data.zero_()
    return model


# --- lies -----------------------------------------------------------------------------------------------------------------


def _rope(rng: random.Random, head_dim: int, kind: str = "llama") -> dict[str, Any]:
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


def _value(rng: random.Random, now: Any) -> Any:
    if isinstance(now, int) and not isinstance(now, bool) and rng.random() < 0.5:
        return rng.choice((now + 1, now - 1, now * 2, now // 2, now * 3, -now, float(now), str(now)))
    return rng.choice(NUMBERS)


def lie_in_config(folder: Folder, rng: random.Random) -> str:
    known = [each for each in FIELDS if each in folder.config]
    name = rng.choice(known) if rng.random() < 0.75 else rng.choice(FIELDS)
    if name == "model_type":
        value: Any = rng.choice((*FAMILY, *OTHERS, "bert", "nothing", 7))
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
    rope = dict(_rope(rng, rng.choice((16, 32, 48))))
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
                folder.told.append(said)
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
