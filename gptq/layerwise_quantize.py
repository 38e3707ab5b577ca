"""Makes GPTQ weights of a model that is larger than the GPU: one decoder layer is on the device at a time.

The calibration text goes through the unquantised model, layer after layer, and waits between two layers in main memory. So every
configuration shares one pass, and what a layer reads does not depend on what was rounded before it: after a kill, finished
layers are only computed again (their weights are on disk), and the result is the same to the last bit.
"""

import copy
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.errors import BadParameter, LoadFailed
from ..core.quantize_config import QuantizeConfig
from . import bit_packing
from .expert_hessians import mixtures, stacked, unstack
from .gptq_solver import Packed, solve
from .hessians import InputHessians, as_rows
from .hub_names import HubNames
from .quantize import decoder_layers, dense_tensors
from .wanted_layers import check_fits, wanted_layers

_BATCH_TOKENS = 2048  # of calibration text at a time


@dataclass(frozen=True)
class LayerDone:
    """A decoder layer that is on disk, for every configuration."""

    index: int
    count: int  # of decoder layers
    errors: Mapping[str, float]  # branch -> mean of its linear layers' |Ŵx - Wx|² / |Wx|² over the calibration text
    resumed: bool  # an earlier run had made it
    scarce_experts: Mapping[str, int] = field(
        default_factory=dict
    )  # 'mlp.experts.3' -> its tokens: rounded by all of the layer's


Report = Callable[[LayerDone], None]  # what it raises ends the work; it can be resumed


@torch.inference_mode()
def quantize_layers(
    model: Any,  # a transformers causal LM on the CPU, in any float type; its embeddings become fp32
    calibration: Sequence[Sequence[int]],  # token ids, all of one length
    branches: Mapping[str, QuantizeConfig],
    work: Path,  # a folder that is there; one sub-folder for each branch is made in it
    device: torch.device,
    report: Report = lambda done: None,
) -> None:
    """Write `work/BRANCH/layer-00000.safetensors` … with the packed tensors of every decoder layer that is not there yet.

    `work` must belong to this model, this text and these settings. Device memory: one decoder layer and its Hessians in fp32.
    Of a mixture's experts, 2 GiB of Hessians are there at a time, or those of one expert.
    Main memory: the model, and hidden size × 4 bytes for each token of the text; twice that for a mixture.
    Raises LoadFailed for a model that cannot be quantised, BadParameter for a group size that does not divide its layers.
    """
    prefix, decoder = decoder_layers(model)
    linears = wanted_layers(model)
    check_fits(linears, branches.values())
    for name in branches:
        (work / name).mkdir(exist_ok=True)
    batches, calls = _start(model, prefix, decoder, calibration)
    count = len(decoder)
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
        with InputHessians({} if resumed else inside) as collected:
            for at, hidden in enumerate(batches):
                collected.start_batch()
                args, kwargs = _to(calls[len(hidden)][index], device)
                output = layer(hidden.to(device), *args, **kwargs)
                batches[at] = (output[0] if isinstance(output, tuple) else output).cpu()
        if not resumed:
            for mixture in mixed:
                mixture.rest()
            scarce = {
                f"{mixture.name.removeprefix(start)}.{at}": count for mixture in mixed for at, count in mixture.scarce().items()
            }
            of_experts = itertools.chain.from_iterable(mixture.groups(device) for mixture in mixed)
            _solve_layer(packed, itertools.chain(collected.groups(), of_experts), branches, files, scarce)
        facts = {name: _facts(path) for name, path in files.items()}
        errors = {name: error for name, (error, _scarce) in facts.items()}
        report(LayerDone(index, count, errors, resumed, next(iter(facts.values()))[1]))


def layer_file(folder: Path, index: int) -> Path:
    """Where the packed tensors of a decoder layer are while a model is being made."""
    return folder / f"layer-{index:05}.safetensors"


def write_weights(model: Any, work: Path, path: Path) -> list[list[str]]:
    """Join a branch's layers (in the folder `work`) and what stays in fp16 into one safetensors file at `path`.

    Returns what readers must know of a mixture, whose routers stay dense: the names of the packed layers inside a decoder layer,
    as `modules_in_block_to_quantize` lists them. Empty for other models.
    """
    prefix, decoder = decoder_layers(model)
    tensors: dict[str, Tensor] = {}
    for index in range(len(decoder)):
        with safe_open(layer_file(work, index), framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    packed = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    experts = {f"{owner}.{name}" for owner, each in stacked(model).items() for name, _part in each.named_parameters()}
    names = HubNames(model)
    layers = {name: names.layer(name) for name in packed}
    tensors = {f"{layers[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": each for name, each in tensors.items()}
    dense = {names.key(name): each for name, each in dense_tensors(model, packed | experts).items()}
    save_file(tensors | dense, path, metadata={"format": "pt"})
    if not any(".experts." in name for name in packed):
        return []
    inside = {re.sub(rf"^{re.escape(prefix)}\.\d+\.", "", name) for name in layers.values()}
    return [[name] for name in sorted(inside)]


# --- from text to the first layer ------------------------------------------------------------------

_Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a decoder layer receives beside the hidden states


def _start(
    model: Any, prefix: str, decoder: nn.ModuleList, calibration: Sequence[Sequence[int]]
) -> tuple[list[Tensor], dict[int, list[_Call]]]:
    """(hidden states [batch, tokens, hidden] before the first layer, batch size -> what each layer receives beside them)."""
    if not calibration or len({len(each) for each in calibration}) != 1:
        raise BadParameter("The calibration text has no sample, or samples of several lengths. Give a longer text.")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not name.startswith(f"{prefix}.") and tensor.is_floating_point() and not name.startswith("lm_head"):
            tensor.data = tensor.data.float()
    step = max(1, _BATCH_TOKENS // len(calibration[0]))
    hidden: list[Tensor] = []
    calls: dict[int, list[_Call]] = {}
    for at in range(0, len(calibration), step):
        batch = torch.tensor([list(each) for each in calibration[at : at + step]])
        first, received = _trace(model, decoder, batch)
        hidden.append(first)
        if _differ(calls.setdefault(len(batch), received), received):
            raise LoadFailed(
                "Each layer of this model reads the text itself; it cannot be quantised layer by layer. Choose another model."
            )
    return hidden, calls


def _trace(model: Any, decoder: nn.ModuleList, ids: Tensor) -> tuple[Tensor, list[_Call]]:
    """Run the model with layers that only note what they receive."""
    hidden: list[Tensor] = []
    calls: list[_Call] = []

    def stand_in(layer: nn.Module) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            if not args:
                args = (kwargs.pop("hidden_states"),)
            hidden.append(args[0])
            calls.append((args[1:], kwargs))
            return _Same(args[0])

        return note

    try:
        for layer in decoder:
            layer.forward = stand_in(layer)
        model.base_model(input_ids=ids, use_cache=False)
    finally:
        for layer in decoder:
            del layer.forward
    if len(calls) != len(decoder):
        raise LoadFailed(
            "The model does not run its decoder layers one after the other; it cannot be quantised layer by layer. "
            "Choose another model."
        )
    return hidden[0], calls


class _Same(Tensor):
    """Hidden states as a layer returns them: some models take the tensor, others its [0], as of a tuple."""

    @staticmethod
    def __new__(cls, hidden: Tensor) -> "_Same":
        return hidden.as_subclass(cls)

    def __getitem__(self, at: Any) -> Any:
        return self if isinstance(at, int) and at == 0 else super().__getitem__(at)


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return not (isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other))
    if isinstance(one, (tuple, list)):
        return len(one) != len(other) or any(_differ(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() != other.keys() or any(_differ(one[key], other[key]) for key in one)
    return False


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.as_subclass(Tensor).to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_to(each, device) for each in value)
    if isinstance(value, dict):
        return {key: _to(each, device) for key, each in value.items()}
    return value


# --- one layer --------------------------------------------------------------------------------------


def _solve_layer(
    linears: Mapping[str, nn.Module],
    groups: Iterable[tuple[list[str], Tensor]],
    branches: Mapping[str, QuantizeConfig],
    files: Mapping[str, Path],
    scarce_experts: Mapping[str, int],
) -> None:
    packed: dict[str, dict[str, Tensor]] = {branch: {} for branch in branches}
    errors: dict[str, list[float]] = {branch: [] for branch in branches}
    for names, hessian in groups:
        weights = [as_rows(linears[name]) for name in names]
        for (branch, config), results in zip(branches.items(), solve(weights, hessian, list(branches.values())), strict=True):
            for name, weight, result in zip(names, weights, results, strict=True):
                packed[branch] |= {f"{name}.{field}": value.cpu().contiguous() for field, value in vars(result).items()}
                errors[branch].append(output_error(weight, hessian, result, config))
    for branch, path in files.items():
        mean = sum(errors[branch]) / max(1, len(errors[branch]))
        draft = path.with_suffix(".partial")
        save_file(packed[branch], draft, metadata={"error": json.dumps([mean, scarce_experts] if scarce_experts else mean)})
        os.replace(draft, path)


def output_error(weight: Tensor, hessian: Tensor, packed: Packed, config: QuantizeConfig) -> float:
    """|Ŵx - Wx|² / |Wx|² over the text of `hessian` [K, K]; weight [K, N]."""
    parts = (packed.qweight, packed.qzeros, packed.scales, packed.g_idx)
    dense = bit_packing.dequantize(*parts, config.bits, config.checkpoint_format, torch.float32)  # [K, N]
    wrong = dense - weight.float()
    size = float((weight.float() * (hessian @ weight.float())).sum())
    return float((wrong * (hessian @ wrong)).sum()) / size if size > 0 else 0.0


def _facts(path: Path) -> tuple[float, dict[str, int]]:
    """(error of a layer, its scarce_experts): one entry, because safetensors writes several in any order."""
    with safe_open(path, framework="pt") as file:
        found = json.loads(file.metadata()["error"])
    return (found[0], found[1]) if isinstance(found, list) else (found, {})
