"""AWQ and compressed-tensors folders: written here from whole numbers with shifts of their own, equal to the dense twin.

The orders follow AutoAWQ (awq/modules/linear/gemm.py) and compressed-tensors 0.20 (pack_to_int32).
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint

AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]


def numbers(words, bits, dim):
    """The whole numbers of int32 words, low bits first along `dim`."""
    words = np.moveaxis(words.numpy().view(np.uint32), dim, -1)
    parts = np.stack([(words >> np.uint32(bits * at)) & np.uint32(2**bits - 1) for at in range(32 // bits)], -1)
    return np.moveaxis(parts.reshape(*words.shape[:-1], -1), -1, dim).astype(np.int64)


def words(values, bits, columns=None):
    """Whole numbers [rows, cols] -> int32 [rows, cols*bits/32]; `columns` names the column of each place of a word."""
    rows = values.shape[0]
    split = values.reshape(rows, -1, 32 // bits).astype(np.uint64)
    out = np.zeros(split.shape[:2], np.uint64)
    for at, column in enumerate(columns or range(32 // bits)):
        out |= split[:, :, column] << np.uint64(bits * at)
    return torch.from_numpy(out.astype(np.uint32).view(np.int32))


def as_awq(name, q, zeros, scales, _g_idx, _bits, _zeros_kind):
    return {
        f"{name}.qweight": words(q, 4, AWQ_COLUMNS),
        f"{name}.qzeros": words(zeros, 4, AWQ_COLUMNS),
        f"{name}.scales": scales,
    }


def as_compressed(name, q, zeros, scales, g_idx, bits, zeros_kind):
    packed = {
        f"{name}.weight_packed": words(q.T, bits),
        f"{name}.weight_scale": scales.T.contiguous(),
        f"{name}.weight_shape": torch.tensor([q.shape[1], q.shape[0]]),
    }
    if zeros_kind == "packed":
        packed[f"{name}.weight_zero_point"] = words(zeros, bits).T.contiguous()
    elif zeros_kind == "int8":
        packed[f"{name}.weight_zero_point"] = torch.from_numpy(np.ascontiguousarray(zeros.T - 2 ** (bits - 1), np.int8))
    if g_idx is not None:
        packed[f"{name}.weight_g_idx"] = g_idx
    return packed


def write(folder, form, settings, bits=4, group=16, sym=True, act_order=False, zeros_kind=""):
    """A tiny model in another format, and its dense twin."""
    twin = tiny.write(folder, bits=bits, group_size=group, form="gptq_v2", sym=sym, act_order=act_order)
    state = load_file(folder / "model.safetensors")
    for name in [key.removesuffix(".qweight") for key in state if key.endswith(".qweight")]:
        q, zeros = numbers(state.pop(f"{name}.qweight"), bits, 0), numbers(state.pop(f"{name}.qzeros"), bits, 1)
        scales, g_idx = state.pop(f"{name}.scales"), state.pop(f"{name}.g_idx", None)
        state |= form(name, q, zeros[:, : q.shape[1]], scales, g_idx if act_order else None, bits, zeros_kind)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "quantize_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return twin


def awq(**other):
    return {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True, **other}


def compressed(bits=4, group=16, sym=True, actorder=None, activations=None, form="pack-quantized"):
    strategy = "channel" if group == -1 else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": strategy, "actorder": actorder}
    weights["group_size"] = None if group == -1 else group
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


def difference(folder, twin):
    packed, _notes = checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map="cpu")
    ids = torch.randint(0, 288, (1, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted, found = twin(ids).logits.double(), packed(ids).logits.double()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("settings", [awq(), {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq",
                                               "bits": 4, "group_size": 16, "sym": False}])  # fmt: skip
def test_awq(settings, tmp_path):
    twin = write(tmp_path / "model", as_awq, settings, sym=False)
    assert LocalModel.read(tmp_path / "model").badge == "AWQ 4-bit g16"
    assert difference(tmp_path / "model", twin) < 1e-5


@pytest.mark.parametrize(
    ("bits", "group", "sym", "act_order", "zeros_kind", "badge"),
    [
        (4, 16, True, False, "", "W4A16 g16"),
        (4, 16, False, False, "packed", "W4A16 g16, asymmetric"),
        (4, 16, False, False, "int8", "W4A16 g16, asymmetric"),
        (4, 16, True, True, "", "W4A16 g16, act-order"),
        (8, -1, True, False, "", "W8A16 channel"),
        (8, 16, False, False, "packed", "W8A16 g16, asymmetric"),
    ],
)
def test_compressed_tensors(bits, group, sym, act_order, zeros_kind, badge, tmp_path):
    settings = compressed(bits, group, sym, "group" if act_order else None)
    twin = write(tmp_path / "model", as_compressed, settings, bits, group, sym, act_order, zeros_kind)
    assert LocalModel.read(tmp_path / "model").badge == f"compressed-tensors {badge}"
    assert difference(tmp_path / "model", twin) < 1e-5


@pytest.mark.parametrize(
    ("form", "settings", "says"),
    [
        (as_awq, awq(bits=3), "3 bits"),
        (as_awq, awq(version="gemv"), "gemv"),
        (as_compressed, compressed(activations={"num_bits": 8}), "activations"),
        (as_compressed, compressed(form="marlin-24"), "marlin-24"),
        (as_compressed, compressed(bits=3), "3 bits"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(form, settings, says, tmp_path):
    write(tmp_path / "model", form, settings)
    model = LocalModel.read(tmp_path / "model")
    assert model.is_foreign and not model.is_packed and says in model.problem
    with pytest.raises(BadCheckpoint, match=says):
        checkpoint.load(model, dtype=torch.float32, device_map="cpu")


def test_tensors_that_do_not_fit_are_incomplete(tmp_path):
    write(tmp_path / "model", as_compressed, compressed())
    state = load_file(tmp_path / "model" / "model.safetensors")
    name = next(key for key in state if key.endswith(".weight_scale"))
    state[name] = state[name][:-1].contiguous()
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    model = LocalModel.read(tmp_path / "model")
    assert model.kind == "incomplete" and "do not fit" in model.problem


PLANES = {3: [2, 1], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1]}


def planar_words(values, bits):
    """Whole numbers [rows, cols] -> int32 [rows*bits/32, cols] of the format gptq_p: of 32 numbers, plane after plane."""
    out = []
    for at in range(0, len(values), 32):
        low = 0
        for width in PLANES.get(bits, [bits]):
            part = (values[at : at + 32] >> low) & (2**width - 1)
            out.append(words(part.T, width).T)
            low += width
    return torch.cat(out).contiguous()


def write_planar(folder, bits, group=16, sym=True, act_order=False, other=None):
    """A tiny model in the format gptq_p, and its dense twin. `other`: bits of its up_proj layers."""
    twin = tiny.write(folder, bits=8, group_size=group, form="gptq_v2", act_order=act_order)
    state, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3)
    for name in [key.removesuffix(".qweight") for key in state if key.endswith(".qweight")]:
        width = other if other and "up_proj" in name else bits
        scales, g_idx = state[f"{name}.scales"].float(), state[f"{name}.g_idx"].long()
        q = torch.randint(0, 2**width, (len(g_idx), scales.shape[1]), generator=generator)
        zeros = torch.full(scales.shape, 2 ** (width - 1))
        if not sym:
            zeros = torch.randint(0, 2**width, scales.shape, generator=generator)
        state[f"{name}.scales"] = (scales * 2 ** (8 - width)).half()
        state[f"{name}.qweight"] = planar_words(q.numpy(), width)
        state[f"{name}.qzeros"] = planar_words(zeros.T.numpy(), width).T.contiguous()
        dense = state[f"{name}.scales"].float()[g_idx] * (q - zeros[g_idx])
        twin.get_submodule(name).weight.data = dense.T.contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    path = folder / "quantize_config.json"
    settings = {**json.loads(path.read_text()), "bits": bits, "checkpoint_format": "gptq_p", "sym": sym}
    path.write_text(json.dumps(settings | ({"dynamic": {"+:.*up_proj.*": {"bits": other}}} if other else {})))
    return twin


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_planar_words_of_these_widths_are_those_of_v2(bits, tmp_path):
    twin = tiny.write(tmp_path / "model", bits=bits, group_size=16, form="gptq_v2", sym=False)
    path = tmp_path / "model" / "quantize_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "checkpoint_format": "gptq_p"}))
    assert difference(tmp_path / "model", twin) < 1e-5


@pytest.mark.parametrize(
    ("bits", "group", "sym", "act_order", "other", "badge"),
    [
        (3, 16, True, False, None, "GPTQ 3-bit, group 16 (gptq_p)"),
        (5, 32, True, True, None, "GPTQ 5-bit, group 32, act-order (gptq_p)"),
        (6, -1, False, False, None, "GPTQ 6-bit, no group, asymmetric (gptq_p)"),
        (7, 16, False, True, None, "GPTQ 7-bit, group 16, act-order, asymmetric (gptq_p)"),
        (4, 16, True, False, 5, "GPTQ 4- and 5-bit, group 16 (gptq_p)"),
    ],
)
def test_planar_words(bits, group, sym, act_order, other, badge, tmp_path):
    twin = write_planar(tmp_path / "model", bits, group, sym, act_order, other)
    assert LocalModel.read(tmp_path / "model").badge == badge
    assert difference(tmp_path / "model", twin) < 1e-5


def test_planar_tensors_that_do_not_fit_are_incomplete(tmp_path):
    write_planar(tmp_path / "model", 5)
    state = load_file(tmp_path / "model" / "model.safetensors")
    name = next(key for key in state if key.endswith(".qweight"))
    state[name] = state[name][:-1].contiguous()
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert LocalModel.read(tmp_path / "model").kind == "incomplete"
