"""Makes GPTQ models: Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ: Accurate Post-Training
Quantization for Generative Pre-trained Transformers" (arXiv 2210.17323, section 3 and algorithm 1),
written to folders in AutoGPTQ's layout.

Every input row of a layer is rounded in turn, and its rounding error is taken back by the rows that
are not rounded yet, as the Hessian of the calibration text says. Act-order, from the authors' code,
takes rows by falling diag(H); groups are formed in that order, so g_idx comes out shuffled.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.errors import LoadFailed
from ..core.quantize_config import QuantizeConfig
from . import pack

_BLOCK = 32  # rows between two updates of all rows behind them (algorithm 1's B); less work stays in the cache
_HESSIAN_BYTES = 2 << 30  # of Hessians at a time; a larger model is run through once for every such part
_FEW_BITS = 4  # with so few numbers it pays to choose a group's scale with care: the best of _SHARES of its range
_SHARES = (1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_BATCH_TOKENS = 1024  # of calibration text at a time

ProgressCallback = Callable[[float, str], None]  # share done 0 … 1, what is being done; what it raises ends the work


@dataclass(frozen=True)
class Packed:
    """The tensors of one layer as a file holds them; shapes as in pack.py."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor


def quantize_linear(weight: Tensor, hessian: Tensor, config: QuantizeConfig) -> Packed:
    """weight [N, K] as nn.Linear holds it, hessian [K, K] = sum of x xᵀ over its inputs (any factor)."""
    return _quantize([weight.T], hessian, [config])[0][0]


def quantize_model(
    model: Any,  # a transformers causal LM in fp32
    tokenizer: Any,  # its tokenizer, saved into the folders; None if the caller writes it
    calibration: Sequence[Sequence[int]],  # token ids
    configs: Mapping[Path, QuantizeConfig],
    progress: ProgressCallback = lambda share, text: None,
) -> None:
    """Write a GPTQ folder for every configuration; the folders must be there. The model is not changed.

    Packs every Linear and Conv1D inside the decoder layers whose sizes are multiples of 32.
    Hessians are those of the unquantised model, collected once for all configurations; layers that
    read the same input (q, k, v; gate, up) share one and are solved together.
    Raises LoadFailed if the model has no such layers.
    """
    layers = _layers_to_pack(model)
    packed: dict[Path, dict[str, Tensor]] = {folder: {} for folder in configs}
    parts = list(_parts(layers))
    done = 0
    for at, part in enumerate(parts):
        # The two halves of the work take about as long as each other.
        share, before = len(part) / len(layers), done / len(layers)
        reading = f"Reading sample text{f' ({at + 1} of {len(parts)})' if len(parts) > 1 else ''}"
        hessians = _collect(model, part, calibration, functools.partial(_tell, progress, reading, before, share / 2))
        for index, (names, hessian) in enumerate(hessians):
            progress(before + share * (0.5 + index / len(hessians) / 2), f"Rounding weights ({done} of {len(layers)} layers)")
            weights = [_as_rows(layers[name]) for name in names]
            for folder, results in zip(configs, _quantize(weights, hessian, list(configs.values())), strict=True):
                for name, result in zip(names, results, strict=True):
                    packed[folder] |= {f"{name}.{field}": value for field, value in vars(result).items()}
            done += len(names)
    for folder, config in configs.items():
        progress(1.0, "Writing the files")
        _write(model, tokenizer, packed[folder], layers, folder, config)


def _tell(progress: ProgressCallback, text: str, before: float, share: float, done: float) -> None:
    progress(before + share * done, text)


# --- the layers of a model -----------------------------------------------------------------------


def _layers_to_pack(model: nn.Module) -> dict[str, nn.Module]:
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found: dict[str, nn.Module] = {}
    if lists:  # the decoder layers are the list that holds most of the model; experts are lists inside it
        prefix, decoder = max(lists, key=lambda each: sum(p.numel() for p in each[1].parameters()))
        for name, module in decoder.named_modules():
            if _is_linear(module) and all(size % 32 == 0 for size in module.weight.shape):
                found[f"{prefix}.{name}"] = module
    if not found:
        raise LoadFailed(f"{type(model).__name__} has no linear layers inside decoder layers; it cannot be quantised.")
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _as_rows(module: nn.Module) -> Tensor:
    """The weight [K, N], input rows first: a Conv1D holds it so, an nn.Linear its transpose."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(module, nn.Linear) else weight


def _parts(layers: Mapping[str, nn.Module]) -> Iterable[dict[str, nn.Module]]:
    part: dict[str, nn.Module] = {}
    size_bytes = 0
    for name, module in layers.items():
        needs = 4 * _as_rows(module).shape[0] ** 2
        if part and size_bytes + needs > _HESSIAN_BYTES:
            yield part
            part, size_bytes = {}, 0
        part[name] = module
        size_bytes += needs
    yield part


# --- Hessians ------------------------------------------------------------------------------------


@torch.inference_mode()
def _collect(
    model: Any, layers: Mapping[str, nn.Module], calibration: Sequence[Sequence[int]], progress: Callable[[float], None]
) -> list[tuple[list[str], Tensor]]:
    """(names of the layers that share an input, Hessian fp32 [K, K] of that input), over all of the text."""
    hessians: dict[str, Tensor] = {}
    shared: dict[str, str] = {}  # layer -> the first layer with the same input
    seen: list[tuple[Tensor, str]] = []  # inputs of one run, kept so that identity means something

    def hook(name: str) -> Callable[..., None]:
        def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            first = next((other for tensor, other in seen if tensor is x), None)
            if first is not None and name not in hessians:
                shared[name] = first
                return
            seen[:] = [*seen[-1:], (x, name)]  # an input is shared by layers that run one after the other
            rows = x.reshape(-1, x.shape[-1]).float()  # [tokens, K]
            if name not in hessians:
                hessians[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            hessians[name].addmm_(rows.T, rows)

        return collect

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    device = model.get_input_embeddings().weight.device
    try:
        batches = list(_batches(calibration))
        for at, batch in enumerate(batches):
            progress(at / len(batches))
            seen.clear()
            model.base_model(input_ids=torch.tensor(batch, device=device), use_cache=False)  # no logits: they are not needed
    finally:
        for each in hooks:
            each.remove()
    groups: dict[str, list[str]] = {}
    for name, module in layers.items():
        groups.setdefault(shared.get(name, name), []).append(name)
        if shared.get(name, name) not in hessians:  # an expert that no token reached: every input counts the same
            hessians[name] = torch.eye(_as_rows(module).shape[0])
    return [(names, hessians[first]) for first, names in groups.items()]


def _batches(calibration: Sequence[Sequence[int]]) -> Iterable[list[list[int]]]:
    """Texts of one length together, so that nothing has to be padded."""
    by_length: dict[int, list[list[int]]] = {}
    for ids in calibration:
        by_length.setdefault(len(ids), []).append(list(ids))
    for length, texts in by_length.items():
        step = max(1, _BATCH_TOKENS // max(1, length))
        yield from (texts[at : at + step] for at in range(0, len(texts), step))


# --- algorithm 1 ---------------------------------------------------------------------------------


@torch.inference_mode()
def _quantize(weights: Sequence[Tensor], hessian: Tensor, configs: Sequence[QuantizeConfig]) -> list[list[Packed]]:
    """weights [K, N] each, of one input -> for each configuration, for each weight, its tensors.

    All that share order and damping are solved side by side, as columns of one matrix: the loop
    over rows, which costs most, is then run once.
    """
    widths = [weight.shape[1] for weight in weights]
    results: dict[int, list[Packed]] = {}
    alike: dict[tuple[bool, float], list[int]] = {}
    for at, config in enumerate(configs):
        alike.setdefault((config.desc_act, _damp(config)), []).append(at)
    for (act_order, damp), members in alike.items():
        order, factor, dead = _factor(hessian, act_order, damp)
        rows = torch.cat(list(weights), dim=1).float()  # [K, sum of N]
        rows[dead] = 0
        rows = rows[order].repeat(1, len(members))
        targets = [_Target.of(configs[at], len(order), sum(widths), place) for place, at in enumerate(members)]
        q = _round_rows(rows, factor, targets)
        undo = order.argsort()
        for at, target in zip(members, targets, strict=True):
            g_idx = pack.default_g_idx(len(order), configs[at].group_size, rows.device)[undo]
            values = q[:, target.columns][undo]  # uint8 [K, sum of N]
            whole = (values, torch.stack(target.zeros), torch.stack(target.scales))
            pieces = zip(*(each.split(widths, dim=1) for each in whole), strict=True)
            results[at] = [_pack(q_, zeros, scales, g_idx, configs[at]) for q_, zeros, scales in pieces]
    return [results[at] for at in range(len(configs))]


def _damp(config: QuantizeConfig) -> float:
    return 0.01 if config.damp_percent is None else config.damp_percent


def _pack(values: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, config: QuantizeConfig) -> Packed:
    stored = pack.zeros_to_stored(zeros.to(torch.int32), config.bits, config.checkpoint_format)
    return Packed(
        qweight=pack.pack(values, config.bits),
        qzeros=pack.pack_columns(stored, config.bits),
        scales=scales.half().contiguous(),
        g_idx=g_idx.clone(),  # layers with one input have the same, and a file holds no tensor twice
    )


def _factor(hessian: Tensor, act_order: bool, damp_percent: float) -> tuple[Tensor, Tensor, Tensor]:
    """(order of the rows [K], upper Cholesky factor of the damped inverse in that order [K, K], dead rows bool [K])."""
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0  # inputs that are always zero
    diagonal[dead] = 1
    order = diagonal.argsort(descending=True) if act_order else torch.arange(len(diagonal), device=hessian.device)
    hessian = hessian[order][:, order]
    mean = float(hessian.diagonal().mean())
    unit = torch.eye(len(order), device=hessian.device)
    for damp in (damp_percent, damp_percent * 10 + 0.01, 1.0):  # more if rounding made it indefinite
        # H = R Rᵀ with R upper (a Cholesky factor read backwards), so H⁻¹ = Uᵀ U with U = R⁻¹: one inverse is saved.
        lower, failed = torch.linalg.cholesky_ex((hessian + unit * (damp * mean)).flip(0, 1))
        if not failed:
            return order, torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True), dead
    raise LoadFailed("The sample text gave no usable statistics for a layer (NaN or infinity in the model's activations).")


@dataclass
class _Target:
    """One configuration's columns while they are being rounded, and the groups it has so far."""

    columns: slice
    group_rows: int
    bits: int
    sym: bool
    lowest_zero: int
    scales: list[Tensor] = dataclasses.field(default_factory=list)  # [N] for each group
    zeros: list[Tensor] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, config: QuantizeConfig, rows: int, width: int, place: int) -> "_Target":
        # Format gptq stores zero - 1, and some readers do not let the sum wrap: no zero of 0 there.
        lowest = 1 if config.checkpoint_format == "gptq" else 0
        group_rows = rows if config.group_size == -1 else config.group_size
        return cls(slice(place * width, (place + 1) * width), group_rows, config.bits, config.sym, lowest)

    def start_group(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Choose scale and zero [N] of a group from its weights [rows, N] as they are now."""
        low, high = rows.amin(0).clamp_(max=0), rows.amax(0).clamp_(min=0)
        scale, zero = self._spread(low, high)
        if self.bits <= _FEW_BITS:
            top = 2**self.bits - 1
            least = _squared_error(rows, scale, zero, top)
            for share in _SHARES:
                tried_scale, tried_zero = self._spread(low * share, high * share)
                error = _squared_error(rows, tried_scale, tried_zero, top)
                better = error < least
                least = torch.where(better, error, least)
                scale, zero = torch.where(better, tried_scale, scale), torch.where(better, tried_zero, zero)
        self.scales.append(scale)
        self.zeros.append(zero)
        return scale, zero

    def _spread(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and zero [N] that lay the numbers there are over low … high."""
        top = 2**self.bits - 1
        middle = (top + 1) / 2
        if self.sym and self.bits <= _FEW_BITS:
            # There is a number more below the middle than above: the sign of the scale gives it to the largest weight.
            scale = torch.where(high > -low, high, low) / -middle
        elif self.sym:
            scale = torch.maximum(-low, high) * 2 / top
        else:
            scale = (high - low) / top
        scale = scale.half().float()  # as it will be stored
        scale = torch.where(scale == 0, 1.0, scale)  # a group of zeros
        if self.sym:
            return scale, torch.full_like(scale, middle)
        return scale, (-low / scale).round_().clamp_(self.lowest_zero, top)


def _squared_error(rows: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Of plain rounding: rows [R, N], scale and zero [N] -> [N]."""
    rounded = (rows / scale).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(scale)
    return rounded.sub_(rows).square_().sum(0)


def _round_rows(rows: Tensor, factor: Tensor, targets: Sequence[_Target]) -> Tensor:
    """Algorithm 1 on rows [K, N] (overwritten), with every target's own columns -> integers uint8 [K, N]."""
    count, width = rows.shape
    q = torch.empty(count, width, dtype=torch.uint8, device=rows.device)
    scale, zero, value, error = (torch.empty(width, device=rows.device) for _ in range(4))
    top = torch.empty(width, device=rows.device)
    none = torch.zeros(width, device=rows.device)
    for target in targets:
        top[target.columns] = 2**target.bits - 1
    diagonal = factor.diagonal().tolist()
    starts = {at for target in targets for at in range(0, count, target.group_rows)}
    edges = sorted(starts | set(range(0, count, _BLOCK)) | {count})
    for start, end in itertools.pairwise(edges):
        for target in targets:
            if start % target.group_rows == 0:
                group = rows[start : start + target.group_rows, target.columns]
                scale[target.columns], zero[target.columns] = target.start_group(group)
        block = rows[start:end]  # [B, N]
        errors = torch.empty_like(block)
        for at in range(end - start):
            row, error = block[at], errors[at]
            torch.div(row, scale, out=value).add_(zero).round_()
            torch.clamp(value, none, top, out=value)
            q[start + at] = value
            value.sub_(zero).mul_(scale)  # what the rounded row stands for
            torch.sub(row, value, out=error).div_(diagonal[start + at])
            if at + 1 < end - start:
                block[at + 1 :].addr_(factor[start + at, start + at + 1 : end], error, alpha=-1)
        rows[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return q


# --- files ---------------------------------------------------------------------------------------


def _write(
    model: Any, tokenizer: Any, packed: dict[str, Tensor], layers: Mapping[str, nn.Module], folder: Path, config: QuantizeConfig
) -> None:
    """quantize_config.json, gptq_model-4bit-32g.safetensors, config.json without quantization_config: the layout of 2023."""
    name = config.weights_name or f"gptq_model-{config.bits}bit-{config.group_size}g"
    tensors = dict(packed)
    written: set[int] = set()  # a tied tensor is written once, under its first name
    for key, value in model.state_dict().items():
        if key.removesuffix(".weight") in layers or (value.data_ptr() in written and value.numel()):
            continue
        written.add(value.data_ptr())
        tensors[key] = value.half().contiguous() if value.is_floating_point() else value.contiguous()
    save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    _write_json(folder / "quantize_config.json", dataclasses.replace(config, weights_name=name).to_json())
    _write_json(folder / "config.json", _config_json(model))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _config_json(model: Any) -> dict[str, Any]:
    """The model's settings in the words of 2023, which every later version reads."""
    values = model.config.to_diff_dict()
    for key in ("quantization_config", "_name_or_path", "dtype"):
        values.pop(key, None)
    values["architectures"] = [type(model).__name__]
    values["torch_dtype"] = "float16"
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # transformers 5; version 4 would take its default instead
        del values["rope_parameters"]
        values["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            values["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
