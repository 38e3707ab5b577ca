"""What a lying folder (lying_folders.py) must compute: the dense model that its config.json describes, with its tensors unpacked
here, by the format alone."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lying_folders import ROLES, WORDS, Folder
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_webui.core.model_claims import EMBEDDINGS

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


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
    sizes = [min(claimed, k)] if isinstance(claimed, int) and claimed > 0 else []
    sizes += [] if k % groups == 0 else [2, 4, 8, 16, 32, 64, 128]
    size = next((each for each in sizes if -(-k // each) == groups), -(-k // groups))
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
    embedded = any(name.endswith(EMBEDDINGS) for name in folder.tensors)
    if heads and (embedded or not getattr(config, "tie_word_embeddings", False)):
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
    if not any("block_sparse_moe" in name for name in modules):  # its name in transformers 5
        state = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in state.items()}
    state = _stacked(_split(state, modules), modules)
    if "lm_head" in modules:  # its name in transformers 5
        state = {name.replace("embed_out.", "lm_head."): tensor for name, tensor in state.items()}
    for name in [each for each in state if each.endswith(".bias") and each.removesuffix(".bias") in folder.packed]:
        owner = modules.get(name.removesuffix(".bias"))
        if owner is not None and getattr(owner, "bias", False) is None:  # a bias that config.json does not mention
            owner.bias = torch.nn.Parameter(state[name])
    if heads and not embedded and config.tie_word_embeddings:
        embedding = next(name for name, each in modules.items() if each is model.get_input_embeddings())
        head = next(name for name in state if name in ("lm_head.weight", "embed_out.weight"))
        state[f"{embedding}.weight"] = state[head]
    missing, unexpected = model.load_state_dict({n: t for n, t in state.items() if not n.endswith("inv_freq")}, strict=False)
    missing = [each for each in missing if heads or each not in ("lm_head.weight", "embed_out.weight")]
    ignored = "|".join(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ["$."])
    unexpected = [each for each in unexpected if not re.search(ignored, each)]
    packed = {name.removesuffix(".weight") for name in state if name.endswith(".weight") and name not in folder.tensors}
    absent = [each for each in missing if not (each.endswith(".bias") and each.removesuffix(".bias") in packed)]
    if absent or unexpected:
        raise ValueError(f"missing {absent[:2]}, unexpected {unexpected[:2]}")
    for name in missing:
        model.get_parameter(name).data.zero_()
    return model


def _split(state: dict[str, Tensor], modules: dict[str, Any]) -> dict[str, Tensor]:
    """Layers that the files hold as one and the model as several, and the reverse."""
    found = dict(state)
    for name in state:
        path, _, part = name.rpartition(".")
        owner, _, own = path.rpartition(".")
        if path in modules or name not in found:
            continue
        parts = [modules.get(f"{owner}.{each}") for each in _FUSED.get(own, ())]
        if parts and all(parts):
            pieces = found.pop(name).split([each.out_features for each in parts])
            found |= {f"{owner}.{each}.{part}": piece for each, piece in zip(_FUSED[own], pieces, strict=True)}
        for fused, names in _FUSED.items():
            keys = [f"{owner}.{each}.{part}" for each in names]
            if own in names and f"{owner}.{fused}" in modules and all(each in found for each in keys):
                found[f"{owner}.{fused}.{part}"] = torch.cat([found.pop(each) for each in keys])
    return found


def _stacked(state: dict[str, Tensor], modules: dict[str, Any]) -> dict[str, Tensor]:
    """The experts' weights in two tensors of three dimensions, where the installed transformers holds them so."""
    for name, module in modules.items():
        if getattr(getattr(module, "gate_up_proj", None), "ndim", 0) != 3:
            continue
        found: dict[str, list[Tensor]] = {}
        for role, names in ROLES.items():
            at = 0
            while expert := next((f"{name}.{at}.{each}.weight" for each in names if f"{name}.{at}.{each}.weight" in state), ""):
                found.setdefault(role, []).append(state.pop(expert))
                at += 1
        gate_up = zip(found.get("gate", ()), found.get("up", ()), strict=True)
        state[f"{name}.gate_up_proj"] = torch.stack([torch.cat(each) for each in gate_up])
        state[f"{name}.down_proj"] = torch.stack(found.get("down", ()))
    return state
