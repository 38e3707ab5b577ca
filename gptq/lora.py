"""LoRA adapters (folders of the library PEFT) over layers of any kind, packed ones too: y += scale · B(A x).

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685, section 4.1). The adapter is
added beside a layer, never into its weights, so packed weights stay packed.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.errors import BadCheckpoint
from ..core.folder_files import read_json

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


Part = tuple[nn.Module, Tensor, Tensor]  # a layer, A [rank, K], scale · B [N, rank]


def beside(folder: Path) -> dict[str, Path]:
    """Name -> folder of every adapter in the same folder as a model's `folder`, whether it fits or not."""
    try:
        found = [each for each in folder.parent.iterdir() if (each / "adapter_config.json").is_file()]
    except OSError:
        return {}
    return {each.name: each for each in sorted(found) if not (each / "config.json").exists()}


def attach(model: nn.Module, folder: Path) -> int:
    """Add the adapter in `folder` to a model; returns how many layers it changes. Nothing is changed if it raises.

    Raises BadCheckpoint as `read` does.
    """
    parts = read(model, folder)
    for module, inner, outer in parts.values():
        module.register_forward_hook(_adding(inner, outer))
    return len(parts)


def read(model: nn.Module, folder: Path) -> dict[str, Part]:
    """The adapter in `folder`, by the names of the model's layers that it changes.

    Raises BadCheckpoint if the folder is no PEFT adapter, is of a kind that is not supported (DoRA, trained biases or whole
    modules), or does not fit the model.
    """
    config = read_json(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    if config.get("peft_type") != "LORA" or not file.is_file():
        raise BadCheckpoint(
            f"{folder} is not a LoRA adapter: it needs an adapter_config.json that says LORA, and an adapter_model.safetensors."
        )
    if config.get("use_dora") or config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise BadCheckpoint(
            f"The adapter {folder.name} changes more than LoRA does (DoRA, biases, whole modules). Choose another adapter."
        )
    tensors = load_file(file)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        found = _KEY.fullmatch(key)
        if not found:
            raise BadCheckpoint(
                f"The adapter {folder.name} holds {key}, which is no part of LoRA on a linear layer. Choose another adapter."
            )
        pairs.setdefault(found[1], {})[found[2]] = value
    modules = dict(model.named_modules())
    ready: dict[str, Part] = {}
    for name, pair in pairs.items():
        module = modules.get(name)
        inner, outer = pair.get("A"), pair.get("B")  # [rank, K], [N, rank]
        sizes = _sizes(module)
        if module is None or inner is None or outer is None or (inner.shape[1], outer.shape[0]) != sizes:
            raise BadCheckpoint(
                f"The adapter {folder.name} does not fit at {name}: it is for another base model. "
                "Load that model, or choose another adapter."
            )
        ready[name] = module, inner, outer * _scale(config, name, inner.shape[0])
    return ready


def _sizes(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, also of transformers' Conv1D."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if hasattr(module, "nx") and hasattr(module, "nf") else None


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = float(_of_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", rank)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _of_pattern(patterns: Any, name: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def _adding(inner: Tensor, outer: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    held: dict[Any, tuple[Tensor, Tensor]] = {}  # on each device, in each number format, once

    def add(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = args[0]
        kind = x.device, x.dtype
        if kind not in held:
            held[kind] = inner.to(*kind), outer.to(*kind)
        a, b = held[kind]
        return y + ((x @ a.T) @ b.T).to(y.dtype)

    return add
