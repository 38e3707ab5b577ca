"""Makes GPTQ weights of a model that is larger than the GPU: one decoder layer is on the device at a time.

The calibration text goes through the unquantised model, layer after layer, and waits between two layers in main memory. So every
configuration shares one pass, and what a layer reads does not depend on what was rounded before it: after a kill, finished
layers are only computed again (their weights are on disk), and the result is the same to the last bit.
"""

import contextlib
import copy
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.quantize_config import QuantizeConfig
from .calibration_run import Ferry, first_inputs, to_device
from .expert_hessians import linear_experts, mixtures, stacked, unstack
from .gptq_solver import solve
from .hessians import InputHessians, as_rows
from .hub_names import HubNames
from .output_layer import head_hessian, output_layer, solve_wide
from .quantize import as_written, decoder_layers, dense_tensors
from .rounding_error import output_error
from .wanted_layers import Leave, packed_inside, wanted_layers


@dataclass(frozen=True)
class LayerDone:
    """A decoder layer, or the output layer, that is on disk for every configuration."""

    index: int
    count: int  # of such layers
    errors: Mapping[str, float]  # branch -> mean of its linear layers' |Ŵx - Wx|² / |Wx|² over the calibration text
    resumed: bool  # an earlier run had made it
    scarce_experts: Mapping[str, int] = field(
        default_factory=dict
    )  # 'mlp.experts.3' -> its tokens: rounded by all of the layer's
    name: str = ""  # of the output layer, which comes last


Report = Callable[[LayerDone], None]  # what it raises ends the work; it can be resumed


@torch.inference_mode()
def quantize_layers(
    model: Any,  # a transformers causal LM on the CPU, in any float type; its embeddings become fp32
    calibration: Sequence[Sequence[int]],  # token ids, all of one length
    branches: Mapping[str, QuantizeConfig],
    work: Path,  # a folder that is there; one sub-folder for each branch is made in it
    device: torch.device,
    report: Report = lambda done: None,
    heads: Mapping[str, QuantizeConfig] | None = None,  # branch -> how the output layer is packed; None: it stays in 16 bits
    leave: Leave | None = None,
    alone: bool = False,  # nothing else computes in this process
) -> None:
    """Write `work/BRANCH/layer-00000.safetensors` … with the packed tensors of every decoder layer that is not there yet.

    With `heads`, one more file of that kind holds the output layer; what `leave` names is not packed. `work` must belong to this
    model, this text and these settings. Device memory: one decoder layer and its Hessians in fp32.
    Of a mixture's experts, 2 GiB of Hessians are there at a time, or those of one expert.
    Main memory: the model, and hidden size × 4 bytes for each token of the text; twice that for a mixture.
    On a GPU, a process that is `alone` lets tensor cores multiply what the text becomes.
    Raises LoadFailed for a model that cannot be quantised, BadParameter for an output layer that cannot be packed, or a `leave`
    that fits no layer.
    """
    prefix, decoder = decoder_layers(model)
    linears = wanted_layers(model, leave)
    if heads:
        output_layer(model)
    for name in branches:
        (work / name).mkdir(exist_ok=True)
    batches, calls = first_inputs(model, prefix, decoder, calibration)
    count, ferry = len(decoder) + bool(heads), Ferry(device)
    for index, original in enumerate(decoder):
        files = {name: layer_file(work / name, index) for name in branches}
        resumed = all(path.is_file() for path in files.values())
        layer = copy.deepcopy(original).to(device=device, dtype=torch.float32)
        unstack(layer)
        start = f"{prefix}.{index}."
        packed = {f"{start}{name}": module for name, module in layer.named_modules() if f"{start}{name}" in linears}
        mixed = [] if resumed else mixtures(layer, start, packed)
        apart = {name for mixture in mixed for each in mixture.experts for name in each}
        inside = {name: module for name, module in packed.items() if name not in apart}
        for mixture in mixed:
            mixture.watch()
        with InputHessians({} if resumed else inside) as collected, _fast_products(device, alone):
            for hidden in batches:
                collected.start_batch()
                args, kwargs = to_device(calls[len(hidden)][index], device)
                output = layer(ferry.bring(hidden), *args, **kwargs)
                ferry.take(output[0] if isinstance(output, tuple) else output, hidden)
        if not resumed:
            for mixture in mixed:
                mixture.rest()
            scarce = {
                f"{mixture.name.removeprefix(start)}.{at}": count for mixture in mixed for at, count in mixture.scarce().items()
            }
            of_experts = itertools.chain.from_iterable(mixture.groups(device) for mixture in mixed)
            groups = itertools.chain(_one_by_one(collected.groups()), of_experts)
            _solve_layer(packed, groups, branches, files, scarce, keep=bool(mixed))
        facts = {name: _facts(path) for name, path in files.items()}
        errors = {name: error for name, (error, _scarce) in facts.items()}
        report(LayerDone(index, count, errors, resumed, next(iter(facts.values()))[1]))
    if heads:
        _pack_head(model, lambda: head_hessian(model, calibration, batches, device), heads, work, len(decoder), report)


def _pack_head(
    model: Any, hessian: Callable[[], Tensor], heads: Mapping[str, QuantizeConfig], work: Path, index: int, report: Report
) -> None:
    files = {name: layer_file(work / name, index) for name in heads}
    name, head = output_layer(model)
    if not (resumed := all(path.is_file() for path in files.values())):
        results = solve_wide(as_rows(head), hessian(), list(heads.values()))
        for path, (packed, error) in zip(files.values(), results, strict=True):
            _save(path, {f"{name}.{part}": value.cpu().contiguous() for part, value in vars(packed).items()}, error)
    errors = {branch: _facts(path)[0] for branch, path in files.items()}
    report(LayerDone(index, index + 1, errors, resumed, name=name))


def layer_file(folder: Path, index: int) -> Path:
    """Where the packed tensors of a decoder layer are while a model is being made."""
    return folder / f"layer-{index:05}.safetensors"


def write_weights(model: Any, work: Path, path: Path) -> list[list[str]]:
    """Join a branch's layers (in the folder `work`) and what stays in fp16 into one safetensors file at `path`.

    Returns what readers must know where a linear layer of the decoder stays dense, as routers do: the names of the packed layers,
    as `modules_in_block_to_quantize` lists them. Empty for other models.
    """
    prefix, decoder = decoder_layers(model)
    tensors: dict[str, Tensor] = {}
    for each in sorted(work.glob("layer-*.safetensors")):
        with safe_open(each, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    packed = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    experts = {f"{owner}.{name}" for owner, each in stacked(model).items() for name, _part in each.named_parameters()}
    names = HubNames(model)
    layers = {name: names.layer(name) for name in packed}
    tensors = {f"{layers[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": each for name, each in tensors.items()}
    dense = {names.key(name): each for name, each in dense_tensors(model, packed | experts).items()}
    left = {
        f"{prefix}.{name}"
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    } - packed
    for owner, module in stacked(model).items():
        for own, each in linear_experts(module).named_modules():
            if isinstance(each, nn.Linear) and (name := f"{owner}.{own}") not in packed:
                left.add(name)
                dense[f"{names.layer(name)}.weight"] = as_written(each.weight).clone()  # safetensors takes no views of one memory
    save_file(tensors | dense, path, metadata={"format": "pt"})
    return packed_inside(model, layers.values(), [names.layer(name) for name in left])


# --- one layer --------------------------------------------------------------------------------------


def _solve_layer(
    linears: Mapping[str, nn.Module],
    groups: Iterable[tuple[list[str], Tensor]],
    branches: Mapping[str, QuantizeConfig],
    files: Mapping[str, Path],
    scarce_experts: Mapping[str, int],
    keep: bool,  # the weights are needed afterwards; else each is given up as soon as it is packed
) -> None:
    packed: dict[str, dict[str, Tensor]] = {branch: {} for branch in branches}
    errors: dict[str, list[float]] = {branch: [] for branch in branches}
    for names, hessian in groups:
        weights = [as_rows(linears[name]) for name in names]
        for (branch, config), results in zip(branches.items(), solve(weights, hessian, list(branches.values())), strict=True):
            for name, weight, result in zip(names, weights, results, strict=True):
                packed[branch] |= {f"{name}.{field}": value.cpu().contiguous() for field, value in vars(result).items()}
                errors[branch].append(output_error(weight, hessian, result, config))
        del weights, weight, hessian
        for name in () if keep else names:
            linears[name].register_parameter("weight", None)
    for branch, path in files.items():
        mean = sum(errors[branch]) / max(1, len(errors[branch]))
        _save(path, packed[branch], [mean, scarce_experts] if scarce_experts else mean)


def _one_by_one(groups: list[tuple[list[str], Tensor]]) -> Iterator[tuple[list[str], Tensor]]:
    """The same; each Hessian is given up with the next."""
    while groups:
        yield groups.pop(0)


@contextlib.contextmanager
def _fast_products(device: torch.device, alone: bool) -> Iterator[None]:
    """Products on a GPU from numbers of 10 bits behind the point, as fp16 has them, with sums in fp32.

    Torch has this for the whole process only, not for a product or a thread: what a model that answers beside it computes in fp32
    (the angles of its positions) would be rounded, too. So only a process that is `alone` has it.
    """
    if not alone or device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _save(path: Path, tensors: dict[str, Tensor], error: Any) -> None:
    draft = path.with_suffix(".partial")
    save_file(tensors, draft, metadata={"error": json.dumps(error)})
    os.replace(draft, path)


def _facts(path: Path) -> tuple[float, dict[str, int]]:
    """(error of a layer, its scarce_experts): one entry, because safetensors writes several in any order."""
    with safe_open(path, framework="pt") as file:
        found = json.loads(file.metadata()["error"])
    return (found[0], found[1]) if isinstance(found, list) else (found, {})
