"""The output layer (lm_head) of a model that is quantised layer by layer: packed last, from what the last norm sends into it.

GPTQModel reads such folders (`lm_head: true` in the settings), as our own loader does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BadParameter
from ..core.quantize_config import QuantizeConfig
from .calibration_run import Same
from .gptq_solver import Packed, solve
from .quantize import decoder_layers
from .rounding_error import error_sums

_CHUNK_BYTES = 256 << 20  # of the weights in fp32 that are rounded at a time, all configurations together


def output_layer(model: Any) -> tuple[str, nn.Linear]:
    """Its name and module. Raises BadParameter where there is none that can be packed."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), "")
    if head is None or not name or not isinstance(head, nn.Linear):
        raise BadParameter("The model has no output layer that can be packed. Leave out --lm-head.")
    if any(size % 32 for size in head.weight.shape):
        raise BadParameter(
            f"The output layer is {head.in_features}×{head.out_features}; only multiples of 32 can be packed. "
            "Leave out --lm-head."
        )
    return name, head


def is_tied(model: Any) -> bool:
    """Whether the output layer is the embedding: packed, it is a tensor more."""
    return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@torch.inference_mode()
def head_hessian(
    model: Any,
    calibration: Sequence[Sequence[int]],
    hidden: Sequence[Tensor],  # [batch, tokens, H] behind the last decoder layer, in the text's order
    device: torch.device,
) -> Tensor:
    """fp32 [H, H], of what the output layer receives: the model's own end is run, its decoder layers are passed over."""
    found: list[Tensor] = []
    at = 0
    (_name, head), (_prefix, decoder) = output_layer(model), decoder_layers(model)

    def passed(state: Tensor) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: Same(state)

    def note(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(device).float()
        if not found:
            found.append(torch.zeros(rows.shape[1], rows.shape[1], device=device))
        found[0].addmm_(rows.T, rows)
        return x[..., :1]  # no logits: nobody reads them

    vars(head)["forward"] = note
    try:
        for state in hidden:
            ids = torch.tensor([list(each) for each in calibration[at : at + len(state)]])
            at += len(state)
            for layer in decoder:
                layer.forward = passed(state)
            model(input_ids=ids, use_cache=False)
    finally:
        for module in (head, *decoder):
            vars(module).pop("forward", None)
    return found[0]


def solve_wide(weight: Tensor, hessian: Tensor, configs: Sequence[QuantizeConfig]) -> list[tuple[Packed, float]]:
    """weight [K, N] with any number of outputs -> for each configuration, its tensors and its `output_error`.

    Outputs do not depend on each other, so some are rounded at a time.
    """
    columns = max(1, _CHUNK_BYTES // (4 * weight.shape[0] * len(configs)) // 32) * 32
    parts: list[list[Packed]] = [[] for _ in configs]
    sums = torch.zeros(len(configs), 2, dtype=torch.float64)
    for at in range(0, weight.shape[1], columns):
        piece = weight[:, at : at + columns].to(hessian.device)
        for index, (config, (packed,)) in enumerate(zip(configs, solve([piece], hessian, configs), strict=True)):
            parts[index].append(packed)
            sums[index] += torch.tensor(error_sums(piece, hessian, packed, config), dtype=torch.float64)
    errors = (sums[:, 0] / sums[:, 1].clamp_min(torch.finfo(torch.float64).tiny)).tolist()
    return list(zip(map(_joined, parts), errors, strict=True))


def _joined(parts: Sequence[Packed]) -> Packed:
    joined = {name: torch.cat([getattr(each, name) for each in parts], 1) for name in ("qweight", "qzeros", "scales")}
    return Packed(**joined, g_idx=parts[0].g_idx)


def head_settings(model: Any, config: QuantizeConfig, head: QuantizeConfig) -> dict[str, Any]:
    """What the settings of a folder say of it, in GPTQModel's words."""
    other = {} if config.bits == head.bits else {"dynamic": {output_layer(model)[0]: {"bits": head.bits}}}
    return {"lm_head": True, **other}
