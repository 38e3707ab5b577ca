"""A packed folder of any architecture as a quantising program writes it: names of the Hub, experts one by one.

The folder is made from what transformers' save_pretrained writes, which is in the names of the Hub. Its dense twin, a second
folder, holds the same weights dequantised.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tiny
from gptq_webui.gptq.module_names import splits_of

_LEFT = re.compile(  # what writers leave dense
    r"(^|\.)(gate|router|shared_expert_gate|classifier|b_proj|a_proj|f_a_proj|wg)$|(^|[._])router"
)
_PARTS = re.compile(r"\.(gate|up|q|k|v)_proj\.weight$")
_EXPERTS = re.compile(r"\.experts\.\d+\.[^.]+\.weight$")


def packable(model, state):
    """Name in the files of each layer that is packed (linear layers of the blocks, single experts) -> whether it is a Conv1D."""
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    }
    outputs = {id(each) for each in (model.get_output_embeddings(), model.get_input_embeddings()) if each is not None}
    others = {  # what is no linear layer, by the end of its name and its shape
        (tuple(tensor.shape), name.split(".")[-2])
        for name, tensor in model.state_dict().items()
        if name.endswith(".weight") and name.removesuffix(".weight") not in linear
    }
    shapes = {tuple(each.weight.shape) for each in linear.values()}
    found = {}
    for key, tensor in state.items():
        name = key.removesuffix(".weight")
        if name == key or tensor.dim() != 2 or not any(part.isdigit() for part in name.split(".")) or _LEFT.search(name):
            continue
        module = linear.get(name) or linear.get(next((each for each in linear if each.endswith("." + name)), ""))
        if module is not None and id(module) in outputs:
            continue
        if any(re.search(f"(?:{each.pattern})$", name) for each in splits_of(model)):  # which transformers cuts
            found[name] = False
            continue
        if module is None and not _EXPERTS.search(key) and not _PARTS.search(key):  # transformers has another name for it
            shape, tail = tuple(tensor.shape), name.rpartition(".")[2]
            if shape not in shapes or (shape, tail) in others or any(word in tail for word in ("conv", "norm", "embed", "wte")):
                continue
        found[name] = type(module).__name__ == "Conv1D"
    return found


def split_experts(state):
    """Experts that the Hub holds joined (GPT-OSS and Llama 4 transposed too), one by one as gptqmodel writes them: what is
    called gate is the first half of the joined outputs, whatever they are.

    Returns (joined name -> names of each expert's parts, names of what was transposed)."""
    joined, turned = {}, set()
    for name in [each for each in state if re.search(r"\.experts\.gate_up_proj$", each)]:
        down = name.replace("gate_up", "down")
        if state[name].shape[2] == 2 * state[down].shape[1]:
            turned |= {name, down}
    for name in [each for each in state if re.search(r"\.experts\.(gate_up|down)_proj(_bias)?$", each)]:
        whole = state.pop(name)
        owner, kind = name.rpartition(".")[0], "bias" if name.endswith("_bias") else "weight"
        parts = ("gate_proj", "up_proj") if ".gate_up_proj" in name else ("down_proj",)
        joined[name] = []
        for at, one in enumerate(whole.transpose(1, 2) if name in turned else whole):
            names = [f"{owner}.{at}.{part}.{kind}" for part in parts]
            state.update(zip(names, (each.contiguous() for each in one.chunk(len(parts))), strict=True))
            joined[name].append(names)
    return joined, turned


def split_layers(state, split):
    """`split`: joined name -> (names, widths) of its parts. Returns as split_experts does."""
    joined = {}
    for name in [each for each in state if each.split(".")[-2] in split and each.endswith((".weight", ".bias"))]:
        owner, last, kind = name.rsplit(".", 2)
        names, widths = split[last]
        parts = [f"{owner}.{each}.{kind}" for each in names]
        state.update(zip(parts, (each.contiguous() for each in state.pop(name).split(widths)), strict=True))
        joined[name] = [parts]
    return joined


def write(folder: Path, model, *, bits=4, group_size=16, act_order=True, seed=1, left=lambda name: False, split=None):
    """Writes `folder`/packed and `folder`/dense; returns the names of the packed layers."""
    generator = torch.Generator().manual_seed(seed)
    dense, packed = folder / "dense", folder / "packed"
    model.save_pretrained(dense)
    state = {}
    for path in sorted(dense.glob("*.safetensors")):
        state |= load_file(path)
        path.unlink()
    for path in dense.glob("*.index.json"):
        path.unlink()
    state = {name: tensor.half().float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    joined, turned = split_experts(state)
    if split:
        joined |= split_layers(state, split)
    layers = {name: conv for name, conv in packable(model, state).items() if not left(name)}
    stored = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    for name, conv in layers.items():
        weight = state[f"{name}.weight"]
        rows, columns = weight.shape if conv else weight.shape[::-1]
        if rows % 8 or rows % group_size:
            continue
        padded = -(-columns // 8) * 8
        tensors, matrix = tiny.random_layer(rows, padded, bits, group_size, act_order=act_order, generator=generator)
        for part in ("qweight", "scales"):
            tensors[part] = tensors[part][:, :columns].contiguous()
        tensors["scales"], matrix = tensors["scales"] * 0.5, matrix[:columns] * 0.5
        del stored[f"{name}.weight"]
        stored |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
        state[f"{name}.weight"] = (matrix.T if conv else matrix).contiguous()
    for name, parts in joined.items():
        wholes = [torch.cat([state.pop(part) for part in own], 0) for own in parts]
        whole = torch.stack(wholes) if ".experts." in name else wholes[0]
        state[name] = whole.transpose(1, 2).contiguous() if name in turned else whole
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    packed.mkdir(exist_ok=True)
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    quantize = {"bits": bits, "group_size": group_size, "desc_act": act_order, "sym": True, "quant_method": "gptq"}
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": quantize}))
    return list(layers)
